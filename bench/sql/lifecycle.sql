with ids as materialized (select gen_random_uuid() as task_id, gen_random_uuid() as run_id from generate_series(1, :batch)),
     task as (
       insert into tasks (task_id, task_name, params, enqueue_at, state, attempts, last_attempt_run)
       select task_id, 'noop', '{"id": 1, "pad": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "t": 0}',
              now(), 'pending', 1, run_id from ids)
insert into runs (run_id, task_id, attempt, state, available_at) select run_id, task_id, 1, 'pending', now() from ids;
with due as (
       select run_id from runs where state = 'pending' and available_at <= now()
        order by available_at limit :batch for update skip locked),
     run as (
       update runs set state = 'running', claimed_by = 'w', claim_expires_at = now() + interval '30 s', started_at = now()
         from due where runs.run_id = due.run_id
       returning runs.run_id, runs.task_id),
     task as (
       update tasks set state = 'running', first_started_at = now() from run where tasks.task_id = run.task_id
       returning tasks.task_id, tasks.params)
select coalesce(array_agg(run_id), '{}')::text as ids, count(params) as claimed from run join task using (task_id) \gset
with run as (
       update runs set state = 'completed', completed_at = now(), result = '{"ok": true}'
        where run_id = any ((:ids)::uuid[]) and state = 'running'
       returning task_id)
update tasks set state = 'completed', completed_payload = '{"ok": true}' from run where tasks.task_id = run.task_id;
