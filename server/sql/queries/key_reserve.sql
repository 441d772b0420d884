-- Reserves idempotency keys of a partitioned queue; returns those that were free. A key that comes again belongs to its first task.
with item as materialized (
       select * from unnest($1::text[], $2::uuid[]) with ordinality as i (idempotency_key, task_id, place)),
     made as (
       insert into {i} (idempotency_key, task_id)
       select idempotency_key, task_id from item order by idempotency_key, place
           on conflict do nothing
       returning idempotency_key)
select idempotency_key from made
