-- Claims one run as run_claim would; always rolled back. Tells whether Postgres refuses that.
with clock as materialized (select absurd.current_time() as now),
     run as (
       update {r} r
          set state = 'running', claimed_by = $2::text, started_at = clock.now, available_at = clock.now,
              claim_expires_at = clock.now + interval '30 s'
         from clock
        where r.run_id = $1::uuid
       returning r.run_id, r.task_id, r.attempt)
update {t} t
   set state = 'running', attempts = greatest(t.attempts, run.attempt), last_attempt_run = run.run_id,
       first_started_at = coalesce(t.first_started_at, clock.now)
  from run cross join clock
 where t.task_id = run.task_id
