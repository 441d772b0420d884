-- Moves a run to a time.
select known, owned, state, expired, done, wake_at
  from absurd_server.schedule_run($1::text, $2::uuid, $3::text, $4::timestamptz, $5::bigint)
