-- Cancellation: `cancel_task`, and the policies that `claim_task` and `fail_run` carry out.
do $$
declare
  v_task uuid;
  v_run uuid;
  v_late uuid;
begin
  v_task := pg_temp.spawn();
  v_run := pg_temp.claim();
  perform absurd.cancel_task('q', v_task);
  perform pg_temp.eq((pg_temp.task(v_task, 'state'), pg_temp.task(v_task, 'cancelled_at'))::text,
                     '(cancelled,"2026-01-01 00:00:00+00")');
  perform pg_temp.eq((select (r.state, r.claimed_by, r.claim_expires_at)::text from absurd.r_q r where r.run_id = v_run),
                     '(cancelled,,)');
  perform pg_temp.at('2026-01-01T00:00:09Z');
  perform absurd.cancel_task('q', v_task);
  perform pg_temp.eq(pg_temp.task(v_task, 'cancelled_at'), '2026-01-01 00:00:00+00', 'once');
  perform pg_temp.fails(format('select absurd.cancel_task(%L, %L)', 'q', gen_random_uuid()), 'P0001', 'not found');
  perform pg_temp.fails(format('select absurd.complete_run(%L, %L)', 'q', v_run), 'AB001', 'cancelled');
  perform pg_temp.fails(format('select absurd.fail_run(%L, %L, null)', 'q', v_run), 'AB001', 'cancelled');
  perform pg_temp.fails(format('select absurd.extend_claim(%L, %L, 5)', 'q', v_run), 'AB001', 'cancelled');
  perform pg_temp.fails(format('select absurd.set_task_checkpoint_state(%L, %L, %L, %L, %L)', 'q', v_task, 's', '1', v_run),
                        'AB001', 'cancelled');
  perform pg_temp.fails(format('select absurd.await_event(%L, %L, %L, %L, %L)', 'q', v_task, v_run, 's', 'e'), 'AB001',
                        'cancelled');
  perform pg_temp.fails(format('select absurd.retry_task(%L, %L)', 'q', v_task));

  -- Never claimed for too long; started too long ago; a retry that would come too late.
  v_task := pg_temp.spawn('{"cancellation": {"max_delay": 10}}');
  v_late := pg_temp.spawn('{"cancellation": {"max_duration": 20}, "max_attempts": 5}');
  perform pg_temp.at('2026-01-01T00:00:19Z');
  v_run := pg_temp.claim();
  perform pg_temp.eq(pg_temp.task(v_task, 'state'), 'cancelled');
  perform pg_temp.eq(pg_temp.run(v_run, 'task_id'), v_late::text);
  perform absurd.fail_run('q', v_run, '1', '2026-01-01T00:00:39Z');
  perform pg_temp.eq((pg_temp.task(v_late, 'state'), pg_temp.task(v_late, 'attempts'))::text, '(cancelled,1)');
  perform pg_temp.eq(pg_temp.run(v_run, 'state'), 'failed');
  v_late := pg_temp.spawn('{"cancellation": {"max_duration": 20}}');
  v_run := pg_temp.claim();
  perform pg_temp.at('2026-01-01T00:00:39Z');
  perform pg_temp.claim();
  perform pg_temp.eq((pg_temp.task(v_late, 'state'), pg_temp.run(v_run, 'state'))::text, '(cancelled,cancelled)');

  -- A task that is exhausted fails, however late.
  v_late := pg_temp.spawn('{"cancellation": {"max_duration": 20}, "max_attempts": 1}');
  v_run := pg_temp.claim();
  perform pg_temp.at('2026-01-01T00:09:00Z');
  perform absurd.fail_run('q', v_run, '1');
  perform pg_temp.eq(pg_temp.task(v_late, 'state'), 'failed');

  -- No object: no effect.
  v_task := pg_temp.spawn('{"cancellation": null}');
  perform pg_temp.eq(pg_temp.claim() is not null, true);
end
$$;
