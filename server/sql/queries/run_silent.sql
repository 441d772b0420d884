-- Which claims have left no trace since they were made: neither a later end of their lease nor a step; one row per item.
-- The worker may have spoken to another replica.
select i.item,
       coalesce(r.state = 'running' and right(r.claimed_by, 23) = '#' || i.digest, false)
       and r.claim_expires_at is not distinct from i.expires_at
       and not exists (select from {c} c
                        where c.task_id = r.task_id and c.owner_run_id = r.run_id
                          and c.updated_at >= coalesce(i.expires_at - i.lease_seconds * interval '1 second', r.started_at))
       as silent
  from unnest($1::uuid[],         -- runs
              $2::text[],         -- digests
              $3::timestamptz[],  -- ends of the leases as of the claim; null: never
              $4::integer[])      -- leases in seconds
       with ordinality as i (run_id, digest, expires_at, lease_seconds, item)
  left join lateral (select * from {r} r where r.run_id = i.run_id offset 0) r on true
 order by i.item
