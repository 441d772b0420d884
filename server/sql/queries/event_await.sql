-- Lets runs wait for events as a step, or says what came of it.
-- One row per run that could be had; for the others somebody holds the run, its task or its event.
with item as materialized (
       select * from unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::bigint[])
                with ordinality as i (run_id, digest, step_name, event_name, timeout_ms, place)),
     -- All events before all runs, as an emission has it. Those that nobody has spoken of are made, if the wait can stand;
     -- counting them makes that happen first.
     made as (
       insert into {e} (event_name, payload, emitted_at)
       select distinct i.event_name, null::jsonb, timestamptz 'epoch'
         from item i
        cross join lateral (
          select from {r} r
           where r.run_id = i.run_id and r.state = 'running'
             and (i.digest is null or right(r.claimed_by, 23) = '#' || i.digest) offset 0) r
        where not exists (select from {e} e where e.event_name = i.event_name)
        order by i.event_name
           on conflict (event_name) do nothing
       returning event_name),
     events as materialized (
       select e.event_name
         from (select distinct event_name from item where (select count(*) from made) >= 0 order by event_name) i
        cross join lateral (select e.event_name from {e} e where e.event_name = i.event_name offset 0 for share skip locked) e),
     runs as materialized (
       select r.run_id, r.task_id from (select run_id from item i
                where i.event_name in (select event_name from events)
                   or not exists (select from {e} e where e.event_name = i.event_name)
                order by run_id) i
        cross join lateral (select r.run_id, r.task_id from {r} r where r.run_id = i.run_id offset 0 for update skip locked) r),
     held as materialized (
       select runs.run_id from (select * from runs order by task_id) runs
        cross join lateral (select from {t} t where t.task_id = runs.task_id offset 0 for update skip locked) t)
select i.place, s.known, s.owned, s.state, s.expired, s.outcome, s.payload, s.wake_at
  from item i
 cross join lateral absurd_server.await_event($1::text, i.run_id, i.digest, i.step_name, i.event_name, i.timeout_ms) s
 where i.run_id in (select run_id from held) or not exists (select from {r} r where r.run_id = i.run_id)
