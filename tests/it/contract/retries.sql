-- Retries: `retry_delay_seconds`, `fail_run` and `retry_task`.
do $$
declare
  v_task uuid;
  v_run uuid;
  v_row record;
  v_bad text;
begin
  perform pg_temp.eq(absurd.retry_delay_seconds(null, 1), 0::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{}', 1), 0::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": null, "base_seconds": "x"}', 1), 0::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "none", "base_seconds": -5}', 1), 0::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "fixed"}', 7), 60::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "fixed", "base_seconds": "5", "factor": -1}', 1), 5::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "exponential"}', null), 30::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "exponential"}', 3), 120::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "exponential"}', 4000), 86400::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "exponential", "factor": 0.5}', 4000), 0::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "exponential", "base_seconds": 0}', 50), 0::float8);
  perform pg_temp.eq(absurd.retry_delay_seconds('{"kind": "exponential", "max_seconds": 50}', 9), 50::float8);
  foreach v_bad in array array['null', '5', '[]', '"fixed"', '{"kind": "Fixed"}', '{"kind": " fixed"}', '{"kind": 1}',
      '{"kind": "fixed", "base_seconds": -1}', '{"kind": "fixed", "base_seconds": 86401}',
      '{"kind": "fixed", "base_seconds": "NaN"}', '{"kind": "fixed", "base_seconds": true}',
      '{"kind": "fixed", "base_seconds": "x"}', '{"kind": "fixed", "base_seconds": 1e999}',
      '{"kind": "exponential", "factor": -1}', '{"kind": "exponential", "factor": "Infinity"}',
      '{"kind": "exponential", "base_seconds": 0, "factor": -1}', '{"kind": "exponential", "max_seconds": 86401}',
      '{"kind": "exponential", "max_seconds": {}}'] loop
    perform pg_temp.fails(format('select absurd.retry_delay_seconds(%L, 1)', v_bad), 'AB003');
    perform pg_temp.fails(format('select absurd.spawn_task(%L, %L, null, jsonb_build_object(%L, %L::jsonb))',
                                 'q', 'n', 'retry_strategy', v_bad), 'AB003');
  end loop;

  -- Due at once, due later, exhausted.
  v_task := pg_temp.spawn('{"max_attempts": 3, "retry_strategy": {"kind": "exponential", "base_seconds": 10}}');
  v_run := pg_temp.claim();
  perform absurd.fail_run('q', v_run, '{"name": "x"}', '2025-01-01');
  perform pg_temp.eq((pg_temp.task(v_task, 'state'), pg_temp.task(v_task, 'attempts'))::text, '(pending,2)');
  perform pg_temp.eq((pg_temp.run(v_run, 'state'), pg_temp.run(v_run, 'failure_reason'), pg_temp.run(v_run, 'claimed_by'),
                      pg_temp.run(v_run, 'claim_expires_at'))::text,
                     '(failed,"{""name"": ""x""}",w,"2026-01-01 00:00:30+00")', 'the lease stays as it was');
  v_run := pg_temp.claim();
  perform absurd.fail_run('q', v_run, null);
  perform pg_temp.eq((pg_temp.task(v_task, 'state'), pg_temp.task(v_task, 'attempts'))::text, '(sleeping,3)');
  v_run := pg_temp.task(v_task, 'last_attempt_run')::uuid;
  perform pg_temp.eq(pg_temp.run(v_run, 'available_at'), '2026-01-01 00:00:20+00', '10 * 2 ^ (2 - 1)');
  perform pg_temp.eq(pg_temp.claim(), null::uuid, 'not due');
  perform absurd.fail_run('q', v_run, '{"name": "early"}');
  perform pg_temp.eq((pg_temp.task(v_task, 'state'), pg_temp.task(v_task, 'attempts'))::text, '(failed,3)');
  perform pg_temp.eq((select g.failure_reason::text from absurd.get_task_result('q', v_task) g), '{"name": "early"}');
  perform pg_temp.fails(format('select absurd.fail_run(%L, %L, null)', 'q', v_run), 'AB002');
  perform pg_temp.fails(format('select absurd.complete_run(%L, %L)', 'q', v_run), 'AB002');
  perform pg_temp.fails(format('select absurd.fail_run(%L, %L, null)', 'q', gen_random_uuid()), 'P0001', '');

  -- In place.
  perform pg_temp.fails(format('select absurd.retry_task(%L, %L, %L)', 'q', v_task, '{"max_attempts": 3}'), 'P0001',
                        'must be greater than current attempts');
  perform pg_temp.fails(format('select absurd.retry_task(%L, %L, %L)', 'q', v_task, '{"max_attempts": 0}'));
  perform pg_temp.fails(format('select absurd.retry_task(%L, %L)', 'q', gen_random_uuid()));
  select * into v_row from absurd.retry_task('q', v_task);
  perform pg_temp.eq((v_row.task_id, v_row.attempt, v_row.created)::text, (v_task, 4, false)::text);
  perform pg_temp.eq((pg_temp.task(v_task, 'state'), pg_temp.task(v_task, 'attempts'), pg_temp.task(v_task, 'max_attempts'))::text,
                     '(pending,4,4)');
  perform pg_temp.fails(format('select absurd.retry_task(%L, %L)', 'q', v_task), 'P0001', '');
  perform absurd.fail_run('q', pg_temp.claim(), '1');

  -- As a new task.
  select * into v_row from absurd.retry_task('q', v_task, '{"spawn_new": true, "max_attempts": 9}');
  perform pg_temp.eq((v_row.task_id <> v_task, v_row.attempt, v_row.created)::text, '(t,1,t)');
  perform pg_temp.eq((pg_temp.task(v_row.task_id, 'max_attempts'), pg_temp.task(v_row.task_id, 'params'),
                      pg_temp.task(v_task, 'state'))::text, '(9,"{""a"": 1}",failed)');

  -- A stored strategy from before it was checked: no further attempt, no error.
  v_task := pg_temp.spawn('{"max_attempts": 5}');
  delete from absurd.r_q r where r.task_id <> v_task;
  update absurd.t_q t set retry_strategy = '{"kind": "fixed", "base_seconds": "x"}' where t.task_id = v_task;
  perform absurd.fail_run('q', pg_temp.claim(), '1');
  perform pg_temp.eq(pg_temp.task(v_task, 'state'), 'failed');
  perform pg_temp.fails(format('select absurd.retry_task(%L, %L, %L)', 'q', v_task, '{"spawn_new": true}'), 'AB003');
end
$$;
