-- Cleanup: age, order and limit; runs, checkpoints and keys go with their task.
do $$
declare
  v_done uuid;
  v_failed uuid;
  v_gone uuid;
  v_live uuid;
begin
  -- They end in another order than they were spawned and claimed: the cancelled one, the failed one, the completed one.
  v_done := pg_temp.spawn('{"idempotency_key": "k"}');
  perform absurd.set_task_checkpoint_state('q', v_done, 's', '1', pg_temp.claim());
  v_failed := pg_temp.spawn('{"max_attempts": 2}');
  perform absurd.fail_run('q', pg_temp.claim(), '1');
  v_failed := pg_temp.claim();
  v_gone := pg_temp.spawn();
  perform pg_temp.at('2026-01-01T00:00:01Z');
  perform absurd.cancel_task('q', v_gone);
  perform pg_temp.at('2026-01-01T00:00:02Z');
  perform absurd.fail_run('q', v_failed, '1');
  perform pg_temp.at('2026-01-01T00:00:03Z');
  perform absurd.complete_run('q', pg_temp.task(v_done, 'last_attempt_run')::uuid, '1');
  v_live := pg_temp.spawn();
  perform pg_temp.at('2026-01-01T00:00:13Z');
  perform pg_temp.fails($q$select absurd.cleanup_tasks('q', -1)$q$);
  perform pg_temp.fails($q$select absurd.cleanup_tasks('q', null)$q$);
  perform pg_temp.fails($q$select absurd.cleanup_tasks('q', 0, -1)$q$, '2201W');
  perform pg_temp.eq(absurd.cleanup_tasks('q', 12), 0, 'strictly older');
  perform pg_temp.eq(absurd.cleanup_tasks('q', 5, 1), 1);
  perform pg_temp.eq((select array_agg(t.state order by t.state) from absurd.t_q t), array['completed', 'failed', 'pending'],
                     'the oldest end first');
  perform pg_temp.eq(absurd.cleanup_tasks('q', 5, 1), 1);
  perform pg_temp.eq((select array_agg(t.state order by t.state) from absurd.t_q t), array['completed', 'pending']);
  perform pg_temp.eq((select absurd.cleanup_tasks('q', 5, null)), 1);
  perform pg_temp.eq((pg_temp.count_rows('t_q'), pg_temp.count_rows('r_q'), pg_temp.count_rows('c_q'))::text, '(1,1,0)');
  perform pg_temp.eq((select s.created from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": "k"}') s), true);

  perform absurd.emit_event('q', 'e', '1');
  insert into absurd.e_q (event_name, emitted_at) values ('placeholder', 'epoch');
  perform pg_temp.at('2026-01-01T00:00:20Z');
  perform pg_temp.eq(absurd.cleanup_events('q', 7, 1), 1);
  perform pg_temp.eq((select array_agg(e.event_name) from absurd.e_q e), array['e'], 'placeholders first');
  perform pg_temp.eq(absurd.cleanup_events('q', 7), 0, 'strictly older');
  perform pg_temp.eq(absurd.cleanup_events('q', 6), 1);
  perform pg_temp.fails($q$select absurd.cleanup_events('q', -1)$q$);

  perform absurd.create_queue('p', 'partitioned');
  v_done := pg_temp.spawn('{"idempotency_key": "k"}', 'p');
  perform absurd.complete_run('p', pg_temp.claim('p'), '1');
  perform absurd.emit_event('p', 'e');
  perform pg_temp.at('2026-03-01T00:00:00Z');
  perform pg_temp.fails($q$select absurd.cleanup_all_queues('nowhere')$q$);
  perform pg_temp.eq((select array_agg(c::text) from absurd.cleanup_all_queues() c where c.queue_name in ('p', 'q')),
                     array['(p,1,1)', '(q,0,0)']);
  perform pg_temp.eq(pg_temp.count_rows('i_p'), 0::bigint);
end
$$;
