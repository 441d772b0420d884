-- A page of tasks that have a cancellation policy, in id order; says which are due and not set aside.
select t.task_id, t.last_attempt_run as run_id,
       t.state in ('pending', 'running', 'sleeping')
       and absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, absurd.current_time())
       and not exists (select from absurd_server.quarantine q
                        where q.queue_name = $2::text and q.run_id = t.last_attempt_run
                          and q.retry_at > absurd.current_time()) as due
  from {t} t
 where t.cancellation is not null and t.task_id > $1::uuid
 order by t.task_id
 limit 1000
