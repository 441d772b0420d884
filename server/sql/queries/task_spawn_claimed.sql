-- As task_spawn, for workers that wait: a task with a slot is spawned already claimed, unless older work of the queue can be.
with item as materialized (
       select * from unnest($1::uuid[],     -- task ids
                            $2::uuid[],     -- run ids
                            $3::text[],     -- names
                            $4::jsonb[],    -- params
                            $5::jsonb[],    -- headers
                            $6::jsonb[],    -- retry strategies
                            $7::integer[],  -- max attempts
                            $8::jsonb[],    -- cancellation policies
                            $9::text[],     -- idempotency keys
                            $10::text[],    -- slots: worker ids, null where there is none
                            $11::text[],    -- digests of the claim secrets
                            $12::integer[]) -- leases in seconds, 0 for ever
                as i (task_id, run_id, task_name, params, headers, retry_strategy, max_attempts, cancellation,
                      idempotency_key, worker_id, digest, lease)),
     clock as materialized (select absurd.current_time() as now),
     turn as materialized (
       select not exists (select from {r} r where r.state = 'pending' and r.available_at <= (select now from clock))
              and not exists (select from {r} r where r.state = 'sleeping' and r.available_at <= (select now from clock))
              as come),
     tasks as (
       insert into {t} (task_id, task_name, params, headers, retry_strategy, max_attempts, cancellation, enqueue_at,
                        state, attempts, last_attempt_run, first_started_at, idempotency_key)
       select i.task_id, i.task_name, coalesce(i.params, 'null'::jsonb), i.headers, i.retry_strategy, i.max_attempts,
              i.cancellation, clock.now, case when turn.come and i.worker_id is not null then 'running' else 'pending' end,
              1, i.run_id, case when turn.come and i.worker_id is not null then clock.now end, i.idempotency_key
         from item i cross join clock cross join turn
        order by i.idempotency_key, i.task_id
           on conflict do nothing
       returning task_id, last_attempt_run, state, params, headers, retry_strategy),
     runs as (
       insert into {r} (run_id, task_id, attempt, state, available_at, created_at, started_at, claimed_by,
                        claim_expires_at)
       select i.run_id, i.task_id, 1, case when claimed then 'running' else 'pending' end, clock.now, clock.now,
              case when claimed then clock.now end, case when claimed then i.worker_id || '#' || i.digest end,
              case when claimed and i.lease > 0 then clock.now + make_interval(secs => i.lease) end
         from item i cross join clock cross join turn
        cross join lateral (select turn.come and i.worker_id is not null as claimed) c
        where i.run_id in (select last_attempt_run from tasks))
select tasks.task_id, tasks.last_attempt_run as run_id, claimed, clock.now,
       case when claimed then tasks.params end as params, case when claimed then tasks.headers end as headers,
       case when claimed then tasks.retry_strategy end as retry_strategy
  from tasks cross join clock cross join lateral (select tasks.state = 'running' as claimed) c
