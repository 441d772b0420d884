-- One look at all queues of this replica that have streams.
select queue_name, missing, claimable, expired, cancellable, next_available_ms, next_expiry_ms, now_us, others
  from absurd_server.tick($1::text[], $2::text)
