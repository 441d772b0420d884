-- A run.
select r.run_id, r.task_id, r.attempt, r.state, regexp_replace(r.claimed_by, '#[A-Za-z0-9_-]{22}$', '') as claimed_by,
       r.claim_expires_at, r.available_at, r.wake_event, r.event_payload, r.started_at, r.completed_at, r.failed_at,
       r.result, r.failure_reason, r.created_at
  from {r} r
 where r.run_id = $1::uuid
