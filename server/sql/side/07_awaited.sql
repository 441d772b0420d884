-- Runs that sleep until a task has ended. Such a wait is a wait for an event that the server emits: its name has the task's
-- number of attempts at the time, so that a task which is retried by hand has another end.

create table if not exists absurd_server.awaited_task (
  queue_name    text not null,
  task_id       uuid not null,
  waiting_queue text not null,
  event_name    text not null,
  primary key (queue_name, task_id, waiting_queue, event_name)
);

-- How a task has ended, as the SDKs store it; no snapshot: it has not.
create or replace function absurd_server.task_end(p_queue text, p_task_id uuid)
returns table (known boolean, attempts integer, snapshot jsonb)
language plpgsql as $$
declare
  v_task record;
  v_failure jsonb;
begin
  execute format('select t.state, t.attempts, t.completed_payload, t.last_attempt_run from absurd.%I t
                   where t.task_id = $1', 't_' || p_queue) into v_task using p_task_id;
  known := v_task.state is not null;
  attempts := v_task.attempts;
  if v_task.state = 'completed' then
    snapshot := jsonb_build_object('state', v_task.state, 'result', v_task.completed_payload);
  elsif v_task.state = 'failed' then
    execute format('select r.failure_reason from absurd.%I r where r.run_id = $1', 'r_' || p_queue)
      into v_failure using v_task.last_attempt_run;
    snapshot := jsonb_build_object('state', v_task.state, 'failure', v_failure);
  elsif v_task.state = 'cancelled' then
    snapshot := jsonb_build_object('state', v_task.state);
  end if;
  return next;
end
$$;

create or replace function absurd_server.await_task(p_queue text, p_run_id uuid, p_digest text, p_step text,
                                                    p_awaited_queue text, p_task_id uuid, p_timeout_ms bigint)
returns table (found_task boolean, known boolean, owned boolean, state text, expired boolean, outcome text, payload jsonb,
               wake_at timestamptz)
language plpgsql as $$
#variable_conflict use_column
declare
  v_run record;
  v_mark record;
  v_held record;
  v_end record;
  v_event text;
begin
  execute format('select r.task_id, r.state = ''running''
                         and coalesce($2 is null or right(r.claimed_by, 23) = ''#'' || $2, false) as live
                    from absurd.%I r where r.run_id = $1', 'r_' || p_queue) into v_run using p_run_id, p_digest;
  if p_awaited_queue = p_queue and p_task_id = v_run.task_id then
    raise exception 'a task cannot wait for its own end';
  end if;
  execute format('select c.state, c.status from absurd.%I c where c.task_id = $1 and c.checkpoint_name = $2', 'c_' || p_queue)
    into v_mark using v_run.task_id, p_step;
  if to_regclass(format('absurd.%I', 't_' || p_awaited_queue)) is not null then
    select * into v_end from absurd_server.task_end(p_awaited_queue, p_task_id);
    found_task := v_end.known;
  else
    found_task := false;
  end if;
  -- The step's own result comes first: the task that it waited for may be gone since. A run that is not live goes the usual
  -- way, which knows a call that was said twice, as long as there is a task to name the event by. Only the run and its task are
  -- locked here, no event.
  if (v_mark.state is not null or v_mark.status = 'timed_out') and (v_run.live or not found_task) then
    select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
    found_task := true;
    known := v_held.known;
    owned := v_held.owned;
    state := v_held.state;
    expired := v_held.expired;
    if v_held.state = 'running' and v_held.owned then
      execute format('update absurd.%I r set event_payload = null where r.run_id = $1 and r.event_payload is not null',
                     'r_' || p_queue) using p_run_id;
      outcome := case when v_mark.state is not null then 'payload' else 'timed_out' end;
      payload := v_mark.state;
    end if;
    return next;
    return;
  end if;
  if not found_task then
    return next;
    return;
  end if;
  v_event := '$taskEnd:' || p_awaited_queue || ':' || p_task_id || ':' || v_end.attempts;
  if v_end.snapshot is not null then
    perform absurd_server.emit_event(p_queue, v_event, v_end.snapshot);
  else
    insert into absurd_server.awaited_task (queue_name, task_id, waiting_queue, event_name)
    values (p_awaited_queue, p_task_id, p_queue, v_event) on conflict do nothing;
  end if;
  return query
    select true, a.known, a.owned, a.state, a.expired, a.outcome, a.payload, a.wake_at
      from absurd_server.await_event(p_queue, p_run_id, p_digest, p_step, v_event, p_timeout_ms) a;
end
$$;

-- Wakes the runs whose tasks have ended, or are gone: those of `p_tasks`, or all. Each on its own, so that one that fails
-- holds up no other, nor does one whose rows are held by somebody's open transaction: its turn comes again. A queue that
-- cannot be looked at, or written to, is left out, and costs the others no waiting. Each waiting queue has a share of the limit,
-- so that none uses up another's. Says which queues have woken runs.
create or replace function absurd_server.settle_awaited(p_queue text, p_tasks uuid[], p_limit integer)
returns table (waiting_queue text)
language plpgsql set lock_timeout = '100ms' as $$
#variable_conflict use_column
declare
  v_queue text;
  v_ended text;
  v_waiting text[];
  v_row record;
  v_snapshot jsonb;
  v_closed text[] := '{}';
  v_open text[] := '{}';
  v_refusals integer := 0;
begin
  for v_queue in
    select distinct a.queue_name from absurd_server.awaited_task a where p_queue is null or a.queue_name = p_queue
  loop
    begin
      -- Of a queue that was dropped, all tasks are gone.
      if to_regclass(format('absurd.%I', 't_' || v_queue)) is null then
        v_ended := 'true';
      else
        perform absurd_server.lock_for_read('r_' || v_queue, 't_' || v_queue);
        v_ended := format('not exists (select from absurd.%I t where t.task_id = a.task_id
                                          and t.state not in (''completed'', ''failed'', ''cancelled''))', 't_' || v_queue);
      end if;
      select array_agg(distinct a.waiting_queue) into v_waiting
        from absurd_server.awaited_task a
       where a.queue_name = v_queue and (p_tasks is null or a.task_id = any (p_tasks)) and a.waiting_queue <> all (v_closed);
      for i in 1 .. coalesce(cardinality(v_waiting), 0) loop
        if v_waiting[i] <> all (v_open) then
          if absurd_server.queue_access(v_waiting[i]) in ('reads', 'locked', 'unusable') then
            v_closed := v_closed || v_waiting[i];
          else
            v_open := v_open || v_waiting[i];
          end if;
        end if;
      end loop;
      for v_row in
        execute format(
          'select a.task_id, a.waiting_queue, a.event_name
             from (select a.*, row_number() over (partition by a.waiting_queue) as place
                     from absurd_server.awaited_task a
                    where a.queue_name = $1 and a.waiting_queue = any ($4) and ($2 is null or a.task_id = any ($2))
                      and %s) x
             join absurd_server.awaited_task a using (queue_name, task_id, waiting_queue, event_name)
            where x.place <= $3
              for update of a skip locked', v_ended)
        using v_queue, p_tasks, greatest(p_limit / greatest(cardinality(v_waiting), 1), 20),
              array(select w from unnest(v_waiting) w where w = any (v_open))
      loop
        begin
          v_snapshot := null;
          if v_ended <> 'true' then
            select e.snapshot into v_snapshot from absurd_server.task_end(v_queue, v_row.task_id) e;
          end if;
          if to_regclass(format('absurd.%I', 'e_' || v_row.waiting_queue)) is not null then
            perform absurd_server.emit_event(
              v_row.waiting_queue, v_row.event_name,
              coalesce(v_snapshot, '{"state": "failed", "failure": {"name": "TaskNotFound", "message": "the task is gone"}}'));
          end if;
          delete from absurd_server.awaited_task a
           where a.queue_name = v_queue and a.task_id = v_row.task_id and a.waiting_queue = v_row.waiting_queue
             and a.event_name = v_row.event_name;
          waiting_queue := v_row.waiting_queue;
          return next;
        exception when others then
          raise warning 'the runs that wait for task % could not be woken: %', v_row.task_id, sqlerrm;
          -- Many held rows must not use up the statement's time: each wait is shorter than the one before.
          v_refusals := v_refusals + 1;
          perform set_config('lock_timeout', greatest(1, 100 / v_refusals) || 'ms', true);
        end;
      end loop;
    exception when others then
      raise warning 'the awaited tasks of queue % could not be looked at: %', v_queue, sqlerrm;
    end;
  end loop;
end
$$;
