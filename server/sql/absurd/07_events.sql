-- Events: emit and await (contract sections 7.21, 7.22).
-- The event row is locked before the runs on both sides: the awaiter holds it shared, the emitter exclusively, so that
-- no emission falls between "not there yet" and "now I wait".

create or replace function absurd.await_event(p_queue_name text, p_task_id uuid, p_run_id uuid, p_step_name text,
                                              p_event_name text, p_timeout integer default null)
returns table (should_suspend boolean, payload jsonb)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_timeout_at timestamptz;
  v_stored jsonb;
  v_event record;
  v_run record;
  v_task_state text;
begin
  if p_event_name is null or btrim(p_event_name, ' ') = '' then
    raise exception 'event_name must be provided';
  end if;
  if p_timeout < 0 then
    raise exception 'timeout must not be negative';
  end if;
  v_timeout_at := v_now + make_interval(secs => p_timeout);

  execute format('select c.state from absurd.%I c where c.task_id = $1 and c.checkpoint_name = $2',
                 'c_' || p_queue_name) into v_stored using p_task_id, p_step_name;
  if v_stored is not null then
    return query select false, v_stored;
    return;
  end if;

  loop
    execute format('insert into absurd.%I (event_name, payload, emitted_at) values ($1, null, ''epoch'')
                        on conflict (event_name) do nothing', 'e_' || p_queue_name) using p_event_name;
    execute format('select e.payload, true as there from absurd.%I e where e.event_name = $1 for share',
                   'e_' || p_queue_name) into v_event using p_event_name;
    -- A cleanup may have removed the placeholder in between; without the row an emission would pass unseen.
    exit when v_event.there;
  end loop;

  execute format('select r.state, r.wake_event, r.event_payload from absurd.%I r
                   where r.run_id = $1 for update', 'r_' || p_queue_name) into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  end if;
  execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
    into v_task_state using p_task_id;
  if v_task_state = 'cancelled' then
    raise exception 'Task % was cancelled', p_task_id using errcode = 'AB001';
  end if;
  if v_run.event_payload is not null then
    execute format('update absurd.%I r set event_payload = null where r.run_id = $1', 'r_' || p_queue_name)
      using p_run_id;
  end if;
  if v_run.state <> 'running' then
    raise exception 'Run % must be running to await an event, it is %', p_run_id, v_run.state;
  end if;

  if v_event.payload is not null then
    execute format(
      'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       values ($1, $2, $3, ''committed'', $4, $5)
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at', 'c_' || p_queue_name)
      using p_task_id, p_step_name, v_event.payload, p_run_id, v_now;
    return query select false, v_event.payload;
    return;
  end if;

  if v_run.wake_event = p_event_name and v_run.event_payload is null then
    execute format('update absurd.%I r set wake_event = null where r.run_id = $1', 'r_' || p_queue_name)
      using p_run_id;
    return query select false, null::jsonb;
    return;
  end if;

  execute format(
    'insert into absurd.%I (task_id, run_id, step_name, event_name, timeout_at, created_at)
     values ($1, $2, $3, $4, $5, $6)
         on conflict (run_id, step_name) do update
        set event_name = excluded.event_name, timeout_at = excluded.timeout_at, created_at = excluded.created_at',
    'w_' || p_queue_name) using p_task_id, p_run_id, p_step_name, p_event_name, v_timeout_at, v_now;
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = $3, event_payload = null
                   where r.run_id = $1', 'r_' || p_queue_name)
    using p_run_id, coalesce(v_timeout_at, 'infinity'::timestamptz), p_event_name;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue_name)
    using p_task_id;
  return query select true, null::jsonb;
end
$$;

create or replace function absurd.emit_event(p_queue_name text, p_event_name text, p_payload jsonb default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_rows integer;
begin
  if p_event_name is null or btrim(p_event_name, ' ') = '' then
    raise exception 'event_name must be provided';
  end if;
  execute format(
    'insert into absurd.%I as e (event_name, payload, emitted_at) values ($1, $2, $3)
         on conflict (event_name) do update set payload = excluded.payload, emitted_at = excluded.emitted_at
      where e.payload is null', 'e_' || p_queue_name)
    using p_event_name, coalesce(p_payload, 'null'::jsonb), v_now;
  get diagnostics v_rows = row_count;
  if v_rows = 0 then
    return;  -- the first emission wins
  end if;
  execute format(
    'with late as (
       delete from absurd.%1$I w where w.event_name = $1 and w.timeout_at <= $3),
     waiting as (
       select w.run_id, w.task_id, w.step_name from absurd.%1$I w
        where w.event_name = $1 and (w.timeout_at is null or w.timeout_at > $3)),
     locked as (
       select r.run_id from absurd.%2$I r
        where r.run_id in (select run_id from waiting) and r.state = ''sleeping''
        order by r.run_id for update),
     woken as (
       update absurd.%2$I r
          set state = ''pending'', available_at = $3, wake_event = null, event_payload = $2, claimed_by = null,
              claim_expires_at = null
         from locked where r.run_id = locked.run_id
       returning r.run_id),
     stored as (
       insert into absurd.%3$I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       select waiting.task_id, waiting.step_name, $2, ''committed'', waiting.run_id, $3
         from waiting join woken using (run_id)
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at),
     tasks as (
       update absurd.%4$I t set state = ''pending''
        where t.task_id in (select waiting.task_id from waiting join woken using (run_id)))
     delete from absurd.%1$I w using woken where w.event_name = $1 and w.run_id = woken.run_id',
    'w_' || p_queue_name, 'r_' || p_queue_name, 'c_' || p_queue_name, 't_' || p_queue_name)
    using p_event_name, coalesce(p_payload, 'null'::jsonb), v_now;
end
$$;
