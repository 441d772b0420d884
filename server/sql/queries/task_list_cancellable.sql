-- A page of tasks that have a cancellation policy, in id order; says which are due.
select t.task_id,
       t.state in ('pending', 'running', 'sleeping')
       and absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, absurd.current_time()) as due
  from {t} t
 where t.cancellation is not null and t.task_id > $1::uuid
 order by t.task_id
 limit 1000
