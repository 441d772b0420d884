-- A queue whose tables, partitions or indexes would have the names of another one's.
-- Beside those, a relation that is there and is no table of the queue itself, such as an index of a partition: `create table if
-- not exists` would take it for one.
select q.queue_name, null as relation
  from absurd.queues q,
       lateral (select case when starts_with($1::text, q.queue_name || '_') then substr($1::text, length(q.queue_name) + 2) end,
                       case when starts_with(q.queue_name, $1::text || '_') then substr(q.queue_name, length($1::text) + 2) end)
               as tail (of_new, of_old)
 where coalesce(tail.of_new, tail.of_old)
         in ('sai', 'ti', 'cei', 'eni', 'eai', 'ci', 'coi', 'fai', 'cai', 'pkey', 'idempotency_key_key')
    or (q.storage_mode = 'partitioned' and tail.of_new ~ '^(d|[0-9]{3})$')
    or ($2::text = 'partitioned' and tail.of_old ~ '^(d|[0-9]{3})$')
union all
select null, c.relname::text
  from pg_catalog.pg_class c
 where c.relnamespace = to_regnamespace('absurd')
   and c.relname in ('t_' || $1::text, 'r_' || $1::text, 'c_' || $1::text, 'e_' || $1::text, 'w_' || $1::text, 'i_' || $1::text)
   and (c.relkind not in ('r', 'p') or c.relispartition)
 limit 1
