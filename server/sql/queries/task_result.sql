-- State and result of a task (contract section 7.10).
select t.task_id, t.state, case when t.state = 'completed' then t.completed_payload end as result,
       case when t.state = 'failed'
            then (select r.failure_reason from {r} r where r.run_id = t.last_attempt_run) end as failure_reason
  from {t} t
 where t.task_id = $1::uuid
