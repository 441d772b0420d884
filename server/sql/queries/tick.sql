-- One look at all queues of this replica that have streams.
select queue_name, missing, locked, problem, claimable, expired, cancellable, next_available_ms, next_expiry_ms, took_us,
       now_us, others, min_server
  from absurd_server.tick($1::text[], $2::text)
