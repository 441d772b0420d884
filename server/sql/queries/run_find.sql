-- The task and the attempt of a run.
select r.task_id, r.attempt from {r} r where r.run_id = $1::uuid
