-- Runs of a task in the order of their attempts, after a place. A payload of more than $5 bytes is left out. The page ends
-- with the row that takes it past $6 bytes; `beyond` marks that row, which belongs to the next page unless it is alone.
with beat as materialized (
       select c.owner_run_id, max(c.updated_at) as at from {c} c where c.task_id = $1::uuid group by c.owner_run_id),
     place as materialized (
       select r.run_id, r.attempt from {r} r
        where r.task_id = $1::uuid and (r.attempt, r.run_id) > ($2::integer, $3::uuid)
        order by r.attempt, r.run_id
        limit $4::bigint)
select r.run_id, r.task_id, r.attempt, r.state,
       left(regexp_replace(r.claimed_by, '#[A-Za-z0-9_-]{22}$', ''), 2048) as claimed_by,
       r.claim_expires_at, r.available_at, left(r.wake_event, 2048) as wake_event, r.started_at, r.completed_at, r.failed_at,
       r.created_at,
       case when q.payload <= $5::integer then r.event_payload::text end as event_payload,
       case when q.result <= $5::integer then r.result::text end as result,
       case when q.reason <= $5::integer then r.failure_reason::text end as failure_reason,
       greatest(q.payload, q.result, q.reason) > $5::integer as omitted,
       greatest(r.started_at, beat.at) as last_heartbeat, q.upto > $6::integer as beyond
  from (select p.*, sum(p.bytes) over places as upto, sum(p.bytes) over places - p.bytes as before
          from (select place.*, size.*,
                       512 + size.texts + case when size.payload <= $5::integer then size.payload else 0 end
                       + case when size.result <= $5::integer then size.result else 0 end
                       + case when size.reason <= $5::integer then size.reason else 0 end as bytes
                  from place
                 cross join lateral (
                       select octet_length(r.event_payload::text) as payload, octet_length(r.result::text) as result,
                              octet_length(r.failure_reason::text) as reason,
                              coalesce(octet_length(left(r.claimed_by, 2048)), 0)
                              + coalesce(octet_length(left(r.wake_event, 2048)), 0) as texts
                         from {r} r where r.run_id = place.run_id offset 0) size) p
        window places as (order by p.attempt, p.run_id)) q
 cross join lateral (select * from {r} r where r.run_id = q.run_id offset 0) r
  left join beat on beat.owner_run_id = q.run_id
 where q.before <= $6::integer
 order by q.attempt, q.run_id
