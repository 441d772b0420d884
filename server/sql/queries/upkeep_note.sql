-- How a queue's round went. Queues that are gone leave nothing behind.
with gone as (
  delete from absurd_server.upkeep u where not exists (select from absurd.queues q where q.queue_name = u.queue_name))
update absurd_server.upkeep u
   set tasks_deleted = $2::bigint, events_deleted = $3::bigint, partitions_dropped = $4::integer, problem = $5::text
 where u.queue_name = $1::text
