-- Finds what stood in the way of a spawn: the task with the same id, else the owner of the key; one row per item.
select i.item, t.task_id, t.task_id = i.task_id as same_id,
       t.task_name = i.task_name and t.params is not distinct from coalesce(i.params, 'null'::jsonb) as same_task,
       t.last_attempt_run, t.attempts, first.run_id as first_run_id
  from unnest($1::uuid[], $2::text[], $3::text[], $4::jsonb[]) with ordinality
         as i (task_id, idempotency_key, task_name, params, item)
  left join lateral (
       select * from {t} x where x.task_id = i.task_id
        union all
       select * from {t} x where x.idempotency_key = i.idempotency_key
        limit 1) t on true
  left join {r} first on first.task_id = t.task_id and first.attempt = 1
 order by i.item
