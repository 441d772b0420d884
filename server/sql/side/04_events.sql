-- Events for callers of the server: as the contract's functions (7.21, 7.22), with timeouts that last.
-- A wait with a timeout leaves a mark under its step's name: a checkpoint without value and owner, which everybody else
-- takes for none. Its time is the deadline; its status says whether that has passed.

create or replace function absurd_server.await_event(p_queue text, p_run_id uuid, p_digest text, p_step text,
                                                     p_event text, p_timeout_ms bigint)
returns table (known boolean, owned boolean, state text, expired boolean, task_id uuid, outcome text, payload jsonb,
               wake_at timestamptz)
language plpgsql as $$
#variable_conflict use_column
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task_id uuid;
  v_live boolean;
  v_event record;
  v_mark record;
  v_deadline timestamptz;
begin
  execute format('select r.task_id, r.state = ''running'' and coalesce($2 is null or right(r.claimed_by, 23) = ''#'' || $2, false)
                    from absurd.%I r where r.run_id = $1', 'r_' || p_queue)
    into v_task_id, v_live using p_run_id, p_digest;
  known := v_task_id is not null;
  if not known then
    return next;
    return;
  end if;
  task_id := v_task_id;

  -- The event before the run, on both sides: no emission falls between "not there yet" and "now I wait". A wait that will be
  -- refused makes no event.
  loop
    if v_live then
      execute format('insert into absurd.%I (event_name, payload, emitted_at) values ($1, null, ''epoch'')
                          on conflict (event_name) do nothing', 'e_' || p_queue) using p_event;
    end if;
    execute format('select e.payload, true as there from absurd.%I e where e.event_name = $1 for share', 'e_' || p_queue)
      into v_event using p_event;
    exit when v_event.there or not v_live;
  end loop;
  execute format('select r.state, r.claimed_by, r.wake_event, r.event_payload, r.available_at,
                         coalesce(r.failure_reason ->> ''name'' = ''$ClaimTimeout'', false) as expired
                    from absurd.%I r where r.run_id = $1 for update', 'r_' || p_queue) into v_run using p_run_id;
  execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue)
    into state using v_task_id;
  if state <> 'cancelled' then
    state := v_run.state;
  end if;
  owned := p_digest is null or coalesce(right(v_run.claimed_by, 23) = '#' || p_digest, false);
  expired := v_run.expired;
  execute format('select c.state, c.status, c.updated_at from absurd.%I c
                   where c.task_id = $1 and c.checkpoint_name = $2', 'c_' || p_queue)
    into v_mark using v_task_id, p_step;

  if state in ('pending', 'sleeping') and v_run.claimed_by is null then
    -- Said twice: this very wait has put the run to sleep.
    if v_run.wake_event = p_event or (v_mark.state is not null and v_mark.state = v_event.payload) then
      outcome := 'suspended';
      wake_at := nullif(v_run.available_at, 'infinity');
    end if;
    return next;
    return;
  elsif state <> 'running' or not owned then
    return next;
    return;
  elsif not v_live then
    raise exception 'the run was claimed at the same time' using errcode = 'serialization_failure';
  end if;

  if v_run.event_payload is not null then
    execute format('update absurd.%I r set event_payload = null where r.run_id = $1', 'r_' || p_queue) using p_run_id;
  end if;
  if v_mark.state is not null then
    outcome := 'payload';
    payload := v_mark.state;
    return next;
    return;
  end if;
  if v_mark.status = 'timed_out' then
    outcome := 'timed_out';
    return next;
    return;
  end if;
  if v_event.payload is not null then
    execute format(
      'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       values ($1, $2, $3, ''committed'', $4, $5)
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at', 'c_' || p_queue)
      using v_task_id, p_step, v_event.payload, p_run_id, v_now;
    outcome := 'payload';
    payload := v_event.payload;
    return next;
    return;
  end if;

  -- The first deadline counts. A wait that was begun by SQL has left no mark, only the signal of its end.
  v_deadline := case when v_mark.status = 'awaiting' then v_mark.updated_at
                     when v_run.wake_event = p_event and v_run.event_payload is null then v_now
                     else v_now + p_timeout_ms * interval '1 millisecond' end;
  if v_deadline is not null then
    execute format(
      'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       values ($1, $2, null, $3, null, $4)
           on conflict (task_id, checkpoint_name) do update
          set status = excluded.status, updated_at = excluded.updated_at', 'c_' || p_queue)
      using v_task_id, p_step, case when v_deadline <= v_now then 'timed_out' else 'awaiting' end, v_deadline;
  end if;
  if v_deadline <= v_now then
    execute format('update absurd.%I r set wake_event = null where r.run_id = $1 and r.wake_event is not null',
                   'r_' || p_queue) using p_run_id;
    execute format('delete from absurd.%I w where w.run_id = $1 and w.step_name = $2', 'w_' || p_queue)
      using p_run_id, p_step;
    outcome := 'timed_out';
    return next;
    return;
  end if;

  execute format(
    'insert into absurd.%I (task_id, run_id, step_name, event_name, timeout_at, created_at)
     values ($1, $2, $3, $4, $5, $6)
         on conflict (run_id, step_name) do update
        set event_name = excluded.event_name, timeout_at = excluded.timeout_at, created_at = excluded.created_at',
    'w_' || p_queue) using v_task_id, p_run_id, p_step, p_event, v_deadline, v_now;
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = $3, event_payload = null
                   where r.run_id = $1', 'r_' || p_queue)
    using p_run_id, coalesce(v_deadline, 'infinity'), p_event;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue) using v_task_id;
  outcome := 'suspended';
  wake_at := v_deadline;
  return next;
end
$$;
