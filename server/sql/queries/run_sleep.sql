-- Lets runs sleep as a step, so long or until a time; it may be over already.
-- One row per run that could be had; for the others somebody holds the run, its task or its event.
with item as materialized (
       select * from unnest($2::uuid[], $3::text[], $4::text[], $5::bigint[], $6::timestamptz[])
                with ordinality as i (run_id, digest, step_name, duration_us, wake_at, place)),
     runs as materialized (
       select r.run_id, r.task_id from (select run_id from item order by run_id) i
        cross join lateral (select r.run_id, r.task_id from {r} r where r.run_id = i.run_id offset 0 for update skip locked) r),
     held as materialized (
       select runs.run_id from (select * from runs order by task_id) runs
        cross join lateral (select from {t} t where t.task_id = runs.task_id offset 0 for update skip locked) t)
select i.place, s.known, s.owned, s.state, s.expired,
       case when s.done and s.wake_at is not null then 'suspended' when s.done then 'timed_out' end as outcome,
       null::jsonb as payload, s.wake_at
  from item i
 cross join lateral absurd_server.sleep_run($1::text, i.run_id, i.digest, i.step_name, i.wake_at, i.duration_us) s
 where i.run_id in (select run_id from held) or not exists (select from {r} r where r.run_id = i.run_id)
