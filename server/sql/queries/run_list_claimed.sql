-- Finds what a claim statement took whose answer was lost, by the full claimed_by values that it wrote.
select r.run_id, r.claimed_by
  from {r} r
 where r.state = 'running' and r.available_at >= $2::timestamptz  -- no later than the lost claim's start
   and r.claimed_by = any ($1::text[])
