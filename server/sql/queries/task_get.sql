-- A task, with its params and its result, or with a part of each. What is longer than $6 bytes is left out unless a part is
-- asked for.
select t.task_id, t.task_name, t.headers, t.retry_strategy, t.max_attempts, t.cancellation, t.enqueue_at,
       t.first_started_at, t.state, t.attempts, t.last_attempt_run, t.cancelled_at, t.idempotency_key,
       case when $2::integer is not null then substr(x.params, $2::integer + 1, $3::integer)
            when octet_length(x.params) <= $6::integer then x.params end as params,
       case when $4::integer is not null then substr(x.result, $4::integer + 1, $5::integer)
            when octet_length(x.result) <= $6::integer then x.result end as completed_payload,
       coalesce(length(x.params), 0)::bigint as params_length,
       coalesce(length(x.result), 0)::bigint as result_length
  from {t} t
 cross join lateral (select t.params::text as params, t.completed_payload::text as result offset 0) x
 where t.task_id = $1::uuid
