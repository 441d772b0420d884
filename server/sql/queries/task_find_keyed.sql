-- As task_find, for a partitioned queue: the owner of a key stands in the registry.
select i.item, t.task_id, t.task_id = i.task_id as same_id,
       t.task_name = i.task_name and t.params is not distinct from coalesce(i.params, 'null'::jsonb) as same_task,
       t.last_attempt_run, t.attempts, first.run_id as first_run_id
  from unnest($1::uuid[], $2::text[], $3::text[], $4::jsonb[]) with ordinality
         as i (task_id, idempotency_key, task_name, params, item)
  left join {i} k on k.idempotency_key = i.idempotency_key
  left join {t} t on t.task_id = coalesce(k.task_id, i.task_id)
  left join {r} first on first.task_id = t.task_id and first.attempt = 1
 order by i.item
