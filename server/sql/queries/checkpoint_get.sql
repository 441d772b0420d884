-- One checkpoint of a task.
select c.checkpoint_name, c.state, c.status, c.owner_run_id, c.updated_at
  from {c} c
 where c.task_id = $1::uuid and c.checkpoint_name = $2::text and ($3::boolean or c.status = 'committed')
