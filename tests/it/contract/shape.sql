-- One line per thing in schema absurd.
select format('function %s(%s) %s immutable %s strict %s definer %s search path %s', p.proname,
              pg_get_function_arguments(p.oid), pg_get_function_result(p.oid), p.provolatile = 'i', p.proisstrict,
              p.prosecdef,
              (select c from unnest(p.proconfig) c where c like 'search_path%'))
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'absurd'
union all
select format('column %s.%s %s %s not null %s default %s', c.relname, a.attname, a.attnum,
              format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid))
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
  left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
 where n.nspname = 'absurd' and c.relkind in ('r', 'p')
union all
select format('constraint %s %s %s', k.conrelid::regclass, k.conname, pg_get_constraintdef(k.oid))
  from pg_constraint k join pg_namespace n on n.oid = k.connamespace where n.nspname = 'absurd'
union all
select 'index ' || indexdef from pg_indexes where schemaname = 'absurd'
union all
select format('table %s %s %s', c.relname, c.relkind, c.reloptions)
  from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'absurd' and c.relkind in ('r', 'p')
