-- Queues without tables, and tables without a queue.
select coalesce(q.queue_name, substr(c.relname, 3)) as queue_name, c.oid is null as no_tables, q.queue_name is null as no_row
  from absurd.queues q
  full join (select c.oid, c.relname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
              where n.nspname = 'absurd' and c.relkind in ('r', 'p') and not c.relispartition and starts_with(c.relname, 't_')) c
       on c.relname = 't_' || q.queue_name
 where c.oid is null or q.queue_name is null
 order by 1
