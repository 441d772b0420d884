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
-- The doorbell: how a direct SQL writer wakes an idle dispatcher.
-- A NOTIFY in a transaction that writes serialises the commits of the whole cluster, so nothing notifies under load:
-- only a writer that finds an armed row does, and it takes the row away with it.

-- Takes all armed rows of a queue that nobody else holds; true when it got one.
create or replace function absurd_server.take_armed(p_queue text, p_except_replica text) returns boolean
language plpgsql as $$
declare
  v_taken integer;
begin
  if not exists (select from absurd_server.armed a where a.queue_name = p_queue) then
    return false;
  end if;
  with free as (
    select a.armed_id from absurd_server.armed a
     where a.queue_name = p_queue and a.replica_id is distinct from p_except_replica
       for update skip locked)
  delete from absurd_server.armed a using free where a.armed_id = free.armed_id;
  get diagnostics v_taken = row_count;
  return v_taken > 0;
end
$$;

-- Security definer with a pinned search path: the writer needs no rights here. Its own errors are swallowed: a hint may
-- be lost, the writer's transaction may not.
create or replace function absurd_server.ring_doorbell() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('absurd_server.writer', true) = 'on' then
    return null;
  end if;
  if absurd_server.take_armed(tg_argv[0], null) then
    perform pg_notify('absurd_server', 'q' || tg_argv[0]);
  end if;
  return null;
exception when others then
  return null;
end
$$;

-- Rings other replicas for queues that this one wrote to. Called on its own, after the data is committed.
create or replace function absurd_server.ring(p_queues text[], p_replica text) returns void
language plpgsql as $$
declare
  v_queue text;
begin
  foreach v_queue in array p_queues loop
    if absurd_server.take_armed(v_queue, p_replica) then
      perform pg_notify('absurd_server', 'q' || v_queue);
    end if;
  end loop;
end
$$;

create or replace function absurd_server.arm(p_queues text[], p_replica text) returns void
language sql as $$
  insert into absurd_server.armed (queue_name, replica_id) select q, p_replica from unnest(p_queues) as q
$$;

-- Hangs the doorbell on one queue; does nothing, and takes no lock, when it hangs there.
create or replace function absurd_server.install_doorbell(p_queue text) returns boolean
language plpgsql as $$
begin
  if to_regclass(format('absurd.%I', 'r_' || p_queue)) is null then
    return false;
  end if;
  if not exists (select from pg_catalog.pg_trigger
                  where tgname = 'absurd_server_doorbell'
                    and tgrelid = to_regclass(format('absurd.%I', 'r_' || p_queue))) then
    execute format('create trigger absurd_server_doorbell after insert on absurd.%I
                    for each statement execute function absurd_server.ring_doorbell(%L)', 'r_' || p_queue, p_queue);
  end if;
  if not exists (select from pg_catalog.pg_trigger
                  where tgname = 'absurd_server_doorbell'
                    and tgrelid = to_regclass(format('absurd.%I', 'e_' || p_queue))) then
    execute format('create trigger absurd_server_doorbell after insert or update of payload on absurd.%I
                    for each row when (new.payload is not null)
                    execute function absurd_server.ring_doorbell(%L)', 'e_' || p_queue, p_queue);
  end if;
  return true;
end
$$;
-- Cleanup of what ended long ago (contract sections 7.24, 7.25). Installed in our side schema too, under the same names:
-- in a database that upstream's tool made, the server cleans up with these.
-- The oldest ends are found by index, one walk per way to end. What is found is locked and looked at again before it
-- goes: a task that was just retried and an event that was just emitted stay. What somebody else holds is left for the
-- next call. The settings hold the planner to these walks where it has no statistics yet.

create or replace function absurd_server.cleanup_tasks(p_queue_name text, p_ttl_seconds integer, p_limit integer default 1000)
returns integer
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_cutoff timestamptz;
  v_tasks uuid[];
begin
  if p_ttl_seconds is null or p_ttl_seconds < 0 then
    raise exception 'the time to live must be 0 seconds or more';
  end if;
  v_cutoff := absurd.current_time() - make_interval(secs => p_ttl_seconds);

  -- Runs are locked before their task, as everywhere; a task with a run that somebody holds is passed over. Rows are looked up
  -- one by one, by their keys (offset 0 keeps it so): without statistics a planner would walk the whole history for them.
  execute format(
    'with ended as (
       (select r.task_id, r.completed_at as at
          from absurd.%2$I r
         cross join lateral (select t.state, t.last_attempt_run from absurd.%1$I t where t.task_id = r.task_id offset 0) t
         where r.completed_at < $1 and t.state = ''completed'' and t.last_attempt_run = r.run_id
         order by r.completed_at limit $2)
       union all
       (select r.task_id, r.failed_at
          from absurd.%2$I r
         cross join lateral (select t.state, t.last_attempt_run from absurd.%1$I t where t.task_id = r.task_id offset 0) t
         where r.failed_at < $1 and t.state = ''failed'' and t.last_attempt_run = r.run_id
         order by r.failed_at limit $2)
       union all
       (select t.task_id, t.cancelled_at
          from absurd.%1$I t
         cross join lateral (select r.run_id from absurd.%2$I r where r.run_id = t.last_attempt_run offset 0) r
         where t.cancelled_at < $1 and t.state = ''cancelled''
         order by t.cancelled_at limit $2)),
     oldest as materialized (select e.task_id from ended e order by e.at limit $2),
     owned as materialized (
       select o.task_id, r.run_id from oldest o
        cross join lateral (select r.run_id from absurd.%2$I r where r.task_id = o.task_id offset 0) r),
     free as materialized (
       select u.run_id from (select * from owned order by run_id) u
        cross join lateral (select from absurd.%2$I r where r.run_id = u.run_id for update skip locked) r)
     select array_agg(o.task_id) from oldest o
      where o.task_id not in (
        select u.task_id from owned u where u.run_id not in (select f.run_id from free f))',
    't_' || p_queue_name, 'r_' || p_queue_name) into v_tasks using v_cutoff, p_limit;
  if v_tasks is null then
    return 0;
  end if;

  -- The newest version decides: a task that was retried meanwhile has another state.
  execute format(
    'select array_agg(x.task_id) from (
       select t.task_id from absurd.%I t
        where t.task_id = any ($1) and t.state in (''completed'', ''failed'', ''cancelled'')
        order by t.task_id for update skip locked) x',
    't_' || p_queue_name) into v_tasks using v_tasks;
  if v_tasks is null then
    return 0;
  end if;

  execute format('delete from absurd.%I w where w.task_id = any ($1)', 'w_' || p_queue_name) using v_tasks;
  execute format('delete from absurd.%I c where c.task_id = any ($1)', 'c_' || p_queue_name) using v_tasks;
  execute format('delete from absurd.%I r where r.task_id = any ($1)', 'r_' || p_queue_name) using v_tasks;
  if to_regclass(format('absurd.%I', 'i_' || p_queue_name)) is not null then
    execute format('delete from absurd.%I i where i.task_id = any ($1)', 'i_' || p_queue_name) using v_tasks;
  end if;
  execute format('delete from absurd.%I t where t.task_id = any ($1)', 't_' || p_queue_name) using v_tasks;
  return cardinality(v_tasks);
