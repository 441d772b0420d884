with task as (
  insert into tasks (task_id, task_name, params, enqueue_at, state, attempts, last_attempt_run)
  values (gen_random_uuid(), 'noop', '{"id": 1, "pad": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "t": 0}',
          now(), 'pending', 1, gen_random_uuid())
  returning task_id, last_attempt_run)
insert into runs (run_id, task_id, attempt, state, available_at)
select last_attempt_run, task_id, 1, 'pending', now() from task;
