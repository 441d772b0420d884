-- Cleanup of what ended long ago (contract sections 7.24, 7.25). Installed in our side schema too, under the same names:
-- in a database that upstream's tool made, the server cleans up with these.
-- The oldest ends are found by index, one walk per way to end. What is found is locked and looked at again before it
-- goes: a task that was just retried and an event that was just emitted stay. What somebody else holds is left for the
-- next call. The settings hold the planner to these walks where it has no statistics yet.

create or replace function absurd.cleanup_tasks(p_queue_name text, p_ttl_seconds integer, p_limit integer default 1000)
returns integer
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_cutoff timestamptz;
  v_tasks uuid[];
begin
  if p_ttl_seconds is null or p_ttl_seconds < 0 then
    raise exception 'the time to live must be 0 seconds or more';
  end if;
  v_cutoff := absurd.current_time() - make_interval(secs => p_ttl_seconds);

  -- Runs are locked before their task, as everywhere; a task with a run that somebody holds is passed over. Rows are looked up
  -- one by one, by their keys (offset 0 keeps it so): without statistics a planner would walk the whole history for them.
  execute format(
    'with ended as (
       (select r.task_id, r.completed_at as at
          from absurd.%2$I r
         cross join lateral (select t.state, t.last_attempt_run from absurd.%1$I t where t.task_id = r.task_id offset 0) t
         where r.completed_at < $1 and t.state = ''completed'' and t.last_attempt_run = r.run_id
         order by r.completed_at limit $2)
       union all
       (select r.task_id, r.failed_at
          from absurd.%2$I r
         cross join lateral (select t.state, t.last_attempt_run from absurd.%1$I t where t.task_id = r.task_id offset 0) t
         where r.failed_at < $1 and t.state = ''failed'' and t.last_attempt_run = r.run_id
         order by r.failed_at limit $2)
       union all
       (select t.task_id, t.cancelled_at
          from absurd.%1$I t
         cross join lateral (select r.run_id from absurd.%2$I r where r.run_id = t.last_attempt_run offset 0) r
         where t.cancelled_at < $1 and t.state = ''cancelled''
         order by t.cancelled_at limit $2)),
     oldest as materialized (select e.task_id from ended e order by e.at limit $2),
     owned as materialized (
       select o.task_id, r.run_id from oldest o
        cross join lateral (select r.run_id from absurd.%2$I r where r.task_id = o.task_id offset 0) r),
     free as materialized (
       select u.run_id from (select * from owned order by run_id) u
        cross join lateral (select from absurd.%2$I r where r.run_id = u.run_id for update skip locked) r)
     select array_agg(o.task_id) from oldest o
      where o.task_id not in (
        select u.task_id from owned u where u.run_id not in (select f.run_id from free f))',
    't_' || p_queue_name, 'r_' || p_queue_name) into v_tasks using v_cutoff, p_limit;
  if v_tasks is null then
    return 0;
  end if;

  -- The newest version decides: a task that was retried meanwhile has another state.
  execute format(
    'select array_agg(x.task_id) from (
       select t.task_id from absurd.%I t
        where t.task_id = any ($1) and t.state in (''completed'', ''failed'', ''cancelled'')
        order by t.task_id for update skip locked) x',
    't_' || p_queue_name) into v_tasks using v_tasks;
  if v_tasks is null then
    return 0;
  end if;

  execute format('delete from absurd.%I w where w.task_id = any ($1)', 'w_' || p_queue_name) using v_tasks;
  execute format('delete from absurd.%I c where c.task_id = any ($1)', 'c_' || p_queue_name) using v_tasks;
  execute format('delete from absurd.%I r where r.task_id = any ($1)', 'r_' || p_queue_name) using v_tasks;
  if to_regclass(format('absurd.%I', 'i_' || p_queue_name)) is not null then
    execute format('delete from absurd.%I i where i.task_id = any ($1)', 'i_' || p_queue_name) using v_tasks;
  end if;
  execute format('delete from absurd.%I t where t.task_id = any ($1)', 't_' || p_queue_name) using v_tasks;
  return cardinality(v_tasks);
end
$$;

-- Placeholders carry the oldest time there is and go first; an awaiter that loses its placeholder makes it anew.
create or replace function absurd.cleanup_events(p_queue_name text, p_ttl_seconds integer, p_limit integer default 1000)
returns integer
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_rows integer;
begin
  if p_ttl_seconds is null or p_ttl_seconds < 0 then
    raise exception 'the time to live must be 0 seconds or more';
  end if;
  execute format(
    'with oldest as materialized (
       select e.event_name from absurd.%1$I e
        where e.emitted_at < $1 order by e.emitted_at limit $2 for update skip locked)
     delete from absurd.%1$I e using oldest o where e.event_name = o.event_name',
    'e_' || p_queue_name) using absurd.current_time() - make_interval(secs => p_ttl_seconds), p_limit;
  get diagnostics v_rows = row_count;
  return v_rows;
end
$$;
