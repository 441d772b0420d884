-- Cuts the leases of a lost stream's runs to a grace; compare-and-set on the claim and on the end that was seen, so that
-- a worker that was heard of elsewhere keeps its lease. Never lengthens.
with item as materialized (
       select * from unnest($1::uuid[], $2::text[], $3::timestamptz[], $4::integer[])
                as i (run_id, digest, seen, grace_ms)),
     clock as materialized (select absurd.current_time() as now),
     locked as materialized (
       select r.run_id, i.grace_ms
         from {r} r join item i on i.run_id = r.run_id cross join clock
        where r.state = 'running' and right(r.claimed_by, 23) = '#' || i.digest and r.claim_expires_at = i.seen
          and r.claim_expires_at > clock.now + i.grace_ms * interval '1 millisecond'
        order by r.run_id
          for no key update of r skip locked)
update {r} r
   set claim_expires_at = clock.now + l.grace_ms * interval '1 millisecond'
  from locked l cross join clock
 where r.run_id = l.run_id
