-- Which of the awaited tasks have ended.
select queue_name, task_id, state, result, failure_reason from absurd_server.ended($1::text[], $2::uuid[])
