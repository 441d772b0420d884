-- Reserves idempotency keys of a partitioned queue; returns the owner of each key.
with item as materialized (
       select * from unnest($1::text[], $2::uuid[]) as i (idempotency_key, task_id)),
     made as (
       insert into {i} (idempotency_key, task_id)
       select idempotency_key, task_id from item order by idempotency_key
           on conflict do nothing
       returning idempotency_key)
select idempotency_key from made
