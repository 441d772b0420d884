-- Our side schema: everything that the server keeps outside the storage contract.
-- Nothing in it is written on the hot path, and nothing in schema `absurd` depends on it.

create schema if not exists absurd_server;
grant usage on schema absurd_server to public;

-- What was applied, by whom it may be used.
create table if not exists absurd_server.migration (
  version    integer primary key,
  name       text not null,
  checksum   text not null,
  min_server integer not null,  -- oldest server that may run on a database with this migration
  applied_at timestamptz not null default clock_timestamp()
);

create table if not exists absurd_server.setting (
  name  text primary key,
  value text not null
);

-- Dispatchers that are idle and want to be rung. A row is inserted to arm and deleted to ring, never updated: updating
-- a row that an open transaction took would wait for that transaction.
create unlogged table if not exists absurd_server.armed (
  armed_id   bigint generated always as identity primary key,
  queue_name text not null,
  replica_id text not null
);
create index if not exists armed_queue on absurd_server.armed (queue_name);

-- Replicas and when they were last seen; who is alone need not notify anybody.
create unlogged table if not exists absurd_server.replica (
  replica_id text primary key,
  seen_at    timestamptz not null
);

-- How often a run was given back after it had reached a transport. The third time it fails.
create table if not exists absurd_server.released (
  queue_name  text not null,
  run_id      uuid not null,
  releases    integer not null,
  released_at timestamptz not null,
  primary key (queue_name, run_id)
);

-- Seconds of a cancellation policy; what is no whole number counts as absent.
create or replace function absurd_server.cancellation_seconds(p_policy jsonb, p_key text) returns bigint
language sql immutable as $$
  select case when jsonb_typeof(p_policy) = 'object' and p_policy ->> p_key ~ '^[[:space:]]*[+-]?[0-9]{1,18}[[:space:]]*$'
              then (p_policy ->> p_key)::bigint
         end
$$;

-- Whether a task is to be cancelled by its policy.
create or replace function absurd_server.cancellation_due(p_policy jsonb, p_enqueue_at timestamptz,
                                                          p_first_started_at timestamptz, p_now timestamptz)
returns boolean
language sql immutable as $$
  select coalesce(
           case when p_policy is null then false
                when p_first_started_at is null
                then extract(epoch from p_now - p_enqueue_at)
                     >= absurd_server.cancellation_seconds(p_policy, 'max_delay')
                else extract(epoch from p_now - p_first_started_at)
                     >= absurd_server.cancellation_seconds(p_policy, 'max_duration')
           end, false)
$$;

-- Delay before the next attempt; null for a stored strategy that cannot be used, so that a batch
-- never stops at it. Stands on its own: the databases of release 0.4.0 have no such function.
create or replace function absurd_server.retry_delay(p_strategy jsonb, p_attempt integer) returns interval
language plpgsql immutable as $$
declare
  v_kind text := coalesce(p_strategy ->> 'kind', 'none');
  v_base double precision;
  v_factor double precision;
  v_max double precision;
  v_delay double precision;
begin
  if p_strategy is null then
    return interval '0';
  elsif jsonb_typeof(p_strategy) <> 'object' or v_kind not in ('none', 'fixed', 'exponential') then
    return null;
  elsif v_kind = 'none' then
    return interval '0';
  end if;
  v_base := coalesce((p_strategy ->> 'base_seconds')::double precision, case v_kind when 'fixed' then 60 else 30 end);
  -- NaN sorts above every number, so the upper bound refuses it too.
  if v_base < 0 or v_base > 86400 then
    return null;
  elsif v_kind = 'fixed' then
    return v_base * interval '1 second';
  end if;
  v_factor := coalesce((p_strategy ->> 'factor')::double precision, 2);
  v_max := coalesce((p_strategy ->> 'max_seconds')::double precision, 86400);
  if v_factor < 0 or v_factor >= 'infinity'::double precision or v_max < 0 or v_max > 86400 then
    return null;
  elsif v_base = 0 then
    return interval '0';
  end if;
  begin
    v_delay := v_base * power(v_factor, greatest(p_attempt, 1) - 1);
  exception when numeric_value_out_of_range or floating_point_exception then
    v_delay := case when v_factor < 1 then 0 else v_max end;
  end;
  return least(v_delay, v_max) * interval '1 second';
exception when invalid_text_representation or numeric_value_out_of_range then
  return null;
end
$$;

-- Takes the locks that a read of some tables of a queue needs, without waiting. A queue that somebody has locked (VACUUM FULL,
-- ALTER TABLE) raises lock_not_available here at once, so that a statement over many queues never waits for one of them.
create or replace function absurd_server.lock_for_read(variadic p_tables text[]) returns void
language plpgsql as $$
begin
  execute (select 'lock table ' || string_agg(format('absurd.%I', name), ', ') || ' in access share mode nowait'
             from unnest(p_tables) as name);
end
$$;

-- How far the tables of a queue can be used now: 'free', 'reads' (another session keeps writers out: CREATE INDEX), 'locked',
-- 'missing', or 'unusable' (the role has no rights on them, for one). Waits for nothing, and keeps no lock.
create or replace function absurd_server.queue_access(p_queue text) returns text
language plpgsql as $$
declare
  v_mode text;
  v_tables text;
