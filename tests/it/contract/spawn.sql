-- Spawns: options, idempotency keys, the rows of a new task, and `get_task_result`.
do $$
declare
  v_one record;
  v_two record;
  v_task uuid;
begin
  select * into v_one from absurd.spawn_task('q', 'n', null);
  perform pg_temp.eq((v_one.attempt, v_one.created)::text, '(1,t)');
  perform pg_temp.eq((select (t.task_name, t.params, t.headers, t.retry_strategy, t.max_attempts, t.cancellation,
                              t.enqueue_at, t.first_started_at, t.state, t.attempts, t.completed_payload,
                              t.cancelled_at, t.idempotency_key)::text
                        from absurd.t_q t where t.task_id = v_one.task_id),
                     '(n,null,,,,,"2026-01-01 00:00:00+00",,pending,1,,,)');
  perform pg_temp.eq(pg_temp.task(v_one.task_id, 'last_attempt_run'), v_one.run_id::text);
  perform pg_temp.eq((select (r.attempt, r.state, r.claimed_by, r.claim_expires_at, r.available_at, r.created_at)::text
                        from absurd.r_q r where r.run_id = v_one.run_id),
                     '(1,pending,,,"2026-01-01 00:00:00+00","2026-01-01 00:00:00+00")');
  perform pg_temp.fails($q$select absurd.spawn_task('q', null, '1')$q$);
  perform pg_temp.fails($q$select absurd.spawn_task('q', '  ', '1')$q$);
  perform absurd.spawn_task('q', E'\t', '1');
  perform pg_temp.fails($q$select pg_temp.spawn('{"max_attempts": 0}')$q$);
  perform pg_temp.fails($q$select pg_temp.spawn('{"max_attempts": 1.5}')$q$, '22P02');
  v_task := pg_temp.spawn('{"max_attempts": null, "headers": null, "cancellation": null, "colour": 1}');
  perform pg_temp.eq(pg_temp.task(v_task, 'headers'), 'null');
  perform pg_temp.eq(pg_temp.task(v_task, 'cancellation'), 'null');

  -- Keys: whoever comes first keeps it, whatever the second one wants.
  select * into v_one from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": "k"}');
  select * into v_two from absurd.spawn_task('q', 'other', '2', '{"idempotency_key": "k"}');
  perform pg_temp.eq((v_two.task_id, v_two.run_id, v_two.attempt, v_two.created)::text,
                     (v_one.task_id, v_one.run_id, 1, false)::text);
  select * into v_one from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": ""}');
  perform pg_temp.eq((select s.created from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": ""}') s), false);
  perform pg_temp.eq((select s.created from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": 5}') s), true);
  perform pg_temp.eq((select s.created from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": "5"}') s), false);
  perform pg_temp.eq((select s.created from absurd.spawn_task('q', 'n', '1', '{"idempotency_key": null}') s), true);

  perform absurd.create_queue('p', 'partitioned');
  select * into v_one from absurd.spawn_task('p', 'n', '1', '{"idempotency_key": "k"}');
  select * into v_two from absurd.spawn_task('p', 'n', '1', '{"idempotency_key": "k"}');
  perform pg_temp.eq((v_two.task_id, v_two.created)::text, (v_one.task_id, false)::text);
  perform pg_temp.eq(pg_temp.task(v_one.task_id, 'idempotency_key', 'p'), 'k');
  delete from absurd.t_p;
  perform pg_temp.fails($q$select pg_temp.spawn('{"idempotency_key": "k"}', 'p')$q$, '40001');

  -- Results.
  perform pg_temp.eq((select count(*)::integer from absurd.get_task_result('q', gen_random_uuid())), 0);
  perform pg_temp.eq((select (g.state, g.result, g.failure_reason)::text from absurd.get_task_result('q', v_task) g),
                     '(pending,,)');
  perform pg_temp.fails($q$select absurd.get_task_result('', gen_random_uuid())$q$);
end
$$;
