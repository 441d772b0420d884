-- Waits for an event as a step of a run, or says what came of it.
select known, owned, state, expired, task_id, outcome, payload, wake_at
  from absurd_server.await_event($1::text, $2::uuid, $3::text, $4::text, $5::text, $6::bigint)
