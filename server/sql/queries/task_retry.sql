-- Gives a failed task another attempt, as `absurd.retry_task` does, with a run id chosen before.
with clock as materialized (select absurd.current_time() as now),
     task as materialized (
       select t.task_id, t.state, t.attempts, coalesce($3::integer, coalesce(t.max_attempts, t.attempts) + 1) as allowed
         from {t} t where t.task_id = $1::uuid for update),
     run as (
       insert into {r} (run_id, task_id, attempt, state, available_at, created_at)
       select $2::uuid, task.task_id, task.attempts + 1, 'pending', clock.now, clock.now
         from task cross join clock
        where task.state = 'failed' and task.allowed > task.attempts
           on conflict do nothing
       returning run_id, attempt),
     done as (
       update {t} t
          set state = 'pending', attempts = run.attempt, max_attempts = task.allowed, last_attempt_run = run.run_id,
              cancelled_at = null
         from task cross join run
        where t.task_id = task.task_id)
select task.state, task.attempts, task.allowed, run.attempt as made,
       (select r.attempt from {r} r where r.run_id = $2::uuid and r.task_id = $1::uuid) as before
  from task left join run on true
