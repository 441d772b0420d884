-- Those of these queues on which the doorbell does not hang, or only in part.
select q.queue_name
  from unnest($1::text[]) as q (queue_name)
 where to_regclass(format('absurd.%I', 'r_' || q.queue_name)) is not null
   and 2 > (select count(*) from pg_catalog.pg_trigger g
             where g.tgname = 'absurd_server_doorbell'
               and g.tgrelid in (to_regclass(format('absurd.%I', 'r_' || q.queue_name)),
                                 to_regclass(format('absurd.%I', 'e_' || q.queue_name))))
