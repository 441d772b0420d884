-- Waits for the end of a task as a step of a run, or says what came of it.
select found_task, known, owned, state, expired, outcome, payload, wake_at
  from absurd_server.await_task($1::text, $2::uuid, $3::text, $4::text, $5::text, $6::uuid, $7::bigint)
