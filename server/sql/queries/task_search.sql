-- Tasks whose ids lie between $1 and $2, or that have the run $3, or whose ids, among the newest 10,000, end in $4 (no end is
-- looked for where that is null). At most $5, newest first; a row without a task when there are none.
with newest as materialized (
       select t.task_id from {t} t where $4::text is not null order by t.task_id desc limit 10001),
     found as materialized (
       (select t.task_id from {t} t where t.task_id between $1::uuid and $2::uuid order by t.task_id desc limit $5::bigint)
        union
       (select r.task_id from {r} r where r.run_id = $3::uuid)
        union
       (select n.task_id from (select task_id from newest order by task_id desc limit 10000) n
         where right(replace(n.task_id::text, '-', ''), length($4::text)) = $4::text
         order by n.task_id desc limit $5::bigint))
select x.task_id, x.task_name, x.state, x.enqueue_at, (select count(*) from newest) > 10000 as partial
  from (select) one
  left join lateral (
       select t.task_id, left(t.task_name, 2048) as task_name, t.state, t.enqueue_at
         from (select task_id from found order by task_id desc limit $5::bigint) f
        cross join lateral (select * from {t} t where t.task_id = f.task_id offset 0) t) x on true
 order by x.task_id desc
