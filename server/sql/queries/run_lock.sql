-- Locks a run and says what it is.
select r.task_id, r.state from {r} r where r.run_id = $1::uuid for update
