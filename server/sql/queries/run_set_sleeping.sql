-- Puts a run to sleep until an event.
select known, owned, state, expired, done, wake_at
  from absurd_server.set_run_sleeping($1::text, $2::uuid, $3::text, $4::text)
