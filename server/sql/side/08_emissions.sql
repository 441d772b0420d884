-- An event that many runs wait for wakes them in batches, each a transaction of its own. The event stands from the first one
-- on; what is left to wake is noted, so that it goes on whatever happens to the server that began it.

create table if not exists absurd_server.emission (
  queue_name text not null,
  event_name text not null,
  primary key (queue_name, event_name)
);

-- Wakes up to p_limit runs that wait for an emitted event, and notes whether there are more.
create or replace function absurd_server.wake_waiting(p_queue text, p_event text, p_payload jsonb, p_limit integer)
returns table (woken bigint, more boolean)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
begin
  -- Runs are looked up one by one, by their key (offset 0 keeps it so): without statistics a planner expects few sleeping
  -- runs, and would go through all of them for each wait.
  execute format(
    'with waiting as materialized (
       select w.run_id, w.task_id, w.step_name
         from absurd.%1$I w
        cross join lateral (select r.state from absurd.%2$I r where r.run_id = w.run_id offset 0) r
        where w.event_name = $1 and r.state = ''sleeping'' limit $4),
     locked as materialized (
       select u.run_id, u.task_id, u.step_name from (select * from waiting order by run_id) u
        cross join lateral (select r.state from absurd.%2$I r where r.run_id = u.run_id for update offset 0) r
        where r.state = ''sleeping''),
     -- It carries along what the rest needs: parts that are joined would be compared pair by pair.
     woken as (
       update absurd.%2$I r
          set state = ''pending'', available_at = $3, wake_event = null, event_payload = $2, claimed_by = null,
              claim_expires_at = null
         from locked where r.run_id = locked.run_id
       returning r.run_id, locked.task_id, locked.step_name),
     stored as (
       insert into absurd.%3$I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       select woken.task_id, woken.step_name, $2, ''committed'', woken.run_id, $3 from woken
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at),
     tasks as (
       update absurd.%4$I t set state = ''pending'' from woken where t.task_id = woken.task_id),
     gone as (
       delete from absurd.%1$I w using woken where w.run_id = woken.run_id and w.step_name = woken.step_name)
     select count(*) from woken',
    'w_' || p_queue, 'r_' || p_queue, 'c_' || p_queue, 't_' || p_queue)
    into woken using p_event, p_payload, v_now, p_limit;
  execute format(
    'select exists (select from absurd.%I w
                     cross join lateral (select r.state from absurd.%I r where r.run_id = w.run_id offset 0) r
                     where w.event_name = $1 and r.state = ''sleeping'')',
    'w_' || p_queue, 'r_' || p_queue) into more using p_event;
  if more then
    insert into absurd_server.emission (queue_name, event_name) values (p_queue, p_event) on conflict do nothing;
  else
    delete from absurd_server.emission where queue_name = p_queue and event_name = p_event;
  end if;
  return next;
end
$$;

-- Emits an event: the first emission of a name wins, and wakes the first p_limit runs that wait for it.
create or replace function absurd_server.emit_event(p_queue text, p_event text, p_payload jsonb, p_limit integer)
returns table (applied boolean, woken bigint, more boolean)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_payload jsonb := coalesce(p_payload, 'null'::jsonb);
  v_rows integer;
begin
  execute format(
    'insert into absurd.%I as e (event_name, payload, emitted_at) values ($1, $2, $3)
         on conflict (event_name) do update set payload = excluded.payload, emitted_at = excluded.emitted_at
      where e.payload is null', 'e_' || p_queue) using p_event, v_payload, v_now;
  get diagnostics v_rows = row_count;
  applied := v_rows > 0;
  woken := 0;
  more := false;
  if applied then
    -- Waits that are over already are not woken by it.
    execute format('delete from absurd.%I w where w.event_name = $1 and w.timeout_at <= $2', 'w_' || p_queue)
      using p_event, v_now;
    select w.woken, w.more into woken, more from absurd_server.wake_waiting(p_queue, p_event, v_payload, p_limit) w;
  end if;
  return next;
end
$$;

-- For the functions of this schema that emit: the first batch; the rest is noted.
create or replace function absurd_server.emit_event(p_queue text, p_event text, p_payload jsonb)
returns table (applied boolean, woken bigint)
language sql as $$
  select applied, woken from absurd_server.emit_event(p_queue, p_event, p_payload, 1000)
$$;

-- Wakes the next runs of a noted emission.
create or replace function absurd_server.emit_more(p_queue text, p_event text, p_limit integer)
returns table (woken bigint, more boolean)
language plpgsql as $$
declare
  v_payload jsonb;
begin
  if to_regclass(format('absurd.%I', 'e_' || p_queue)) is not null then
    execute format('select e.payload from absurd.%I e where e.event_name = $1', 'e_' || p_queue)
      into v_payload using p_event;
  end if;
  if v_payload is null then
    -- The queue was dropped, or the event cleaned away: nobody hears of it any more.
    delete from absurd_server.emission where queue_name = p_queue and event_name = p_event;
    woken := 0;
    more := false;
    return next;
    return;
  end if;
  return query select w.woken, w.more from absurd_server.wake_waiting(p_queue, p_event, v_payload, p_limit) w;
end
$$;
