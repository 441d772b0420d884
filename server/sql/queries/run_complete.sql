-- Completes runs; one row per item. An item whose run another transaction holds comes back as `skipped`; one whose task is
-- held comes back as running, and not `done`.
with item as materialized (
       select * from unnest($1::uuid[],   -- runs, each at most once
                            $2::text[],   -- digests; null: no token was shown
                            $3::jsonb[])  -- results
                with ordinality as i (run_id, digest, result, item)),
     clock as materialized (select absurd.current_time() as now),
     locked as materialized (
       select r.run_id, r.task_id, r.state, i.item, i.result, r.result as stored, r.failure_reason,
              i.digest is null or coalesce(right(r.claimed_by, 23) = '#' || i.digest, false) as owned
         from (select * from item order by run_id) i
         cross join lateral (select * from {r} r where r.run_id = i.run_id for update {wait}) r),
     -- What is joined here carries along what is needed later: the planner expects few items, and would join
     -- materialized parts by looking at each pair.
     held as materialized (
       select l.run_id, l.result
         from (select * from locked l where l.state = 'running' and l.owned order by l.task_id) l
         cross join lateral (select t.task_id from {t} t where t.task_id = l.task_id for update {wait}) t),
     runs as (
       update {r} r
          set state = 'completed', completed_at = clock.now, result = held.result
         from held cross join clock
        where r.run_id = held.run_id
       returning r.run_id, r.task_id, r.result),
     tasks as (
       update {t} t
          set state = 'completed', completed_payload = runs.result, last_attempt_run = runs.run_id
         from runs
        where t.task_id = runs.task_id),
     waits as (
       delete from {w} w using runs where w.run_id = runs.run_id)
select i.item, coalesce(l.run_id, seen.run_id) is not null as found, l.run_id is null as skipped,
       coalesce(l.state, seen.state) as state, coalesce(l.owned, false) as owned,
       i.run_id in (select runs.run_id from runs) as done,
       coalesce(l.task_id, seen.task_id) as task_id,
       l.state = 'completed' and l.stored is not distinct from i.result as same,
       coalesce(l.failure_reason ->> 'name' = '$ClaimTimeout', false) as expired
  from item i
  left join locked l on l.item = i.item
  left join lateral (select r.run_id, r.task_id, r.state from {r} r where l.run_id is null and r.run_id = i.run_id
                     offset 0) seen on true
 order by i.item
