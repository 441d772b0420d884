-- Spawns a copy of a failed task, as `absurd.retry_task` does with `spawn_new`, with ids chosen before. A copy that was
-- made before is found even when its source is gone; without either there is no row.
with clock as materialized (select absurd.current_time() as now),
     source as materialized (
       select t.* from {t} t where t.task_id = $1::uuid for update),
     tasks as (
       insert into {t} (task_id, task_name, params, headers, retry_strategy, max_attempts, cancellation, enqueue_at,
                        state, attempts, last_attempt_run)
       select $2::uuid, s.task_name, s.params, nullif(jsonb_strip_nulls(s.headers), 'null'),
              nullif(jsonb_strip_nulls(s.retry_strategy), 'null'), coalesce($4::integer, s.max_attempts),
              nullif(jsonb_strip_nulls(s.cancellation), 'null'), clock.now, 'pending', 1, $3::uuid
         from source s cross join clock
        where s.state = 'failed'
           on conflict do nothing
       returning task_id),
     run as (
       insert into {r} (run_id, task_id, attempt, state, available_at, created_at)
       select $3::uuid, tasks.task_id, 1, 'pending', clock.now, clock.now from tasks cross join clock
       returning run_id)
select (select s.state from source s) as state, (select run_id from run) as made, before.run_id as before
  from (select) one
  left join lateral (
       select r.run_id from {r} r where r.task_id = $2::uuid and r.attempt = 1 limit 1) before on true
 where before.run_id is not null or exists (select from source)
