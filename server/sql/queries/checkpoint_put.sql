-- Stores results of steps; one row per item. The writer's run is locked first, so that a late write cannot slip past
-- the failure of its run. The task is the run's own, never one that the caller names.
with item as materialized (
       select * from unnest($1::uuid[],     -- runs, each at most once
                            $2::text[],     -- digests; null: no token was shown
                            $3::text[],     -- checkpoint names
                            $4::jsonb[],    -- values
                            $5::integer[])  -- seconds to extend the lease by; 0: leave it
                with ordinality as i (run_id, digest, checkpoint_name, state, seconds, item)),
     clock as materialized (select absurd.current_time() as now),
     locked as materialized (
       select r.run_id, r.task_id, r.attempt, r.state, r.claim_expires_at, i.item, i.checkpoint_name,
              i.state as value, i.seconds, r.failure_reason,
              i.digest is null or coalesce(right(r.claimed_by, 23) = '#' || i.digest, false) as owned,
              case when i.digest is null then r.state not in ('failed', 'cancelled')
                   else r.state = 'running' end as able
         from (select * from item order by run_id) i
         cross join lateral (select * from {r} r where r.run_id = i.run_id for no key update {wait}) r),
     extended as (
       update {r} r
          set claim_expires_at = clock.now + make_interval(secs => l.seconds)
         from locked l cross join clock
        where r.run_id = l.run_id and l.able and l.owned and l.seconds > 0 and l.state = 'running'
          and l.claim_expires_at is not null
       returning r.run_id),
     stored as (
       insert into {c} as c (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       select l.task_id, l.checkpoint_name, l.value, 'committed', l.run_id, clock.now
         from locked l cross join clock
        where l.able and l.owned
        order by l.task_id, l.checkpoint_name
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at
        where not exists (select from {r} o, {r} n
                           where o.run_id = c.owner_run_id and n.run_id = excluded.owner_run_id
                             and o.attempt > n.attempt)
       returning c.owner_run_id, c.checkpoint_name)
select i.item, coalesce(l.run_id, seen.run_id) is not null as found, l.run_id is null as skipped,
       coalesce(l.state, seen.state) as state, coalesce(l.owned, false) as owned,
       coalesce(l.able and l.owned, false) as done, coalesce(l.task_id, seen.task_id) as task_id, false as same,
       coalesce(l.failure_reason ->> 'name' = '$ClaimTimeout', false) as expired,
       (i.run_id, i.checkpoint_name) in (select stored.owner_run_id, stored.checkpoint_name from stored) as applied,
       case when i.run_id in (select extended.run_id from extended) then clock.now + make_interval(secs => i.seconds)
            else l.claim_expires_at end as claim_expires_at
  from item i
  cross join clock
  left join locked l on l.item = i.item
  left join lateral (select r.run_id, r.task_id, r.state from {r} r where l.run_id is null and r.run_id = i.run_id
                     offset 0) seen on true
 order by i.item
