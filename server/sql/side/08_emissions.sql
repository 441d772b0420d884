-- An event that many runs wait for wakes them in batches, each a transaction of its own. The event stands from the first one
-- on; what is left to wake is noted, so that it goes on whatever happens to the server that began it.
-- Many events in one transaction: all events first, then all runs that wait for any of them, so that emissions, waits and
-- whatever else takes several rows take them in one order.

create table if not exists absurd_server.emission (
  queue_name text not null,
  event_name text not null,
  primary key (queue_name, event_name)
);

-- Wakes up to p_limit runs that wait for these emitted events, and says for which there are more.
create or replace function absurd_server.wake_waiting(p_queue text, p_events text[], p_payloads jsonb[], p_limit integer)
returns table (event_name text, woken bigint, more boolean)
language plpgsql as $$
#variable_conflict use_column
declare
  v_now timestamptz := absurd.current_time();
  v_each integer := greatest(1, p_limit / greatest(1, cardinality(p_events)));
  v_woken text[];
begin
  -- Runs are looked up one by one, by their key (offset 0 keeps it so): without statistics a planner expects few sleeping
  -- runs, and would go through all of them for each wait.
  execute format(
    'with event as materialized (select * from unnest($1, $2) as e (event_name, payload)),
     waiting as materialized (
       select w.run_id, w.task_id, w.step_name, event.event_name, event.payload
         from event
        cross join lateral (
          select w.run_id, w.task_id, w.step_name from absurd.%1$I w
           cross join lateral (select r.state from absurd.%2$I r where r.run_id = w.run_id offset 0) r
           where w.event_name = event.event_name and r.state = ''sleeping'' limit $4) w),
     locked as materialized (
       select u.* from (select * from waiting order by run_id) u
        cross join lateral (select r.state from absurd.%2$I r where r.run_id = u.run_id offset 0 for update) r
        where r.state = ''sleeping''),
     -- It carries along what the rest needs: parts that are joined would be compared pair by pair.
     woken as (
       update absurd.%2$I r
          set state = ''pending'', available_at = $3, wake_event = null, event_payload = locked.payload, claimed_by = null,
              claim_expires_at = null
         from locked where r.run_id = locked.run_id
       returning r.run_id, locked.task_id, locked.step_name, locked.event_name, locked.payload),
     stored as (
       insert into absurd.%3$I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       select woken.task_id, woken.step_name, woken.payload, ''committed'', woken.run_id, $3 from woken
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at),
     tasks as (
       update absurd.%4$I t set state = ''pending'' from woken where t.task_id = woken.task_id),
     gone as (
       delete from absurd.%1$I w using woken where w.run_id = woken.run_id and w.step_name = woken.step_name)
     select coalesce(array_agg(event_name), ''{}'') from woken',
    'w_' || p_queue, 'r_' || p_queue, 'c_' || p_queue, 't_' || p_queue)
    into v_woken using p_events, p_payloads, v_now, v_each;
  return query execute format(
    'with count as materialized (select name, count(*) as woken from unnest($2) as name group by name)
     select e.event_name, coalesce((select count.woken from count where count.name = e.event_name), 0),
            exists (select from absurd.%I w
                     cross join lateral (select r.state from absurd.%I r where r.run_id = w.run_id offset 0) r
                     where w.event_name = e.event_name and r.state = ''sleeping'')
       from unnest($1) as e (event_name)',
    'w_' || p_queue, 'r_' || p_queue) using p_events, v_woken;
end
$$;

-- Keeps the notes of what is left to wake in step with the events.
create or replace function absurd_server.note_emission(p_queue text, p_event text, p_more boolean) returns void
language plpgsql as $$
begin
  if p_more then
    insert into absurd_server.emission (queue_name, event_name) values (p_queue, p_event) on conflict do nothing;
  else
    delete from absurd_server.emission where queue_name = p_queue and event_name = p_event;
  end if;
end
$$;

-- Emits events, none twice, in the order of their names: the first emission of a name wins, and wakes runs that wait for it.
create or replace function absurd_server.emit_events(p_queue text, p_events text[], p_payloads jsonb[], p_limit integer)
returns table (event_name text, applied boolean, woken bigint, more boolean)
language plpgsql as $$
#variable_conflict use_column
declare
  v_now timestamptz := absurd.current_time();
  v_events text[];
  v_payloads jsonb[];
  v_waited boolean;
begin
  execute format(
    'with fresh as (
       insert into absurd.%I as e (event_name, payload, emitted_at)
       select i.event_name, coalesce(i.payload, ''null''), $3 from unnest($1, $2) as i (event_name, payload)
        order by i.event_name
           on conflict (event_name) do update set payload = excluded.payload, emitted_at = excluded.emitted_at
        where e.payload is null
       returning e.event_name, e.payload)
     select array_agg(event_name), array_agg(payload) from fresh', 'e_' || p_queue)
    into v_events, v_payloads using p_events, p_payloads, v_now;
  if v_events is not null then
    -- Waits that are over already are not woken by it.
    execute format('delete from absurd.%I w where w.event_name = any ($1) and w.timeout_at <= $2', 'w_' || p_queue)
      using v_events, v_now;
    execute format('select exists (select from absurd.%I w where w.event_name = any ($1))', 'w_' || p_queue)
      into v_waited using v_events;
  end if;
  if v_waited then
    return query
      select w.event_name, true, w.woken, w.more
        from absurd_server.wake_waiting(p_queue, v_events, v_payloads, p_limit) w
       cross join lateral absurd_server.note_emission(p_queue, w.event_name, w.more);
  else
    return query select e.event_name, true, 0::bigint, false from unnest(v_events) as e (event_name);
  end if;
  return query
    select e.event_name, false, 0::bigint, false from unnest(p_events) as e (event_name)
     where v_events is null or e.event_name <> all (v_events);
end
$$;

-- For the functions of this schema that emit: the first batch; the rest is noted.
create or replace function absurd_server.emit_event(p_queue text, p_event text, p_payload jsonb)
returns table (applied boolean, woken bigint)
language sql as $$
  select applied, woken from absurd_server.emit_events(p_queue, array[p_event], array[p_payload], 1000)
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
  return query
    select w.woken, w.more
      from absurd_server.wake_waiting(p_queue, array[p_event], array[v_payload], p_limit) w
     cross join lateral absurd_server.note_emission(p_queue, w.event_name, w.more);
end
$$;
