-- Takes queues whose last round is long ago, oldest first; a queue that another replica takes is not taken twice.
with due as (
  select q.queue_name
    from absurd.queues q left join absurd_server.upkeep u on u.queue_name = q.queue_name
   where u.queue_name is null or u.ran_at < clock_timestamp() - make_interval(secs => $1::float8)
   order by u.ran_at nulls first, q.queue_name
   limit $2::bigint)
insert into absurd_server.upkeep as u (queue_name, ran_at)
select due.queue_name, clock_timestamp() from due
    on conflict (queue_name) do update set ran_at = excluded.ran_at
 where u.ran_at < excluded.ran_at - make_interval(secs => $1::float8)
returning u.queue_name
