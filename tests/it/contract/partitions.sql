-- Weekly partitions: their window, the default partition, detaching and dropping.
do $$
declare
  v_found integer;
begin
  perform absurd.create_queue('p', 'partitioned');
  -- The window at 2026-01-01: from Monday 2025-12-29 over 28 days.
  perform pg_temp.eq((select array_agg(c.relname::text order by c.relname) from pg_inherits i join pg_class c on c.oid = i.inhrelid
                       where i.inhparent = 'absurd.t_p'::regclass),
                     array['t_p_601', 't_p_602', 't_p_603', 't_p_604', 't_p_605', 't_p_d']);
  perform pg_temp.eq((select pg_get_expr(c.relpartbound, c.oid) from pg_class c where c.oid = 'absurd.r_p_602'::regclass),
                     format('FOR VALUES FROM (''%s'') TO (''%s'')', absurd.uuidv7_floor('2026-01-05'),
                            absurd.uuidv7_floor('2026-01-12')));
  perform pg_temp.eq((select pg_get_expr(c.relpartbound, c.oid) from pg_class c where c.oid = 'absurd.w_p_d'::regclass),
                     'DEFAULT');
  perform pg_temp.eq((select string_agg(c.relkind::text, '' order by c.relname) from pg_class c
                       where c.oid in ('absurd.e_p'::regclass, 'absurd.i_p'::regclass, 'absurd.t_p'::regclass)), 'rrp');
  perform pg_temp.spawn('{}', 'p');
  perform pg_temp.eq(pg_temp.count_rows('t_p_601'), 1::bigint);

  -- The window moves; what is outside goes to the default partition while there is one.
  perform pg_temp.at('2026-01-12T00:00:00Z');
  perform absurd.ensure_partitions('p');
  perform pg_temp.eq(to_regclass('absurd.c_p_607') is not null, true);
  perform absurd.ensure_partitions('q');
  perform pg_temp.fails($q$select absurd.ensure_partitions('nowhere')$q$);
  perform pg_temp.at('2026-06-01T00:00:00Z');
  perform pg_temp.spawn('{}', 'p');
  perform pg_temp.eq(pg_temp.count_rows('t_p_d'), 1::bigint);
  perform pg_temp.fails($q$select absurd.set_queue_policy('p', '{"default_partition": "disabled"}')$q$);
  delete from absurd.t_p_d;
  delete from absurd.r_p_d;
  perform absurd.set_queue_policy('p', '{"default_partition": "disabled"}');
  perform pg_temp.eq(to_regclass('absurd.t_p_d') is null, true);
  perform pg_temp.fails($q$select pg_temp.spawn('{}', 'p')$q$, '23514');
  perform absurd.set_queue_policy('p', '{"default_partition": "enabled"}');
  perform pg_temp.spawn('{}', 'p');
  perform pg_temp.eq(to_regclass('absurd.t_p_d') is not null, true);

  -- Detaching what is empty and old.
  perform pg_temp.eq((select count(*)::integer from absurd.list_detach_candidates('p')), 0, 'off by default');
  perform absurd.set_queue_policy('p', '{"detach_mode": "empty", "detach_min_age": "100 days"}');
  perform pg_temp.fails($q$select absurd.list_detach_candidates('nowhere')$q$);
  perform pg_temp.eq((select array_agg(l.parent_table || ' ' || l.partition_table) from absurd.list_detach_candidates() l
                       where l.queue_name = 'p' and l.partition_table like '%60_'),
                     array['t_p t_p_602', 't_p t_p_603', 't_p t_p_604', 't_p t_p_605', 't_p t_p_606', 't_p t_p_607',
                           'r_p r_p_602', 'r_p r_p_603', 'r_p r_p_604', 'r_p r_p_605', 'r_p r_p_606', 'r_p r_p_607',
                           'c_p c_p_601', 'c_p c_p_602', 'c_p c_p_603', 'c_p c_p_604', 'c_p c_p_605', 'c_p c_p_606', 'c_p c_p_607',
                           'w_p w_p_601', 'w_p w_p_602', 'w_p w_p_603', 'w_p w_p_604', 'w_p w_p_605', 'w_p w_p_606', 'w_p w_p_607'],
                     't_p_601 and r_p_601 hold a task');
  perform pg_temp.fails($q$select absurd.drop_detached_partition(' ')$q$);
  perform pg_temp.eq(absurd.drop_detached_partition('t_p_602'), false, 'still attached');
  alter table absurd.t_p detach partition absurd.t_p_602;
  perform pg_temp.eq(absurd.drop_detached_partition('t_p_602'), true);
  perform pg_temp.eq(absurd.drop_detached_partition('t_p_602'), false, 'gone');

  perform absurd.drop_queue('p');
  select count(*) into v_found from pg_class c join pg_namespace n on n.oid = c.relnamespace
   where n.nspname = 'absurd' and c.relname like '__p%' and c.relkind in ('r', 'p') and c.relname not like '%queue%';
  perform pg_temp.eq(v_found, 0);
end
$$;
