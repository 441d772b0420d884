-- Queues that exist get what a newer version of their tables has. Nothing is done where nothing is missing.

select absurd.create_queue(q.queue_name, q.storage_mode)
  from absurd.queues q
 where octet_length(q.queue_name) <= 57 and to_regclass(format('absurd.%I', 't_' || q.queue_name)) is not null;
