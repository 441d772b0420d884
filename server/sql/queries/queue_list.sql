-- A page of queues by name.
select q.queue_name, q.storage_mode, q.created_at
  from absurd.queues q
 where q.queue_name > $1::text
 order by q.queue_name
 limit $2::bigint
