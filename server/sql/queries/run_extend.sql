-- Moves the ends of leases to now + seconds; one row per item. A lease without an end stays as it is.
with item as materialized (
       select * from unnest($1::uuid[],     -- runs, each at most once
                            $2::text[],     -- digests; null: no token was shown
                            $3::integer[])  -- seconds
                with ordinality as i (run_id, digest, seconds, item)),
     clock as materialized (select absurd.current_time() as now),
     locked as materialized (
       select r.run_id, r.task_id, r.state, r.claim_expires_at, i.item, i.seconds, r.failure_reason,
              i.digest is null or coalesce(right(r.claimed_by, 23) = '#' || i.digest, false) as owned
         from (select * from item order by run_id) i
         cross join lateral (select * from {r} r where r.run_id = i.run_id for no key update {wait}) r),
     runs as (
       update {r} r
          set claim_expires_at = clock.now + make_interval(secs => l.seconds)
         from locked l cross join clock
        where r.run_id = l.run_id and l.state = 'running' and l.owned and l.claim_expires_at is not null
       returning r.run_id)
select i.item, coalesce(l.run_id, seen.run_id) is not null as found, l.run_id is null as skipped,
       coalesce(l.state, seen.state) as state, coalesce(l.owned, false) as owned,
       coalesce(l.state = 'running' and l.owned, false) as done, coalesce(l.task_id, seen.task_id) as task_id,
       false as same, coalesce(l.failure_reason ->> 'name' = '$ClaimTimeout', false) as expired,
       case when i.run_id in (select runs.run_id from runs) then clock.now + make_interval(secs => i.seconds)
       end as claim_expires_at
  from item i
  cross join clock
  left join locked l on l.item = i.item
  left join lateral (select r.run_id, r.task_id, r.state from {r} r where l.run_id is null and r.run_id = i.run_id
                     offset 0) seen on true
 order by i.item
