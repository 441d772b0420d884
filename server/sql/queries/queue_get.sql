-- Whether a queue is registered, and whether its tables exist.
select (select q.storage_mode from absurd.queues q where q.queue_name = $1::text) as storage_mode,
       to_regclass(format('absurd.%I', 'r_' || $1::text)) is not null as usable,
       to_regclass(format('absurd.%I', 'i_' || $1::text)) is not null as keyed
