-- Whether this transaction has just cancelled the task.
select t.state, t.state = 'cancelled' and t.xmin = pg_current_xact_id()::xid as mine
  from {t} t
 where t.task_id = $1::uuid
