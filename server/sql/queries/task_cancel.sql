-- Cancels a task by the contract's function, which locks the runs in order of their ids and then the task.
select absurd.cancel_task($1::text, $2::uuid)::text
