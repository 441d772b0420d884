-- Sleeps as a step of a run; no time to wake at means that it is over.
select known, owned, state, expired, done, wake_at
  from absurd_server.sleep_run($1::text, $2::uuid, $3::text, $4::text, $5::bigint)
