-- Cancels a task by the contract's function (7.23), which takes the locks in the right order.
select absurd.cancel_task($1::text, $2::uuid)::text
