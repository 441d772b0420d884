-- Runs whose lease has run out, but for those that are set aside; read without locks, decided again under the lock by run_fail.
select r.run_id
  from {r} r
 where r.state = 'running' and r.claim_expires_at is not null and r.claim_expires_at <= absurd.current_time()
   and not exists (select from absurd_server.quarantine q
                    where q.queue_name = $2::text and q.run_id = r.run_id and q.retry_at > absurd.current_time())
 order by r.claim_expires_at
 limit $1::bigint