begin
  select string_agg(format('absurd.%I', kind || '_' || p_queue), ', ') into v_tables
    from unnest(array['e', 'r', 't', 'w', 'c']) as kind;
  foreach v_mode in array array['row exclusive', 'access share'] loop
    begin
      execute 'lock table ' || v_tables || ' in ' || v_mode || ' mode nowait';
      -- Left by an error, the block gives its locks back.
      raise exception using errcode = 'AS000';
    exception
      when sqlstate 'AS000' then
        return case v_mode when 'row exclusive' then 'free' else 'reads' end;
      when undefined_table then
        return 'missing';
      when lock_not_available then
        null;
      when others then
        return 'unusable';
    end;
  end loop;
  return 'locked';
end
$$;

-- One look at many queues, in one statement per replica: what can be claimed, what has expired, what comes next.
-- The first row has no queue; it carries the clock, the number of other replicas, and the oldest server that may run here.
-- A queue that cannot be looked at says so in its own row, and holds up none of the others. Each row says how long its look took.
drop function if exists absurd_server.tick(text[], text);
create function absurd_server.tick(p_queues text[], p_replica text)
returns table (queue_name text, missing boolean, locked boolean, problem text, claimable boolean, expired boolean,
               cancellable boolean, next_available_ms bigint, next_expiry_ms bigint, took_us bigint, now_us bigint,
               others integer, min_server integer)
language plpgsql set lock_timeout = '20ms' as $$
declare
  v_now timestamptz := absurd.current_time();
  v_began timestamptz;
  v_pending timestamptz;
  v_sleeping timestamptz;
  v_expiry timestamptz;
begin
  begin
    if not exists (select from absurd_server.replica r
                    where r.replica_id = p_replica and r.seen_at > clock_timestamp() - interval '5 seconds') then
      insert into absurd_server.replica as r (replica_id, seen_at) values (p_replica, clock_timestamp())
          on conflict (replica_id) do update set seen_at = excluded.seen_at;
    end if;
  exception when lock_not_available then
    null;
  end;
  now_us := (extract(epoch from v_now) * 1000000)::bigint;
  select count(*) into others from absurd_server.replica r
   where r.replica_id <> p_replica and r.seen_at > clock_timestamp() - interval '20 seconds';
  select coalesce(max(m.min_server), 0) into min_server from absurd_server.migration m;
  return next;

  foreach queue_name in array p_queues loop
    missing := false;
    locked := false;
    problem := null;
    claimable := false;
    expired := false;
    cancellable := false;
    next_available_ms := null;
    next_expiry_ms := null;
    v_began := clock_timestamp();
    begin
      perform absurd_server.lock_for_read('r_' || queue_name, 't_' || queue_name);
      execute format(
        'select (select r.available_at from absurd.%1$I r where r.state = ''pending''
                  order by r.available_at limit 1),
                (select r.available_at from absurd.%1$I r where r.state = ''sleeping''
                    and r.available_at < ''infinity'' order by r.available_at limit 1),
                (select r.claim_expires_at from absurd.%1$I r where r.state = ''running''
                    and r.claim_expires_at is not null order by r.claim_expires_at limit 1),
                exists (select from absurd.%2$I t where t.cancellation is not null)',
        'r_' || queue_name, 't_' || queue_name) into v_pending, v_sleeping, v_expiry, cancellable;
      claimable := coalesce(least(v_pending, v_sleeping) <= v_now, false);
      expired := coalesce(v_expiry <= v_now, false);
      -- least() skips nulls; a pending run may also lie in the future.
      next_available_ms := ceil(extract(epoch from
        least(case when v_pending > v_now then v_pending end, case when v_sleeping > v_now then v_sleeping end)
        - v_now) * 1000)::bigint;
      next_expiry_ms := ceil(extract(epoch from v_expiry - v_now) * 1000)::bigint;
    exception
      when undefined_table then
        missing := true;
      when lock_not_available then
        locked := true;
      when others then
        problem := sqlstate || ' ' || sqlerrm;
    end;
    took_us := (extract(epoch from clock_timestamp() - v_began) * 1000000)::bigint;
    return next;
  end loop;
end
$$;

-- Ends of tasks, for all waiters of a replica in one statement. Only tasks that have ended (or do not exist) come back. A queue
-- that cannot be read now is left out: its waiters wait on, and nobody else's do.
create or replace function absurd_server.ended(p_queues text[], p_task_ids uuid[])
returns table (queue_name text, task_id uuid, state text, result jsonb, failure_reason jsonb)
language plpgsql set lock_timeout = '20ms' as $$
declare
  v_queue text;
begin
  for v_queue in select distinct q from unnest(p_queues) as q loop
    begin
      perform absurd_server.lock_for_read('r_' || v_queue, 't_' || v_queue);
      return query execute format(
        'select $1, i.task_id, coalesce(t.state, ''missing''),
                case when t.state = ''completed'' then t.completed_payload end,
                case when t.state = ''failed''
                     then (select r.failure_reason from absurd.%I r where r.run_id = t.last_attempt_run) end
           from unnest($2, $3) as i (queue_name, task_id)
           left join absurd.%I t on t.task_id = i.task_id
          where i.queue_name = $1 and coalesce(t.state, ''missing'') not in (''pending'', ''running'', ''sleeping'')',
        'r_' || v_queue, 't_' || v_queue) using v_queue, p_queues, p_task_ids;
    exception
      when undefined_table then
        return query select v_queue, i.task_id, 'missing', null::jsonb, null::jsonb
                       from unnest(p_queues, p_task_ids) as i (queue_name, task_id) where i.queue_name = v_queue;
      when others then
        null;
    end;
  end loop;
end
$$;
