-- Tables of queues that the role of the server may not use in full: rights, row security, triggers of others, tables missing.
select q.queue_name, k.kind, c.oid is null as missing,
       array(select p from unnest(array['select', 'insert', 'update', 'delete']) p
              where c.oid is not null and not has_table_privilege(c.oid, p)) as lacks,
       c.oid is not null and row_security_active(c.oid) as row_security,
       array(select t.tgname::text from pg_catalog.pg_trigger t
              where t.tgrelid = c.oid and not t.tgisinternal and t.tgname <> 'absurd_server_doorbell'
                and t.tgenabled <> 'D') as triggers
  from absurd.queues q
 cross join unnest(array['t', 'r', 'c', 'e', 'w']) k(kind)
  left join pg_catalog.pg_class c
    on c.relname = k.kind || '_' || q.queue_name and c.relnamespace = to_regnamespace('absurd')
 order by 1, 2