end
$$;

-- Placeholders carry the oldest time there is and go first; an awaiter that loses its placeholder makes it anew.
create or replace function absurd_server.cleanup_events(p_queue_name text, p_ttl_seconds integer, p_limit integer default 1000)
returns integer
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_rows integer;
begin
  if p_ttl_seconds is null or p_ttl_seconds < 0 then
    raise exception 'the time to live must be 0 seconds or more';
  end if;
  execute format(
    'with oldest as materialized (
       select e.event_name from absurd.%1$I e
        where e.emitted_at < $1 order by e.emitted_at limit $2 for update skip locked)
     delete from absurd.%1$I e using oldest o where e.event_name = o.event_name',
    'e_' || p_queue_name) using absurd.current_time() - make_interval(secs => p_ttl_seconds), p_limit;
  get diagnostics v_rows = row_count;
  return v_rows;
end
$$;
-- What the server does by itself for the queues' policies: cleanup, partitions ahead, detaching.

-- The last round of each queue, for whoever asks how it went.
create table if not exists absurd_server.upkeep (
  queue_name         text primary key,
  ran_at             timestamptz not null,
  tasks_deleted      bigint not null default 0,
  events_deleted     bigint not null default 0,
  partitions_dropped integer not null default 0,
  problem            text
);

-- One bounded batch of everything for one queue. A part that fails is told and does not stop the others; whatever needs a
-- table for itself waits for it for a moment only, and is tried again in the next round.
create or replace function absurd_server.upkeep(p_queue text)
returns table (tasks_deleted integer, events_deleted integer, partitions_dropped integer, more boolean, problem text)
language plpgsql as $$
declare
  v_queue absurd.queues%rowtype;
  v_ttl integer;
  v_found record;
begin
  select * into v_queue from absurd.queues q where q.queue_name = p_queue;
  if not found then
    return;
  end if;
  tasks_deleted := 0;
  events_deleted := 0;
  partitions_dropped := 0;
  v_ttl := least(floor(extract(epoch from v_queue.cleanup_ttl)), 2147483647)::integer;
  begin
    tasks_deleted := absurd_server.cleanup_tasks(p_queue, v_ttl, v_queue.cleanup_limit);
    events_deleted := absurd_server.cleanup_events(p_queue, v_ttl, v_queue.cleanup_limit);
  exception when others then
    problem := 'cleanup: ' || sqlerrm;
  end;
  more := v_queue.cleanup_limit in (tasks_deleted, events_deleted);
  if v_queue.storage_mode <> 'partitioned' then
    return next;
    return;
  end if;

  perform set_config('lock_timeout', '200ms', true);
  begin
    perform absurd.ensure_partitions(p_queue);
  exception when others then
    problem := concat_ws('; ', problem, 'partitions: ' || sqlerrm);
  end;
  for v_found in select c.parent_table, c.partition_table from absurd.list_detach_candidates(p_queue) c loop
    begin
      execute format('alter table absurd.%I detach partition absurd.%I', v_found.parent_table, v_found.partition_table);
      -- A row that came after the look must not go with the table.
      if absurd_server.is_empty(v_found.partition_table) then
        perform absurd.drop_detached_partition(v_found.partition_table);
        partitions_dropped := partitions_dropped + 1;
      else
        raise exception 'it is no longer empty';
      end if;
    exception when others then
      problem := concat_ws('; ', problem, format('detach %s: %s', v_found.partition_table, sqlerrm));
    end;
  end loop;
  return next;
