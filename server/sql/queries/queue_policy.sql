-- How a queue is kept.
select storage_mode, default_partition, cleanup_limit, detach_mode,
       extract(epoch from partition_lookahead)::float8 as partition_lookahead,
       extract(epoch from partition_lookback)::float8 as partition_lookback,
       extract(epoch from cleanup_ttl)::float8 as cleanup_ttl,
       extract(epoch from detach_min_age)::float8 as detach_min_age
  from absurd.get_queue_policy($1::text)
