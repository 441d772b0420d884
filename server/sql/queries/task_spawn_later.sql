-- As task_spawn, where some of the tasks have a start: a task whose start is in the future sleeps until then.
with clock as materialized (select absurd.current_time() as now),
     item as materialized (
       select i.*, greatest(clock.now, i.start_at, clock.now + i.delay_us * interval '1 microsecond') as available_at
         from clock,
              unnest($1::uuid[],         -- task ids
                     $2::uuid[],         -- run ids
                     $3::text[],         -- names
                     $4::jsonb[],        -- params
                     $5::jsonb[],        -- headers
                     $6::jsonb[],        -- retry strategies
                     $7::integer[],      -- max attempts
                     $8::jsonb[],        -- cancellation policies
                     $9::text[],         -- idempotency keys
                     $10::timestamptz[], -- starts at a time, null: at once, or
                     $11::bigint[])      -- after so many microseconds
                as i (task_id, run_id, task_name, params, headers, retry_strategy, max_attempts, cancellation,
                      idempotency_key, start_at, delay_us)),
     tasks as (
       insert into {t} (task_id, task_name, params, headers, retry_strategy, max_attempts, cancellation, enqueue_at,
                        state, attempts, last_attempt_run, idempotency_key)
       select i.task_id, i.task_name, coalesce(i.params, 'null'::jsonb), i.headers, i.retry_strategy, i.max_attempts,
              i.cancellation, clock.now, case when i.available_at > clock.now then 'sleeping' else 'pending' end, 1,
              i.run_id, i.idempotency_key
         from item i cross join clock
        order by i.idempotency_key, i.task_id
           on conflict do nothing
       returning task_id, last_attempt_run)
insert into {r} (run_id, task_id, attempt, state, available_at, created_at)
select i.run_id, i.task_id, 1, case when i.available_at > clock.now then 'sleeping' else 'pending' end, i.available_at,
       clock.now
  from item i cross join clock
 where i.run_id in (select last_attempt_run from tasks)
returning run_id, false as claimed
