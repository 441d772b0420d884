-- What is set aside, by queue and oldest first.
select q.queue_name, q.run_id, q.task_id, q.reason, q.problem, q.times, q.since
  from absurd_server.quarantine q
 order by q.queue_name, q.since, q.run_id
 limit $1::bigint
