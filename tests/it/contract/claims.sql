-- Claims: their order, rows and leases; `complete_run`, `extend_claim` and `schedule_run`.
do $$
declare
  v_task uuid;
  v_run uuid;
  v_row record;
  v_runs uuid[];
begin
  -- What a claim returns and writes.
  v_task := pg_temp.spawn('{"max_attempts": 2, "headers": {"h": 1}, "retry_strategy": {"kind": "none"}}');
  perform pg_temp.at('2026-01-01T00:00:05Z');
  select * into v_row from absurd.claim_task('q', '', null, 0);
  v_run := v_row.run_id;
  perform pg_temp.eq((v_row.task_id, v_row.attempt, v_row.task_name, v_row.params, v_row.retry_strategy,
                      v_row.max_attempts, v_row.headers, v_row.wake_event, v_row.event_payload)::text,
                     (v_task, 1, 'n', '{"a": 1}'::jsonb, '{"kind": "none"}'::jsonb, 2, '{"h": 1}'::jsonb, null, null)::text);
  perform pg_temp.eq((select (r.state, r.claimed_by, r.claim_expires_at, r.available_at, r.started_at)::text
                        from absurd.r_q r where r.run_id = v_run),
                     '(running,worker,"2026-01-01 00:00:35+00","2026-01-01 00:00:05+00","2026-01-01 00:00:05+00")');
  perform pg_temp.eq((pg_temp.task(v_task, 'state'), pg_temp.task(v_task, 'first_started_at'))::text,
                     '(running,"2026-01-01 00:00:05+00")');
  perform absurd.complete_run('q', v_run, '{"x": 1}');
  perform pg_temp.eq((select (r.state, r.result, r.completed_at, r.claimed_by, r.claim_expires_at)::text
                        from absurd.r_q r where r.run_id = v_run),
                     '(completed,"{""x"": 1}","2026-01-01 00:00:05+00",worker,"2026-01-01 00:00:35+00")');
  perform pg_temp.eq((select (g.state, g.result)::text from absurd.get_task_result('q', v_task) g),
                     '(completed,"{""x"": 1}")');
  perform pg_temp.fails(format('select absurd.complete_run(%L, %L)', 'q', v_run), 'P0001');
  perform pg_temp.fails(format('select absurd.fail_run(%L, %L, null)', 'q', v_run), 'P0001');
  perform pg_temp.fails(format('select absurd.complete_run(%L, %L)', 'q', gen_random_uuid()), 'P0001');

  -- Order: by time, then by id; a lease of 0 never ends.
  perform pg_temp.spawn() from generate_series(1, 20);
  perform pg_temp.at('2026-01-01T00:00:06Z');
  perform pg_temp.spawn();
  select array_agg(c.run_id) into v_runs from absurd.claim_task('q', 'w', 0, 21) c;
  perform pg_temp.eq(v_runs[1:20], (select array_agg(r.run_id order by r.run_id) from absurd.r_q r
                                     where r.created_at = '2026-01-01T00:00:05Z' and r.state = 'running'));
  perform pg_temp.eq(pg_temp.run(v_runs[1], 'claim_expires_at'), null::text);
  perform pg_temp.fails(format('select absurd.extend_claim(%L, %L, 5)', 'q', v_runs[1]), 'P0001');
  perform pg_temp.at('2030-01-01T00:00:00Z');
  perform pg_temp.eq(pg_temp.claim(), null::uuid);
  perform absurd.complete_run('q', r) from unnest(v_runs) r;

  -- One at a time, ties by id as well.
  perform pg_temp.spawn() from generate_series(1, 5);
  v_runs := '{}';
  for i in 1 .. 5 loop
    v_runs := v_runs || pg_temp.claim();
  end loop;
  perform pg_temp.eq(v_runs, (select array_agg(r order by r) from unnest(v_runs) r));
  perform absurd.complete_run('q', r) from unnest(v_runs) r;

  -- Leases: extended, expired, at most as many as are claimed.
  perform pg_temp.spawn('{"max_attempts": 2}') from generate_series(1, 3);
  select array_agg(c.run_id) into v_runs from absurd.claim_task('q', 'w', 10, 3) c;
  perform absurd.extend_claim('q', v_runs[1], 60);
  perform pg_temp.eq(pg_temp.run(v_runs[1], 'claim_expires_at'), '2030-01-01 00:01:00+00');
  perform pg_temp.fails(format('select absurd.extend_claim(%L, %L, 0)', 'q', v_runs[1]), 'P0001', 'extend_by must be > 0');
  perform pg_temp.fails(format('select absurd.extend_claim(%L, %L, null)', 'q', v_runs[1]), 'P0001', 'extend_by must be > 0');
  perform pg_temp.fails(format('select absurd.extend_claim(%L, %L, 5)', 'q', gen_random_uuid()), 'P0001', 'not found');
  perform pg_temp.at('2030-01-01T00:00:10Z');
  select * into v_row from absurd.claim_task('q', 'w2', 30, 1);
  perform pg_temp.eq(v_row.attempt, 2, 'the next attempt comes with the same call when the clock stands');
  perform pg_temp.eq((select count(*)::integer from absurd.r_q r where r.state = 'failed'), 1);
  select r.failure_reason into v_row from absurd.r_q r where r.state = 'failed';
  perform pg_temp.eq((v_row.failure_reason ->> 'name', v_row.failure_reason ->> 'workerId',
                      v_row.failure_reason ->> 'attempt',
                      (v_row.failure_reason ->> 'claimExpiredAt')::timestamptz)::text,
                     '($ClaimTimeout,w,1,"2030-01-01 00:00:10+00")');
  select r.run_id into v_run from absurd.r_q r where r.state = 'failed';
  perform pg_temp.fails(format('select absurd.extend_claim(%L, %L, 5)', 'q', v_run), 'AB002');
  perform pg_temp.fails(format('select absurd.extend_claim(%L, r.run_id, 5) from absurd.r_q r where r.state = %L limit 1',
                               'q', 'completed'), 'P0001', 'not currently running');

  -- Sleeping.
  v_run := v_runs[1];
  perform absurd.schedule_run('q', v_run, '2030-01-01T00:01:00Z');
  perform pg_temp.eq((select (r.state, r.claimed_by, r.claim_expires_at, r.available_at)::text
                        from absurd.r_q r where r.run_id = v_run), '(sleeping,,,"2030-01-01 00:01:00+00")');
  perform pg_temp.fails(format('select absurd.schedule_run(%L, %L, now())', 'q', v_run), 'P0001');
  perform pg_temp.at('2030-01-01T00:01:00Z');
  select array_agg(c.run_id) into v_runs from absurd.claim_task('q', 'w', 30, 10) c;
  perform pg_temp.eq(v_run = any (v_runs), true);
  perform pg_temp.eq(pg_temp.run(v_run, 'started_at'), '2030-01-01 00:01:00+00', 'started again');
  perform pg_temp.fails(format('select absurd.schedule_run(%L, %L, null)', 'q', v_run), '23502');
end
$$;
