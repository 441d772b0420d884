-- Gives claims back without using up an attempt; one row per item.
-- Unlike schedule_run it keeps wake_event and payload, so that a pending event timeout is not lost.
with item as materialized (
       select * from unnest($1::uuid[],         -- runs, each at most once
                            $2::text[],         -- digests; null: no token was shown
                            $3::timestamptz[],  -- where the run stood in the queue; null: keep
                            $4::integer[],      -- milliseconds until it is offered again; 0: at once
                            $5::boolean[])      -- true: this claim was the task's first
                with ordinality as i (run_id, digest, available_at, delay_ms, first_claim, item)),
     clock as materialized (select absurd.current_time() as now),
     locked as materialized (
       select r.run_id, r.task_id, r.state, r.claimed_by, i.item, i.available_at, i.delay_ms,
              -- A step that is stored must be found by the next claim: then the run has been started, after all.
              i.first_claim and not exists (select from {c} c where c.task_id = r.task_id) as first_claim,
              r.failure_reason, i.digest is null or coalesce(right(r.claimed_by, 23) = '#' || i.digest, false) as owned
         from (select * from item order by run_id) i
         cross join lateral (select * from {r} r where r.run_id = i.run_id for update {wait}) r),
     held as materialized (
       select l.*
         from (select * from locked l where l.state = 'running' and l.owned order by l.task_id) l
         cross join lateral (select t.task_id from {t} t where t.task_id = l.task_id for update {wait}) t),
     runs as (
       update {r} r
          set state = case when l.delay_ms > 0 then 'sleeping' else 'pending' end,
              claimed_by = null, claim_expires_at = null,
              started_at = case when l.first_claim then null else r.started_at end,
              available_at = case when l.delay_ms > 0 then clock.now + l.delay_ms * interval '1 millisecond'
                                  else least(coalesce(l.available_at, r.available_at), clock.now) end
         from held l cross join clock
        where r.run_id = l.run_id
       returning r.run_id, r.task_id, r.state, l.first_claim),
     tasks as (
       update {t} t
          set state = runs.state, first_started_at = case when runs.first_claim then null else t.first_started_at end
         from runs
        where t.task_id = runs.task_id)
select i.item, coalesce(l.run_id, seen.run_id) is not null as found, l.run_id is null as skipped,
       coalesce(l.state, seen.state) as state, coalesce(l.owned, false) as owned, i.run_id in (select runs.run_id from runs) as done,
       coalesce(l.task_id, seen.task_id) as task_id,
       l.state in ('pending', 'sleeping') and l.claimed_by is null as same,
       coalesce(l.failure_reason ->> 'name' = '$ClaimTimeout', false) as expired
  from item i
  left join locked l on l.item = i.item
  left join lateral (select r.run_id, r.task_id, r.state from {r} r where l.run_id is null and r.run_id = i.run_id
                     offset 0) seen on true
 order by i.item
