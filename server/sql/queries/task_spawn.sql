-- Spawns tasks that can be claimed at once, with their first runs; returns the runs that were new. A task id or key that exists
-- is left alone. Apart from task_spawn_later, because almost all spawns are such.
with item as materialized (
       select * from unnest($1::uuid[],     -- task ids
                            $2::uuid[],     -- run ids
                            $3::text[],     -- names
                            $4::jsonb[],    -- params
                            $5::jsonb[],    -- headers
                            $6::jsonb[],    -- retry strategies
                            $7::integer[],  -- max attempts
                            $8::jsonb[],    -- cancellation policies
                            $9::text[])     -- idempotency keys
                as i (task_id, run_id, task_name, params, headers, retry_strategy, max_attempts, cancellation,
                      idempotency_key)),
     clock as materialized (select absurd.current_time() as now),
     tasks as (
       insert into {t} (task_id, task_name, params, headers, retry_strategy, max_attempts, cancellation, enqueue_at,
                        state, attempts, last_attempt_run, idempotency_key)
       select i.task_id, i.task_name, coalesce(i.params, 'null'::jsonb), i.headers, i.retry_strategy, i.max_attempts,
              i.cancellation, clock.now, 'pending', 1, i.run_id, i.idempotency_key
         from item i cross join clock
        order by i.idempotency_key, i.task_id
           on conflict do nothing
       returning task_id, last_attempt_run)
insert into {r} (run_id, task_id, attempt, state, available_at, created_at)
select tasks.last_attempt_run, tasks.task_id, 1, 'pending', clock.now, clock.now
  from tasks cross join clock
returning run_id, false as claimed
