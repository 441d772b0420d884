-- State of a task with its result, or with the reason of its failure, or a part of either. A text longer than $4 bytes
-- is left out unless a part is asked for.
select t.task_id, t.state,
       case when $2::integer is not null then substr(x.text, $2::integer + 1, $3::integer)
            when octet_length(x.text) <= $4::integer then x.text end as text,
       coalesce(length(x.text), 0)::bigint as length
  from {t} t
 cross join lateral (
       select case t.state
                when 'completed' then t.completed_payload::text
                when 'failed' then (select r.failure_reason::text from {r} r where r.run_id = t.last_attempt_run)
              end as text
       offset 0) x
 where t.task_id = $1::uuid
