-- Runs whose lease has run out; read without locks, decided again under the lock by run_fail.
select r.run_id
  from {r} r
 where r.state = 'running' and r.claim_expires_at is not null and r.claim_expires_at <= absurd.current_time()
 order by r.claim_expires_at
 limit $1::bigint offset $2::bigint