end
$$;

create or replace function absurd_server.is_empty(p_table text) returns boolean
language plpgsql as $$
declare
  v_full boolean;
begin
  execute format('select exists (select from absurd.%I)', p_table) into v_full;
  return not v_full;
end
$$;
-- Events for callers of the server: as the contract's functions (7.21, 7.22), with timeouts that last.
-- A wait with a timeout leaves a mark under its step's name: a checkpoint without value and owner, which everybody else
-- takes for none. Its time is the deadline; its status says whether that has passed.

create or replace function absurd_server.await_event(p_queue text, p_run_id uuid, p_digest text, p_step text,
                                                     p_event text, p_timeout_ms bigint)
returns table (known boolean, owned boolean, state text, expired boolean, task_id uuid, outcome text, payload jsonb,
               wake_at timestamptz)
language plpgsql as $$
#variable_conflict use_column
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task_id uuid;
  v_live boolean;
  v_event record;
  v_mark record;
  v_deadline timestamptz;
begin
  execute format('select r.task_id, r.state = ''running'' and coalesce($2 is null or right(r.claimed_by, 23) = ''#'' || $2, false)
                    from absurd.%I r where r.run_id = $1', 'r_' || p_queue)
    into v_task_id, v_live using p_run_id, p_digest;
  known := v_task_id is not null;
  if not known then
    return next;
    return;
  end if;
  task_id := v_task_id;

  -- The event before the run, on both sides: no emission falls between "not there yet" and "now I wait". A wait that will be
  -- refused makes no event.
  loop
    if v_live then
      execute format('insert into absurd.%I (event_name, payload, emitted_at) values ($1, null, ''epoch'')
                          on conflict (event_name) do nothing', 'e_' || p_queue) using p_event;
    end if;
    execute format('select e.payload, true as there from absurd.%I e where e.event_name = $1 for share', 'e_' || p_queue)
      into v_event using p_event;
    exit when v_event.there or not v_live;
  end loop;
  execute format('select r.state, r.claimed_by, r.wake_event, r.event_payload, r.available_at,
                         coalesce(r.failure_reason ->> ''name'' = ''$ClaimTimeout'', false) as expired
                    from absurd.%I r where r.run_id = $1 for update', 'r_' || p_queue) into v_run using p_run_id;
  execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue)
    into state using v_task_id;
  if state <> 'cancelled' then
    state := v_run.state;
  end if;
  owned := p_digest is null or coalesce(right(v_run.claimed_by, 23) = '#' || p_digest, false);
  expired := v_run.expired;
  execute format('select c.state, c.status, c.updated_at from absurd.%I c
                   where c.task_id = $1 and c.checkpoint_name = $2', 'c_' || p_queue)
    into v_mark using v_task_id, p_step;

  if state in ('pending', 'sleeping') and v_run.claimed_by is null then
    -- Said twice: this very wait has put the run to sleep.
    if v_run.wake_event = p_event or (v_mark.state is not null and v_mark.state = v_event.payload) then
      outcome := 'suspended';
      wake_at := nullif(v_run.available_at, 'infinity');
    end if;
    return next;
    return;
  elsif state <> 'running' or not owned then
    return next;
    return;
  elsif not v_live then
    raise exception 'the run was claimed at the same time' using errcode = 'serialization_failure';
  end if;

  if v_run.event_payload is not null then
    execute format('update absurd.%I r set event_payload = null where r.run_id = $1', 'r_' || p_queue) using p_run_id;
  end if;
  if v_mark.state is not null then
    outcome := 'payload';
    payload := v_mark.state;
    return next;
    return;
  end if;
  if v_mark.status = 'timed_out' then
    outcome := 'timed_out';
    return next;
    return;
  end if;
  if v_event.payload is not null then
    execute format(
      'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       values ($1, $2, $3, ''committed'', $4, $5)
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at', 'c_' || p_queue)
      using v_task_id, p_step, v_event.payload, p_run_id, v_now;
    outcome := 'payload';
    payload := v_event.payload;
    return next;
    return;
  end if;

  -- The first deadline counts. A wait that was begun by SQL has left no mark, only the signal of its end.
  v_deadline := case when v_mark.status = 'awaiting' then v_mark.updated_at
                     when v_run.wake_event = p_event and v_run.event_payload is null then v_now
                     else v_now + p_timeout_ms * interval '1 millisecond' end;
  if v_deadline is not null then
    execute format(
      'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       values ($1, $2, null, $3, null, $4)
           on conflict (task_id, checkpoint_name) do update
          set status = excluded.status, updated_at = excluded.updated_at', 'c_' || p_queue)
      using v_task_id, p_step, case when v_deadline <= v_now then 'timed_out' else 'awaiting' end, v_deadline;
  end if;
  if v_deadline <= v_now then
    execute format('update absurd.%I r set wake_event = null where r.run_id = $1 and r.wake_event is not null',
                   'r_' || p_queue) using p_run_id;
    execute format('delete from absurd.%I w where w.run_id = $1 and w.step_name = $2', 'w_' || p_queue)
      using p_run_id, p_step;
    outcome := 'timed_out';
    return next;
    return;
  end if;

  execute format(
    'insert into absurd.%I (task_id, run_id, step_name, event_name, timeout_at, created_at)
     values ($1, $2, $3, $4, $5, $6)
         on conflict (run_id, step_name) do update
        set event_name = excluded.event_name, timeout_at = excluded.timeout_at, created_at = excluded.created_at',
    'w_' || p_queue) using v_task_id, p_run_id, p_step, p_event, v_deadline, v_now;
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = $3, event_payload = null
                   where r.run_id = $1', 'r_' || p_queue)
    using p_run_id, coalesce(v_deadline, 'infinity'), p_event;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue) using v_task_id;
  outcome := 'suspended';
  wake_at := v_deadline;
  return next;
end
$$;
-- Time for callers of the server: moving runs, sleeping, and the orchestrator's "this run sleeps now".

-- Locks a run and its task, in this order, and says what a write about the run needs to know.
create or replace function absurd_server.hold_run(p_queue text, p_run_id uuid, p_digest text)
returns table (known boolean, owned boolean, state text, expired boolean, task_id uuid, claimed boolean, wake_event text,
               available_at timestamptz)
language plpgsql as $$
declare
  v_run record;
  v_task_state text;
begin
  execute format('select r.task_id, r.state, r.claimed_by, r.wake_event, r.available_at,
                         coalesce(r.failure_reason ->> ''name'' = ''$ClaimTimeout'', false) as expired
                    from absurd.%I r where r.run_id = $1 for update', 'r_' || p_queue) into v_run using p_run_id;
  known := v_run.task_id is not null;
  if known then
    execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue)
      into v_task_state using v_run.task_id;
    task_id := v_run.task_id;
    state := case when v_task_state = 'cancelled' then v_task_state else v_run.state end;
    owned := p_digest is null or coalesce(right(v_run.claimed_by, 23) = '#' || p_digest, false);
    expired := v_run.expired;
    claimed := v_run.claimed_by is not null;
    wake_event := v_run.wake_event;
    available_at := v_run.available_at;
  end if;
  return next;
end
$$;

-- Lets a run and its task sleep until a time; the claim is over.
create or replace function absurd_server.suspend_run(p_queue text, p_run_id uuid, p_task_id uuid, p_until timestamptz,
                                                     p_event text) returns void
language plpgsql as $$
begin
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = $3
                   where r.run_id = $1', 'r_' || p_queue) using p_run_id, p_until, p_event;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue) using p_task_id;
end
$$;

create or replace function absurd_server.schedule_run(p_queue text, p_run_id uuid, p_digest text, p_wake_at timestamptz,
                                                      p_delay_ms bigint)
returns table (known boolean, owned boolean, state text, expired boolean, done boolean, wake_at timestamptz)
language plpgsql as $$
declare
  v_held record;
  v_wake_at timestamptz := coalesce(p_wake_at, absurd.current_time() + p_delay_ms * interval '1 millisecond');
begin
  select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
  known := v_held.known;
  owned := v_held.owned;
  state := v_held.state;
  expired := v_held.expired;
  if v_held.state = 'running' and v_held.owned
     or v_held.state in ('pending', 'sleeping') and v_held.wake_event is null and p_digest is null then
    perform absurd_server.suspend_run(p_queue, p_run_id, v_held.task_id, v_wake_at, null);
    done := true;
    wake_at := v_wake_at;
  elsif v_held.state = 'sleeping' and v_held.wake_event is null and not v_held.claimed then
    done := true;  -- said twice: the claim that is shown has put it to sleep
    wake_at := v_held.available_at;
  end if;
  return next;
end
$$;

drop function if exists absurd_server.sleep_run(text, uuid, text, text, bigint);
create or replace function absurd_server.sleep_run(p_queue text, p_run_id uuid, p_digest text, p_step text,
                                                   p_wake_at timestamptz, p_duration_us bigint)
returns table (known boolean, owned boolean, state text, expired boolean, done boolean, wake_at timestamptz)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_held record;
  v_stored jsonb;
  v_wake_at timestamptz;
begin
  select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
  known := v_held.known;
  owned := v_held.owned;
  state := v_held.state;
  expired := v_held.expired;
  if not known then
    return next;
    return;
  end if;
  execute format('select c.state from absurd.%I c where c.task_id = $1 and c.checkpoint_name = $2', 'c_' || p_queue)
    into v_stored using v_held.task_id, p_step;
  -- A time as the SDKs store it: a text in ISO form. Anything else under this name is another step's result.
  begin
    v_wake_at := (v_stored #>> '{}')::timestamptz;
  exception when data_exception then
    raise exception 'is the name of a step whose result is no time; two steps need two names';
  end;
  if v_held.state = 'running' and v_held.owned then
    if v_wake_at is null then
      -- Ten years of microseconds are far below 2^53, so the product is exact.
      v_wake_at := coalesce(p_wake_at, v_now + p_duration_us * interval '1 microsecond');
      execute format(
        'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
         values ($1, $2, $3, ''committed'', $4, $5)
             on conflict (task_id, checkpoint_name) do update
            set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
                updated_at = excluded.updated_at', 'c_' || p_queue)
        using v_held.task_id, p_step, to_jsonb(to_char(v_wake_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')),
              p_run_id, v_now;
    end if;
    done := true;
    if v_wake_at > v_now then
      perform absurd_server.suspend_run(p_queue, p_run_id, v_held.task_id, v_wake_at, null);
      wake_at := v_wake_at;
    end if;
  elsif v_held.state in ('pending', 'sleeping') and not v_held.claimed and v_wake_at = v_held.available_at then
    done := true;  -- said twice
    wake_at := v_wake_at;
  end if;
  return next;
end
$$;

create or replace function absurd_server.set_run_sleeping(p_queue text, p_run_id uuid, p_digest text, p_event text)
returns table (known boolean, owned boolean, state text, expired boolean, done boolean, wake_at timestamptz)
language plpgsql as $$
declare
  v_held record;
  v_wake_at timestamptz;
begin
  select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
  known := v_held.known;
  owned := v_held.owned;
  state := v_held.state;
  expired := v_held.expired;
  if v_held.state = 'sleeping' and v_held.wake_event = p_event then
    done := true;
    wake_at := nullif(v_held.available_at, 'infinity');
  elsif v_held.state = 'running' and v_held.owned then
    execute format('select coalesce(min(w.timeout_at), $2) from absurd.%I w where w.run_id = $1', 'w_' || p_queue)
      into v_wake_at using p_run_id, absurd.current_time() + interval '24 hours';
    perform absurd_server.suspend_run(p_queue, p_run_id, v_held.task_id, v_wake_at, p_event);
    done := true;
    wake_at := v_wake_at;
  end if;
  return next;
end
$$;
-- Tracking records of workflow runs. The engine does not read them; tasks name them in their headers.

create table if not exists absurd_server.workflow_run (
  workflow_run_id  uuid primary key,
  workflow_name    text not null,
  workflow_version text not null,
  workflow_hash    text,
  status           text not null default 'pending'
                   check (status in ('pending', 'running', 'completed', 'failed', 'cancelled')),
  absurd_run_id    uuid,
  absurd_queue     text not null,
  inputs           jsonb,
  result           jsonb,
  error            jsonb,
  created_by       text,
  tags             jsonb,
  task_count       integer,
  created_at       timestamptz not null default absurd.current_time(),
  started_at       timestamptz,
  completed_at     timestamptz
);
-- Newest first, over all, and within a name or a state.
create index if not exists workflow_run_created on absurd_server.workflow_run (created_at, workflow_run_id);
create index if not exists workflow_run_name on absurd_server.workflow_run (workflow_name, created_at, workflow_run_id);
create index if not exists workflow_run_status on absurd_server.workflow_run (status, created_at, workflow_run_id);
create index if not exists workflow_run_tags on absurd_server.workflow_run using gin (tags jsonb_path_ops);
-- Runs that sleep until a task has ended. Such a wait is a wait for an event that the server emits: its name has the task's
-- number of attempts at the time, so that a task which is retried by hand has another end.

create table if not exists absurd_server.awaited_task (
  queue_name    text not null,
  task_id       uuid not null,
  waiting_queue text not null,
  event_name    text not null,
  primary key (queue_name, task_id, waiting_queue, event_name)
);

-- How a task has ended, as the SDKs store it; no snapshot: it has not.
create or replace function absurd_server.task_end(p_queue text, p_task_id uuid)
returns table (known boolean, attempts integer, snapshot jsonb)
language plpgsql as $$
declare
  v_task record;
  v_failure jsonb;
begin
  execute format('select t.state, t.attempts, t.completed_payload, t.last_attempt_run from absurd.%I t
                   where t.task_id = $1', 't_' || p_queue) into v_task using p_task_id;
  known := v_task.state is not null;
  attempts := v_task.attempts;
  if v_task.state = 'completed' then
    snapshot := jsonb_build_object('state', v_task.state, 'result', v_task.completed_payload);
  elsif v_task.state = 'failed' then
    execute format('select r.failure_reason from absurd.%I r where r.run_id = $1', 'r_' || p_queue)
      into v_failure using v_task.last_attempt_run;
    snapshot := jsonb_build_object('state', v_task.state, 'failure', v_failure);
  elsif v_task.state = 'cancelled' then
    snapshot := jsonb_build_object('state', v_task.state);
  end if;
  return next;
end
$$;

create or replace function absurd_server.await_task(p_queue text, p_run_id uuid, p_digest text, p_step text,
                                                    p_awaited_queue text, p_task_id uuid, p_timeout_ms bigint)
returns table (found_task boolean, known boolean, owned boolean, state text, expired boolean, outcome text, payload jsonb,
               wake_at timestamptz)
language plpgsql as $$
#variable_conflict use_column
declare
  v_run record;
  v_mark record;
  v_held record;
  v_end record;
  v_event text;
begin
  execute format('select r.task_id, r.state = ''running''
                         and coalesce($2 is null or right(r.claimed_by, 23) = ''#'' || $2, false) as live
                    from absurd.%I r where r.run_id = $1', 'r_' || p_queue) into v_run using p_run_id, p_digest;
  if p_awaited_queue = p_queue and p_task_id = v_run.task_id then
    raise exception 'a task cannot wait for its own end';
  end if;
  execute format('select c.state, c.status from absurd.%I c where c.task_id = $1 and c.checkpoint_name = $2', 'c_' || p_queue)
    into v_mark using v_run.task_id, p_step;
  if to_regclass(format('absurd.%I', 't_' || p_awaited_queue)) is not null then
    select * into v_end from absurd_server.task_end(p_awaited_queue, p_task_id);
    found_task := v_end.known;
  else
    found_task := false;
  end if;
  -- The step's own result comes first: the task that it waited for may be gone since. A run that is not live goes the usual
  -- way, which knows a call that was said twice, as long as there is a task to name the event by. Only the run and its task are
  -- locked here, no event.
  if (v_mark.state is not null or v_mark.status = 'timed_out') and (v_run.live or not found_task) then
    select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
    found_task := true;
    known := v_held.known;
    owned := v_held.owned;
    state := v_held.state;
    expired := v_held.expired;
    if v_held.state = 'running' and v_held.owned then
      execute format('update absurd.%I r set event_payload = null where r.run_id = $1 and r.event_payload is not null',
                     'r_' || p_queue) using p_run_id;
      outcome := case when v_mark.state is not null then 'payload' else 'timed_out' end;
      payload := v_mark.state;
    end if;
    return next;
    return;
  end if;
  if not found_task then
    return next;
    return;
  end if;
  v_event := '$taskEnd:' || p_awaited_queue || ':' || p_task_id || ':' || v_end.attempts;
  if v_end.snapshot is not null then
    perform absurd_server.emit_event(p_queue, v_event, v_end.snapshot);
  else
    insert into absurd_server.awaited_task (queue_name, task_id, waiting_queue, event_name)
    values (p_awaited_queue, p_task_id, p_queue, v_event) on conflict do nothing;
  end if;
  return query
    select true, a.known, a.owned, a.state, a.expired, a.outcome, a.payload, a.wake_at
      from absurd_server.await_event(p_queue, p_run_id, p_digest, p_step, v_event, p_timeout_ms) a;
end
$$;

-- Wakes the runs whose tasks have ended, or are gone: those of `p_tasks`, or all. Each on its own, so that one that fails
-- holds up no other, nor does one whose rows are held by somebody's open transaction: its turn comes again. A queue that
-- cannot be looked at, or written to, is left out, and costs the others no waiting. Each waiting queue has a share of the limit,
-- so that none uses up another's. Says which queues have woken runs.
create or replace function absurd_server.settle_awaited(p_queue text, p_tasks uuid[], p_limit integer)
returns table (waiting_queue text)
language plpgsql set lock_timeout = '100ms' as $$
#variable_conflict use_column
declare
  v_queue text;
  v_ended text;
  v_waiting text[];
  v_row record;
  v_snapshot jsonb;
  v_closed text[] := '{}';
  v_open text[] := '{}';
  v_refusals integer := 0;
begin
  for v_queue in
    select distinct a.queue_name from absurd_server.awaited_task a where p_queue is null or a.queue_name = p_queue
  loop
    begin
      -- Of a queue that was dropped, all tasks are gone.
      if to_regclass(format('absurd.%I', 't_' || v_queue)) is null then
        v_ended := 'true';
      else
        perform absurd_server.lock_for_read('r_' || v_queue, 't_' || v_queue);
        v_ended := format('not exists (select from absurd.%I t where t.task_id = a.task_id
                                          and t.state not in (''completed'', ''failed'', ''cancelled''))', 't_' || v_queue);
      end if;
      select array_agg(distinct a.waiting_queue) into v_waiting
        from absurd_server.awaited_task a
       where a.queue_name = v_queue and (p_tasks is null or a.task_id = any (p_tasks)) and a.waiting_queue <> all (v_closed);
      for i in 1 .. coalesce(cardinality(v_waiting), 0) loop
        if v_waiting[i] <> all (v_open) then
          if absurd_server.queue_access(v_waiting[i]) in ('reads', 'locked', 'unusable') then
            v_closed := v_closed || v_waiting[i];
          else
            v_open := v_open || v_waiting[i];
          end if;
        end if;
      end loop;
      for v_row in
        execute format(
          'select a.task_id, a.waiting_queue, a.event_name
             from (select a.*, row_number() over (partition by a.waiting_queue) as place
                     from absurd_server.awaited_task a
                    where a.queue_name = $1 and a.waiting_queue = any ($4) and ($2 is null or a.task_id = any ($2))
                      and %s) x
             join absurd_server.awaited_task a using (queue_name, task_id, waiting_queue, event_name)
            where x.place <= $3
              for update of a skip locked', v_ended)
        using v_queue, p_tasks, greatest(p_limit / greatest(cardinality(v_waiting), 1), 20),
              array(select w from unnest(v_waiting) w where w = any (v_open))
      loop
        begin
          v_snapshot := null;
          if v_ended <> 'true' then
            select e.snapshot into v_snapshot from absurd_server.task_end(v_queue, v_row.task_id) e;
          end if;
          if to_regclass(format('absurd.%I', 'e_' || v_row.waiting_queue)) is not null then
            perform absurd_server.emit_event(
              v_row.waiting_queue, v_row.event_name,
              coalesce(v_snapshot, '{"state": "failed", "failure": {"name": "TaskNotFound", "message": "the task is gone"}}'));
          end if;
          delete from absurd_server.awaited_task a
           where a.queue_name = v_queue and a.task_id = v_row.task_id and a.waiting_queue = v_row.waiting_queue
             and a.event_name = v_row.event_name;
          waiting_queue := v_row.waiting_queue;
          return next;
        exception when others then
          raise warning 'the runs that wait for task % could not be woken: %', v_row.task_id, sqlerrm;
          -- Many held rows must not use up the statement's time: each wait is shorter than the one before.
          v_refusals := v_refusals + 1;
          perform set_config('lock_timeout', greatest(1, 100 / v_refusals) || 'ms', true);
        end;
      end loop;
    exception when others then
      raise warning 'the awaited tasks of queue % could not be looked at: %', v_queue, sqlerrm;
    end;
  end loop;
end
$$;
-- An event that many runs wait for wakes them in batches, each a transaction of its own. The event stands from the first one
-- on; what is left to wake is noted, so that it goes on whatever happens to the server that began it.
-- Many events in one transaction: all events first, then all runs that wait for any of them, so that emissions, waits and
-- whatever else takes several rows take them in one order.

create table if not exists absurd_server.emission (
  queue_name text not null,
  event_name text not null,
  primary key (queue_name, event_name)
);

-- Wakes up to p_limit runs that wait for these emitted events, and says for which there are more.
create or replace function absurd_server.wake_waiting(p_queue text, p_events text[], p_payloads jsonb[], p_limit integer)
returns table (event_name text, woken bigint, more boolean)
language plpgsql as $$
#variable_conflict use_column
declare
  v_now timestamptz := absurd.current_time();
  v_each integer := greatest(1, p_limit / greatest(1, cardinality(p_events)));
  v_woken text[];
begin
  -- Runs are looked up one by one, by their key (offset 0 keeps it so): without statistics a planner expects few sleeping
  -- runs, and would go through all of them for each wait.
  execute format(
    'with event as materialized (select * from unnest($1, $2) as e (event_name, payload)),
     waiting as materialized (
       select w.run_id, w.task_id, w.step_name, event.event_name, event.payload
         from event
        cross join lateral (
          select w.run_id, w.task_id, w.step_name from absurd.%1$I w
           cross join lateral (select r.state from absurd.%2$I r where r.run_id = w.run_id offset 0) r
           where w.event_name = event.event_name and r.state = ''sleeping'' limit $4) w),
     locked as materialized (
       select u.* from (select * from waiting order by run_id) u
        cross join lateral (select r.state from absurd.%2$I r where r.run_id = u.run_id offset 0 for update) r
        where r.state = ''sleeping''),
     -- It carries along what the rest needs: parts that are joined would be compared pair by pair.
     woken as (
       update absurd.%2$I r
          set state = ''pending'', available_at = $3, wake_event = null, event_payload = locked.payload, claimed_by = null,
              claim_expires_at = null
         from locked where r.run_id = locked.run_id
       returning r.run_id, locked.task_id, locked.step_name, locked.event_name, locked.payload),
     stored as (
       insert into absurd.%3$I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       select woken.task_id, woken.step_name, woken.payload, ''committed'', woken.run_id, $3 from woken
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at),
     tasks as (
       update absurd.%4$I t set state = ''pending'' from woken where t.task_id = woken.task_id),
     gone as (
       delete from absurd.%1$I w using woken where w.run_id = woken.run_id and w.step_name = woken.step_name)
     select coalesce(array_agg(event_name), ''{}'') from woken',
    'w_' || p_queue, 'r_' || p_queue, 'c_' || p_queue, 't_' || p_queue)
    into v_woken using p_events, p_payloads, v_now, v_each;
  return query execute format(
    'with count as materialized (select name, count(*) as woken from unnest($2) as name group by name)
     select e.event_name, coalesce((select count.woken from count where count.name = e.event_name), 0),
            exists (select from absurd.%I w
                     cross join lateral (select r.state from absurd.%I r where r.run_id = w.run_id offset 0) r
                     where w.event_name = e.event_name and r.state = ''sleeping'')
       from unnest($1) as e (event_name)',
    'w_' || p_queue, 'r_' || p_queue) using p_events, v_woken;
end
$$;

-- Keeps the notes of what is left to wake in step with the events.
create or replace function absurd_server.note_emission(p_queue text, p_event text, p_more boolean) returns void
language plpgsql as $$
begin
  if p_more then
    insert into absurd_server.emission (queue_name, event_name) values (p_queue, p_event) on conflict do nothing;
  else
    delete from absurd_server.emission where queue_name = p_queue and event_name = p_event;
  end if;
end
$$;

-- Emits events, none twice, in the order of their names: the first emission of a name wins, and wakes runs that wait for it.
create or replace function absurd_server.emit_events(p_queue text, p_events text[], p_payloads jsonb[], p_limit integer)
returns table (event_name text, applied boolean, woken bigint, more boolean)
language plpgsql as $$
#variable_conflict use_column
declare
  v_now timestamptz := absurd.current_time();
  v_events text[];
  v_payloads jsonb[];
  v_waited boolean;
begin
  execute format(
    'with fresh as (
       insert into absurd.%I as e (event_name, payload, emitted_at)
       select i.event_name, coalesce(i.payload, ''null''), $3 from unnest($1, $2) as i (event_name, payload)
        order by i.event_name
           on conflict (event_name) do update set payload = excluded.payload, emitted_at = excluded.emitted_at
        where e.payload is null
       returning e.event_name, e.payload)
     select array_agg(event_name), array_agg(payload) from fresh', 'e_' || p_queue)
    into v_events, v_payloads using p_events, p_payloads, v_now;
  if v_events is not null then
    -- Waits that are over already are not woken by it.
    execute format('delete from absurd.%I w where w.event_name = any ($1) and w.timeout_at <= $2', 'w_' || p_queue)
      using v_events, v_now;
    execute format('select exists (select from absurd.%I w where w.event_name = any ($1))', 'w_' || p_queue)
      into v_waited using v_events;
  end if;
  if v_waited then
    return query
      select w.event_name, true, w.woken, w.more
        from absurd_server.wake_waiting(p_queue, v_events, v_payloads, p_limit) w
       cross join lateral absurd_server.note_emission(p_queue, w.event_name, w.more);
  else
    return query select e.event_name, true, 0::bigint, false from unnest(v_events) as e (event_name);
  end if;
  return query
    select e.event_name, false, 0::bigint, false from unnest(p_events) as e (event_name)
     where v_events is null or e.event_name <> all (v_events);
end
$$;

-- For the functions of this schema that emit: the first batch; the rest is noted.
create or replace function absurd_server.emit_event(p_queue text, p_event text, p_payload jsonb)
returns table (applied boolean, woken bigint)
language sql as $$
  select applied, woken from absurd_server.emit_events(p_queue, array[p_event], array[p_payload], 1000)
$$;

-- Wakes the next runs of a noted emission.
create or replace function absurd_server.emit_more(p_queue text, p_event text, p_limit integer)
returns table (woken bigint, more boolean)
language plpgsql as $$
declare
  v_payload jsonb;
begin
  if to_regclass(format('absurd.%I', 'e_' || p_queue)) is not null then
    execute format('select e.payload from absurd.%I e where e.event_name = $1', 'e_' || p_queue)
      into v_payload using p_event;
  end if;
  if v_payload is null then
    -- The queue was dropped, or the event cleaned away: nobody hears of it any more.
    delete from absurd_server.emission where queue_name = p_queue and event_name = p_event;
    woken := 0;
    more := false;
    return next;
    return;
  end if;
  return query
    select w.woken, w.more
      from absurd_server.wake_waiting(p_queue, array[p_event], array[v_payload], p_limit) w
     cross join lateral absurd_server.note_emission(p_queue, w.event_name, w.more);
end
$$;
-- Tasks that cannot be moved on: set aside with a reason, so that they hold up nobody else and an operator sees them.

create table if not exists absurd_server.quarantine (
  queue_name text not null,
  run_id     uuid not null,
  task_id    uuid not null,
  reason     text not null,
  problem    text not null,
  times      integer not null default 1,
  since      timestamptz not null default absurd.current_time(),
  retry_at   timestamptz not null,
  primary key (queue_name, run_id)
);

-- claim: claiming it raises, or it cannot be read; lease: its lease ran out and its failure raises; policy: its cancellation
-- raises; size: it fits into no message.
alter table absurd_server.quarantine drop constraint if exists quarantine_reason_check;
alter table absurd_server.quarantine
  add constraint quarantine_reason_check check (reason in ('claim', 'lease', 'policy', 'size'));

-- Forgets what has moved on, or whose queue is gone. A queue that cannot be read now keeps its entries.
create or replace function absurd_server.quarantine_forget() returns void
language plpgsql set lock_timeout = '20ms' as $$
declare
  v_queue text;
begin
  for v_queue in select distinct q.queue_name from absurd_server.quarantine q order by q.queue_name loop
    begin
      if to_regclass(format('absurd.%I', 'r_' || v_queue)) is null then
        delete from absurd_server.quarantine q where q.queue_name = v_queue;
      else
        perform absurd_server.lock_for_read('r_' || v_queue);
        execute format(
          'delete from absurd_server.quarantine q
            where q.queue_name = $1
              and not exists (select from absurd.%I r
                               where r.run_id = q.run_id
                                 and case q.reason when ''lease'' then r.state = ''running''
                                                   when ''policy''
                                                     then r.state in (''pending'', ''sleeping'', ''running'')
                                                   -- One that is too large is put off: it sleeps.
                                                   else r.state in (''pending'', ''sleeping'') end)',
          'r_' || v_queue) using v_queue;
      end if;
    exception when others then
      raise warning 'the set aside tasks of queue % could not be looked at: %', v_queue, sqlerrm;
    end;
  end loop;
end
$$;
