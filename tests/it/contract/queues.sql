-- Queues: names, creation, removal, listing and policies.
do $$
declare
  v_name text;
  v_count integer;
begin
  foreach v_name in array array['queue-1', 'UpperCase', 'bad space', '_bad', '-bad', 'bad''quote', ' ', repeat('x', 57),
                                repeat('ü', 28)] loop
    perform absurd.create_queue(v_name);
    perform absurd.create_queue(v_name);
    perform absurd.spawn_task(v_name, 'n', null);
    select count(*) into v_count from pg_tables where schemaname = 'absurd' and tablename like '__%'
       and substr(tablename, 3) = v_name;
    perform pg_temp.eq(v_count, 5, v_name);
  end loop;
  perform pg_temp.fails($q$select absurd.create_queue(repeat('x', 58))$q$, 'P0001', 'too long');
  perform pg_temp.fails($q$select absurd.create_queue(repeat('ü', 29))$q$, 'P0001', 'too long');
  perform pg_temp.fails($q$select absurd.create_queue('')$q$, 'P0001', 'Queue name must be provided');
  perform pg_temp.fails($q$select absurd.create_queue(null)$q$, 'P0001', 'Queue name must be provided');
  perform pg_temp.fails($q$select absurd.create_queue('z', 'odd')$q$);
  perform pg_temp.fails($q$select absurd.create_queue('z', null)$q$);
  perform absurd.create_queue('p', ' Partitioned ');
  perform pg_temp.fails($q$select absurd.create_queue('p')$q$);
  perform absurd.create_queue('p', 'partitioned');
  perform pg_temp.eq((select array_agg(l.queue_name) from absurd.list_queues() l where l.queue_name in ('p', 'q')),
                     array['p', 'q']);

  perform absurd.drop_queue('queue-1');
  perform absurd.drop_queue('queue-1');
  perform absurd.drop_queue(repeat('y', 70));
  perform pg_temp.eq(to_regclass('absurd."t_queue-1"')::text, null::text);
  perform pg_temp.fails($q$select absurd.spawn_task('queue-1', 'n', '1')$q$, '42P01');
  perform pg_temp.fails($q$select absurd.spawn_task(null, 'n', '1')$q$, '22004');

  perform pg_temp.eq((select count(*)::integer from absurd.get_queue_policy('nowhere')), 0);
  perform pg_temp.eq((select (p.storage_mode, p.default_partition, p.partition_lookahead, p.partition_lookback,
                              p.cleanup_ttl, p.cleanup_limit, p.detach_mode, p.detach_min_age)::text
                        from absurd.get_queue_policy('q') p),
                     '(unpartitioned,enabled,"28 days","1 day","30 days",1000,none,"30 days")');
  perform absurd.set_queue_policy('q', null);
  perform absurd.set_queue_policy('q', '{"cleanup_ttl": 5, "cleanup_limit": 7, "detach_mode": " Empty "}');
  perform pg_temp.eq((select (p.cleanup_ttl, p.cleanup_limit, p.detach_mode)::text from absurd.get_queue_policy('q') p),
                     '(00:00:05,7,empty)');
  perform pg_temp.fails($q$select absurd.set_queue_policy('', '{}')$q$);
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', 'null')$q$);
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"colour": 1}')$q$, 'P0001', 'colour');
  perform pg_temp.fails($q$select absurd.set_queue_policy('nowhere', '{}')$q$);
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"cleanup_ttl": "soon"}')$q$, '22007');
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"cleanup_limit": "x"}')$q$, '22P02');
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"cleanup_limit": 0}')$q$);
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"cleanup_ttl": "-1 day"}')$q$);
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"cleanup_ttl": null}')$q$, '23502');
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"detach_mode": null}')$q$);
  perform pg_temp.fails($q$select absurd.set_queue_policy('q', '{"default_partition": "enabled"}')$q$);
  perform pg_temp.eq((select p.cleanup_limit from absurd.get_queue_policy('q') p), 7, 'nothing is half-written');

  -- Queues that are not registered work; a registry row alone is enough of a row.
  delete from absurd.queues where queue_name = 'q';
  perform absurd.spawn_task('q', 'n', '1');
  perform pg_temp.eq(pg_temp.claim() is not null, true);
  insert into absurd.queues (queue_name) values ('only a row');
end
$$;
