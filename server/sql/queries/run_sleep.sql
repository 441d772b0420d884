-- Sleeps as a step of a run, so long or until a time; no time to wake at means that it is over.
select known, owned, state, expired, done, wake_at
  from absurd_server.sleep_run(
         $1::text, $2::uuid, $3::text, $4::text,
         coalesce($5::bigint, greatest(0, ceil(extract(epoch from $6::timestamptz - absurd.current_time()) * 1000))::bigint))
