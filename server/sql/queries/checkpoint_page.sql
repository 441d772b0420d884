-- Committed checkpoints of a task after a place, oldest first: those that an attempt may see (contract section 7.20), or
-- those that a run itself has written.
select c.checkpoint_name, c.state, c.status, c.owner_run_id, c.updated_at
  from {c} c
  left join lateral (select r.attempt from {r} r where r.run_id = c.owner_run_id offset 0) o on true
 where c.task_id = $1::uuid and c.status = 'committed'
   and ($2::integer is null or o.attempt is null or o.attempt <= $2::integer)
   and ($3::uuid is null or c.owner_run_id = $3::uuid)
   and (c.updated_at, c.checkpoint_name) > ($4::timestamptz, $5::text)
 order by c.updated_at, c.checkpoint_name
 limit $6::bigint
