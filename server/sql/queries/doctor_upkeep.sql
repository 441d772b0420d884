-- Queues, and how the last round of upkeep went.
select q.queue_name, q.storage_mode, u.ran_at, u.tasks_deleted, u.events_deleted, u.partitions_dropped, u.problem
  from absurd.queues q left join absurd_server.upkeep u on u.queue_name = q.queue_name
 order by q.queue_name
