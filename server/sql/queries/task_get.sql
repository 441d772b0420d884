-- A task, with its params and its result, or with a part of each. What is longer than $6 bytes is left out unless a part is
-- asked for, and so are headers of more than $7 bytes; of the other texts, which only SQL makes long, the beginning is kept.
select t.task_id, left(t.task_name, 2048) as task_name, t.max_attempts, t.enqueue_at, t.first_started_at, t.state, t.attempts,
       t.last_attempt_run, t.cancelled_at, left(t.idempotency_key, 2048) as idempotency_key,
       case when x.headers <= $7::integer then t.headers end as headers,
       case when x.retry_strategy <= 65536 then t.retry_strategy end as retry_strategy,
       case when x.cancellation <= 65536 then t.cancellation end as cancellation,
       coalesce(x.headers > $7::integer, false) or coalesce(x.retry_strategy > 65536, false)
         or coalesce(x.cancellation > 65536, false) as details_omitted,
       case when $2::integer is not null then substr(x.params, $2::integer + 1, $3::integer)
            when octet_length(x.params) <= $6::integer then x.params end as params,
       case when $4::integer is not null then substr(x.result, $4::integer + 1, $5::integer)
            when octet_length(x.result) <= $6::integer then x.result end as completed_payload,
       coalesce(length(x.params), 0)::bigint as params_length,
       coalesce(length(x.result), 0)::bigint as result_length
  from {t} t
 cross join lateral (
       select t.params::text as params, t.completed_payload::text as result, octet_length(t.headers::text) as headers,
              octet_length(t.retry_strategy::text) as retry_strategy, octet_length(t.cancellation::text) as cancellation
       offset 0) x
 where t.task_id = $1::uuid
