-- A run. What is longer than $2 bytes is left out; of a name, which only SQL makes long, the beginning is kept.
select r.run_id, r.task_id, r.attempt, r.state,
       left(regexp_replace(r.claimed_by, '#[A-Za-z0-9_-]{22}$', ''), 2048) as claimed_by,
       r.claim_expires_at, r.available_at, left(r.wake_event, 2048) as wake_event, r.started_at, r.completed_at, r.failed_at, r.created_at,
       case when octet_length(x.payload) <= $2::integer then x.payload end as event_payload,
       case when octet_length(x.result) <= $2::integer then x.result end as result,
       case when octet_length(x.reason) <= $2::integer then x.reason end as failure_reason,
       greatest(octet_length(x.payload), octet_length(x.result), octet_length(x.reason)) > $2::integer as omitted,
       greatest(r.started_at, (select max(c.updated_at) from {c} c
                                where c.task_id = r.task_id and c.owner_run_id = r.run_id)) as last_heartbeat
  from {r} r
 cross join lateral (
       select r.event_payload::text as payload, r.result::text as result, r.failure_reason::text as reason offset 0) x
 where r.run_id = $1::uuid
