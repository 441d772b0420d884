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
  select case when jsonb_typeof(p_policy) = 'object' and p_policy ->> p_key ~ '^\s*[+-]?[0-9]{1,18}\s*$'
              then (p_policy ->> p_key)::bigint
         end
$$;

-- Whether a task is to be cancelled by its policy (contract section 5.4).
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

-- Delay before the next attempt (contract section 5.3); null for a stored strategy that cannot be used, so that a batch
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

-- One look at many queues, in one statement per replica: what can be claimed, what has expired, what comes next.
-- The first row has no queue; it carries the clock and the number of other replicas.
create or replace function absurd_server.tick(p_queues text[], p_replica text)
returns table (queue_name text, missing boolean, claimable boolean, expired boolean, cancellable boolean,
               next_available_ms bigint, next_expiry_ms bigint, now_us bigint, others integer)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_pending timestamptz;
  v_sleeping timestamptz;
  v_expiry timestamptz;
begin
  update absurd_server.replica r set seen_at = clock_timestamp()
   where r.replica_id = p_replica and r.seen_at < clock_timestamp() - interval '5 seconds';
  if not found then
    insert into absurd_server.replica (replica_id, seen_at) values (p_replica, clock_timestamp())
        on conflict (replica_id) do nothing;
  end if;
  now_us := (extract(epoch from v_now) * 1000000)::bigint;
  select count(*) into others from absurd_server.replica r
   where r.replica_id <> p_replica and r.seen_at > clock_timestamp() - interval '20 seconds';
  return next;

  foreach queue_name in array p_queues loop
    missing := false;
    claimable := false;
    expired := false;
    cancellable := false;
    next_available_ms := null;
    next_expiry_ms := null;
    begin
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
    exception when undefined_table then
      missing := true;
    end;
    return next;
  end loop;
end
$$;

-- Ends of tasks, for all waiters of a replica in one statement. Only tasks that have ended (or do not exist) come back.
create or replace function absurd_server.ended(p_queues text[], p_task_ids uuid[])
returns table (queue_name text, task_id uuid, state text, result jsonb, failure_reason jsonb)
language plpgsql as $$
declare
  v_queue text;
begin
  for v_queue in select distinct q from unnest(p_queues) as q loop
    begin
      return query execute format(
        'select $1, i.task_id, coalesce(t.state, ''missing''),
                case when t.state = ''completed'' then t.completed_payload end,
                case when t.state = ''failed''
                     then (select r.failure_reason from absurd.%I r where r.run_id = t.last_attempt_run) end
           from unnest($2, $3) as i (queue_name, task_id)
           left join absurd.%I t on t.task_id = i.task_id
          where i.queue_name = $1 and coalesce(t.state, ''missing'') not in (''pending'', ''running'', ''sleeping'')',
        'r_' || v_queue, 't_' || v_queue) using v_queue, p_queues, p_task_ids;
    exception when undefined_table then
      return query select v_queue, i.task_id, 'missing', null::jsonb, null::jsonb
                     from unnest(p_queues, p_task_ids) as i (queue_name, task_id) where i.queue_name = v_queue;
    end;
  end loop;
end
$$;
