-- A page of tasks, newest first; at most 10,000 are looked at. Of a name, which only SQL makes long, the beginning is kept.
with looked as materialized (
       select t.task_id, t.task_name, t.state, t.attempts, t.max_attempts, t.enqueue_at, t.first_started_at
         from {t} t
        where t.task_id < $1::uuid
        order by t.task_id desc
        limit 10000)
select l.task_id, left(l.task_name, 2048) as task_name, l.state, l.attempts, l.max_attempts, l.enqueue_at, l.first_started_at
  from looked l
 where ($2::text is null or l.state = $2::text) and ($3::text is null or l.task_name = $3::text)
 order by l.task_id desc
 limit $4::bigint
