-- Five tasks with a run whose lease ran out long ago, and a trigger that refuses every change of such a run. The audit does
-- not see them: they are nobody's, and never end.
begin;
set local session_replication_role = replica;
insert into absurd.t_chaos (task_id, task_name, params, enqueue_at, first_started_at, state, attempts, last_attempt_run)
select ('00000000-0000-7000-8000-00000000000' || i)::uuid, 'poison', '{}', now(), now(), 'running', 1,
       ('00000000-0000-7000-8000-00000000001' || i)::uuid
  from generate_series(1, 5) i;
insert into absurd.r_chaos (run_id, task_id, attempt, state, claimed_by, claim_expires_at, available_at, started_at)
select ('00000000-0000-7000-8000-00000000001' || i)::uuid, ('00000000-0000-7000-8000-00000000000' || i)::uuid, 1, 'running',
       'poison', now() - interval '1 hour', now(), now()
  from generate_series(1, 5) i;
commit;
create function chaos.refuse() returns trigger language plpgsql as $$ begin raise exception 'poisoned'; end $$;
create trigger poison before update on absurd.r_chaos for each row when (old.claimed_by = 'poison')
execute function chaos.refuse();
