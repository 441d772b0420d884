-- Where a page of 10,000 tasks ends.
select min(x.task_id::text) as edge, count(*) as seen
  from (select t.task_id from {t} t where t.task_id < $1::uuid order by t.task_id desc limit 10000) x
