-- A task, with all or a part of its params.
select t.task_id, t.task_name,
       case when $2::integer is null then t.params::text
            else substr(t.params::text, $2::integer + 1, $3::integer) end as params,
       length(t.params::text)::bigint as params_length,
       t.headers, t.retry_strategy, t.max_attempts, t.cancellation, t.enqueue_at, t.first_started_at, t.state,
       t.attempts, t.last_attempt_run, t.completed_payload, t.cancelled_at, t.idempotency_key
  from {t} t
 where t.task_id = $1::uuid
