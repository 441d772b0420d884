-- Waits of a task, by run, after a place. The page ends with the row that takes it past $5 bytes; `beyond` marks that row, which
-- belongs to the next page unless it is alone.
select q.*, q.upto > $5::integer as beyond
  from (select p.*, sum(p.bytes) over places as upto, sum(p.bytes) over places - p.bytes as before
          from (select w.task_id, w.run_id, left(w.step_name, 2048) as step_name, left(w.event_name, 2048) as event_name,
                       w.timeout_at, w.created_at,
                       octet_length(left(w.step_name, 2048)) + octet_length(left(w.event_name, 2048)) + 160 as bytes
                  from {w} w
                 where w.task_id = $1::uuid and (w.run_id, left(w.step_name, 2048)) > ($2::uuid, $3::text)
                 order by w.run_id, left(w.step_name, 2048)
                 limit $4::bigint) p
        window places as (order by p.run_id, p.step_name)) q
 where q.before <= $5::integer
 order by q.run_id, q.step_name
