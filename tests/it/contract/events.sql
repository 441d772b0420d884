-- Events: `await_event` and `emit_event`, wakes, timeouts, and the rows that they leave.
do $$
declare
  v_task uuid;
  v_run uuid;
  v_row record;
begin
  v_task := pg_temp.spawn();
  v_run := pg_temp.claim();
  perform pg_temp.fails(format('select absurd.await_event(%L, %L, %L, %L, %L)', 'q', v_task, v_run, 's', ' '));
  perform pg_temp.fails(format('select absurd.await_event(%L, %L, %L, %L, %L, -1)', 'q', v_task, v_run, 's', 'e'));
  perform pg_temp.fails($q$select absurd.emit_event('q', null)$q$);

  -- Waiting, woken, stored.
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 's', 'e') a), '(t,)');
  perform pg_temp.eq((select (r.state, r.claimed_by, r.claim_expires_at, r.available_at, r.wake_event, r.event_payload)::text
                        from absurd.r_q r where r.run_id = v_run), '(sleeping,,,infinity,e,)');
  perform pg_temp.eq((select (e.payload, e.emitted_at)::text from absurd.e_q e where e.event_name = 'e'),
                     '(,"1970-01-01 00:00:00+00")');
  perform pg_temp.eq((select (w.task_id, w.run_id, w.step_name, w.event_name, w.timeout_at)::text from absurd.w_q w),
                     (v_task, v_run, 's', 'e', null)::text);
  perform absurd.emit_event('q', 'e', '{"p": 1}');
  perform absurd.emit_event('q', 'e', '{"p": 2}');
  perform pg_temp.eq((select (r.state, r.available_at, r.wake_event, r.event_payload)::text
                        from absurd.r_q r where r.run_id = v_run), '(pending,"2026-01-01 00:00:00+00",,"{""p"": 1}")');
  perform pg_temp.eq(pg_temp.count_rows('w_q'), 0::bigint);
  perform pg_temp.eq(pg_temp.task(v_task, 'state'), 'pending');
  perform pg_temp.eq((select (g.state, g.owner_run_id)::text from absurd.get_task_checkpoint_state('q', v_task, 's') g),
                     ('{"p": 1}'::jsonb, v_run)::text);
  select * into v_row from absurd.claim_task('q', 'w');
  perform pg_temp.eq((v_row.wake_event, v_row.event_payload)::text, '(,"{""p"": 1}")');
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 's', 'e') a), '(f,"{""p"": 1}")');
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 's2', 'e') a), '(f,"{""p"": 1}")');
  perform pg_temp.eq(pg_temp.run(v_run, 'event_payload'), null::text);
  perform absurd.emit_event('q', 'nothing');
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 's3', 'nothing') a), '(f,null)');

  -- Timeouts: the signal is in the run, once, for any step of that event.
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 's4', 'late', 10) a), '(t,)');
  perform pg_temp.eq(pg_temp.claim(), null::uuid);
  perform pg_temp.at('2026-01-01T00:00:10Z');
  perform absurd.emit_event('q', 'late', '1');
  perform pg_temp.eq(pg_temp.run(v_run, 'state'), 'sleeping', 'its time was over');
  select * into v_row from absurd.claim_task('q', 'w');
  perform pg_temp.eq((v_row.run_id, v_row.wake_event, v_row.event_payload)::text, (v_run, 'late', null)::text);

  v_task := pg_temp.spawn();
  v_run := pg_temp.claim();
  perform absurd.await_event('q', v_task, v_run, 's', 'never', 0);
  select * into v_row from absurd.claim_task('q', 'w');
  perform pg_temp.eq(v_row.wake_event, 'never');
  perform pg_temp.eq(pg_temp.count_rows('w_q'), 0::bigint, 'the wait row went with the claim');
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 'other step', 'never', 5) a), '(f,)');
  perform pg_temp.eq((pg_temp.run(v_run, 'wake_event'), pg_temp.run(v_run, 'state'))::text, '(,running)');
  perform pg_temp.eq((select a::text from absurd.await_event('q', v_task, v_run, 's', 'never', 5) a), '(t,)');
  perform pg_temp.fails(format('select absurd.await_event(%L, %L, %L, %L, %L)', 'q', v_task, v_run, 'x', 'other'));
  perform pg_temp.fails(format('select absurd.await_event(%L, %L, %L, %L, %L)', 'q', v_task, gen_random_uuid(), 'x', 'o'));

  -- A failed run leaves no wait behind.
  perform absurd.fail_run('q', v_run, '1');
  perform pg_temp.eq(pg_temp.count_rows('w_q'), 0::bigint);
end
$$;
