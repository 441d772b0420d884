-- The database's book: every change of a queue's rows, written by triggers in the transaction that makes it.
create schema chaos;
create table chaos.audit (
  seq bigint generated always as identity primary key,
  at bigint not null,
  kind text not null,
  op text not null,
  task uuid,
  run uuid,
  attempt integer,
  old_state text,
  state text,
  old_owner text,
  owner text,
  expires bigint,
  available bigint,
  name text,
  value text
);

create function chaos.micros(p_at timestamptz) returns bigint
language sql immutable as $$
  select case when isfinite(p_at) then (extract(epoch from p_at) * 1000000)::bigint end
$$;

create function chaos.note_task() returns trigger language plpgsql as $$
begin
  if tg_op = 'DELETE' then
    insert into chaos.audit (at, kind, op, task, old_state)
      values (chaos.micros(clock_timestamp()), 't', 'D', old.task_id, old.state);
  elsif tg_op = 'INSERT' then
    insert into chaos.audit (at, kind, op, task, attempt, state, name, value)
      values (chaos.micros(clock_timestamp()), 't', 'I', new.task_id, new.max_attempts, new.state,
              new.idempotency_key, new.params #>> '{}');
  else
    insert into chaos.audit (at, kind, op, task, attempt, old_state, state, value)
      values (chaos.micros(clock_timestamp()), 't', 'U', new.task_id, new.attempts, old.state, new.state,
              new.completed_payload #>> '{}');
  end if;
  return null;
end $$;

create function chaos.note_run() returns trigger language plpgsql as $$
begin
  if tg_op = 'DELETE' then
    insert into chaos.audit (at, kind, op, task, run, attempt, old_state, old_owner)
      values (chaos.micros(clock_timestamp()), 'r', 'D', old.task_id, old.run_id, old.attempt, old.state, old.claimed_by);
  else
    insert into chaos.audit (at, kind, op, task, run, attempt, old_state, state, old_owner, owner, expires, available, name, value)
      values (chaos.micros(clock_timestamp()), 'r', left(tg_op, 1), new.task_id, new.run_id, new.attempt,
              case when tg_op = 'UPDATE' then old.state end, new.state,
              case when tg_op = 'UPDATE' then old.claimed_by end, new.claimed_by,
              chaos.micros(new.claim_expires_at), chaos.micros(new.available_at),
              new.failure_reason ->> 'name', new.result #>> '{}');
  end if;
  return null;
end $$;

create function chaos.note_checkpoint() returns trigger language plpgsql as $$
begin
  if tg_op <> 'DELETE' then
    insert into chaos.audit (at, kind, op, task, run, name, value)
      values (chaos.micros(clock_timestamp()), 'c', left(tg_op, 1), new.task_id, new.owner_run_id, new.checkpoint_name,
              new.state #>> '{}');
  end if;
  return null;
end $$;

create function chaos.note_event() returns trigger language plpgsql as $$
begin
  insert into chaos.audit (at, kind, op, name, value)
    values (chaos.micros(clock_timestamp()), 'e', left(tg_op, 1), coalesce(new.event_name, old.event_name),
            new.payload #>> '{}');
  return null;
end $$;

create function chaos.note_wait() returns trigger language plpgsql as $$
begin
  insert into chaos.audit (at, kind, op, task, run, name)
    values (chaos.micros(clock_timestamp()), 'w', left(tg_op, 1), coalesce(new.task_id, old.task_id),
            coalesce(new.run_id, old.run_id), coalesce(new.event_name, old.event_name));
  return null;
end $$;

create trigger chaos after insert or update or delete on absurd.t_chaos for each row execute function chaos.note_task();
create trigger chaos after insert or update or delete on absurd.r_chaos for each row execute function chaos.note_run();
create trigger chaos after insert or update or delete on absurd.c_chaos for each row execute function chaos.note_checkpoint();
create trigger chaos after insert or update or delete on absurd.e_chaos for each row execute function chaos.note_event();
create trigger chaos after insert or update or delete on absurd.w_chaos for each row execute function chaos.note_wait();
