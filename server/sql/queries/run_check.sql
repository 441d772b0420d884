-- What claims are worth now; one row per item, no locks.
select i.item, r.state, coalesce(right(r.claimed_by, 23) = '#' || i.digest, false) as owned, r.claim_expires_at,
       coalesce(r.failure_reason ->> 'name' = '$ClaimTimeout', false) as expired
  from unnest($1::uuid[], $2::text[]) with ordinality as i (run_id, digest, item)
  left join lateral (select * from {r} r where r.run_id = i.run_id offset 0) r on true
 order by i.item
