-- 01_time_and_ids
-- Time and ids of the storage contract (sections 4 and 7.27 to 7.31).
-- Every function reads the clock through absurd.current_time(), so that a session can move it for a test.

create schema if not exists absurd;
-- Tells our databases from upstream's when the side schema is gone.
comment on schema absurd is 'storage contract 0.5.1, installed by absurd-server';

create or replace function absurd.current_time() returns timestamptz
language sql volatile as $$
  select coalesce(nullif(btrim(current_setting('absurd.fake_now', true)), '')::timestamptz, clock_timestamp())
$$;

create or replace function absurd.get_schema_version() returns text
language sql as $$ select '0.5.1'::text $$;

-- 48 bits of milliseconds over a random version 4 id; two set bits turn version 4 into version 7.
create or replace function absurd.portable_uuidv7() returns uuid
language sql volatile as $$
  select encode(
           set_bit(set_bit(
             overlay(uuid_send(gen_random_uuid())
                     placing substring(int8send(floor(extract(epoch from absurd.current_time()) * 1000)::bigint) from 3)
                     from 1 for 6),
             52, 1), 53, 1),
           'hex')::uuid
$$;

create or replace function absurd.uuidv7_timestamp(p_id uuid) returns timestamptz
language sql immutable strict as $$
  select case when get_byte(uuid_send(p_id), 6) >> 4 = 7
              then timestamptz '1970-01-01 00:00:00+00'
                   + ('x0000' || encode(substring(uuid_send(p_id) from 1 for 6), 'hex'))::bit(64)::bigint
                     * interval '1 millisecond'
         end
$$;

create or replace function absurd.uuidv7_floor(p_ts timestamptz) returns uuid
language plpgsql immutable strict as $$
declare
  v_ms numeric := floor(extract(epoch from p_ts) * 1000);
begin
  if v_ms < 0 or v_ms >= 281474976710656 then
    raise exception 'the time % does not fit into an id', p_ts;
  end if;
  return (lpad(to_hex(v_ms::bigint), 12, '0') || '70008000000000000000')::uuid;
end
$$;

create or replace function absurd.week_bucket_utc(p_ts timestamptz) returns timestamptz
language sql immutable strict as $$
  select date_trunc('week', p_ts at time zone 'UTC') at time zone 'UTC'
$$;

create or replace function absurd.partition_week_tag(p_ts timestamptz) returns text
language sql immutable strict as $$
  select right(to_char(absurd.week_bucket_utc(p_ts) at time zone 'UTC', 'IYYY'), 1)
         || to_char(absurd.week_bucket_utc(p_ts) at time zone 'UTC', 'IW')
$$;

-- 02_queues
-- Queues: the registry, the tables of each queue, policies, partitions (contract sections 2, 3, 7.3 to 7.9, 9.1, 9.2).
-- A repeated create_queue looks into the catalogue first and does no DDL when nothing is missing, because even
-- `create index if not exists` locks out writers before it notices.

create table if not exists absurd.queues (
  queue_name          text primary key,
  created_at          timestamptz not null default absurd.current_time(),
  storage_mode        text not null default 'unpartitioned',
  default_partition   text not null default 'enabled',
  partition_lookahead interval not null default interval '28 days',
  partition_lookback  interval not null default interval '1 day',
  cleanup_ttl         interval not null default interval '30 days',
  cleanup_limit       integer not null default 1000,
  detach_mode         text not null default 'none',
  detach_min_age      interval not null default interval '30 days',
  constraint queues_storage_mode_check check (storage_mode in ('unpartitioned', 'partitioned')),
  constraint queues_default_partition_check check (default_partition in ('enabled', 'disabled')),
  constraint queues_partition_lookahead_check check (partition_lookahead >= interval '0'),
  constraint queues_partition_lookback_check check (partition_lookback >= interval '0'),
  constraint queues_cleanup_ttl_check check (cleanup_ttl >= interval '0'),
  constraint queues_cleanup_limit_check check (cleanup_limit >= 1),
  constraint queues_detach_mode_check check (detach_mode in ('none', 'empty')),
  constraint queues_detach_min_age_check check (detach_min_age >= interval '0')
);

create or replace function absurd.validate_queue_name(p_queue_name text) returns text
language plpgsql as $$
begin
  if p_queue_name is null or p_queue_name = '' then
    raise exception 'Queue name must be provided';
  end if;
  if octet_length(p_queue_name) > 57 then
    raise exception 'Queue name "%" is too long (at most 57 bytes)', p_queue_name;
  end if;
  return p_queue_name;
end
$$;

-- One child per parent and week of the window, and the default child while the policy wants one.
-- A week whose rows already lie in the default child is skipped: attaching it would fail for ever.
create or replace function absurd.ensure_partitions(p_queue_name text default null) returns void
language plpgsql as $$
declare
  v_queue absurd.queues%rowtype;
  v_kind text;
  v_week timestamptz;
  v_now timestamptz := absurd.current_time();
  v_last timestamptz;
begin
  if p_queue_name is not null then
    perform absurd.validate_queue_name(p_queue_name);
    if not exists (select from absurd.queues where queue_name = p_queue_name) then
      raise exception 'Queue "%" not found', p_queue_name;
    end if;
  end if;
  for v_queue in
    select * from absurd.queues
     where storage_mode = 'partitioned' and (p_queue_name is null or queue_name = p_queue_name)
     order by queue_name
  loop
    foreach v_kind in array array['t', 'r', 'c', 'w'] loop
      if v_queue.default_partition = 'enabled' then
        execute format('create table if not exists absurd.%I partition of absurd.%I default',
                       v_kind || '_' || v_queue.queue_name || '_d', v_kind || '_' || v_queue.queue_name);
      end if;
    end loop;
    v_week := absurd.week_bucket_utc(v_now - v_queue.partition_lookback);
    v_last := absurd.week_bucket_utc(v_now + v_queue.partition_lookahead);
    while v_week <= v_last loop
      foreach v_kind in array array['t', 'r', 'c', 'w'] loop
        if to_regclass(format('absurd.%I', v_kind || '_' || v_queue.queue_name || '_'
                                           || absurd.partition_week_tag(v_week))) is null then
          begin
            execute format('create table absurd.%I partition of absurd.%I for values from (%L) to (%L)',
                           v_kind || '_' || v_queue.queue_name || '_' || absurd.partition_week_tag(v_week),
                           v_kind || '_' || v_queue.queue_name,
                           absurd.uuidv7_floor(v_week), absurd.uuidv7_floor(v_week + interval '168 hours'));
          exception when check_violation then
            raise notice 'week % of queue "%" is skipped: its rows lie in the default partition',
              absurd.partition_week_tag(v_week), v_queue.queue_name;
          end;
        end if;
      end loop;
      v_week := v_week + interval '168 hours';
    end loop;
  end loop;
end
$$;

create or replace function absurd.ensure_queue_tables(p_queue_name text) returns void
language plpgsql as $$
declare
  v_parted boolean;
  v_fill text;
  v_task_range text := '';
  v_run_range text := '';
begin
  perform absurd.validate_queue_name(p_queue_name);
  v_parted := coalesce((select storage_mode = 'partitioned' from absurd.queues where queue_name = p_queue_name), false);
  if v_parted then
    v_fill := '';
    v_task_range := ' partition by range (task_id)';
    v_run_range := ' partition by range (run_id)';
  else
    v_fill := ' with (fillfactor = 70)';
  end if;

  execute format($ddl$
    create table if not exists absurd.%1$I (
      task_id uuid primary key,
      task_name text not null,
      params jsonb not null,
      headers jsonb,
      retry_strategy jsonb,
      max_attempts integer,
      cancellation jsonb,
      enqueue_at timestamptz not null default absurd.current_time(),
      first_started_at timestamptz,
      state text not null
        check (state in ('pending', 'running', 'sleeping', 'completed', 'failed', 'cancelled')),
      attempts integer not null default 0,
      last_attempt_run uuid,
      completed_payload jsonb,
      cancelled_at timestamptz,
      idempotency_key text %2$s
    )$ddl$, 't_' || p_queue_name, case when v_parted then '' else 'unique' end) || v_task_range || v_fill;
  execute format($ddl$
    create table if not exists absurd.%1$I (
      run_id uuid primary key,
      task_id uuid not null,
      attempt integer not null,
      state text not null
        check (state in ('pending', 'running', 'sleeping', 'completed', 'failed', 'cancelled')),
      claimed_by text,
      claim_expires_at timestamptz,
      available_at timestamptz not null,
      wake_event text,
      event_payload jsonb,
      started_at timestamptz,
      completed_at timestamptz,
      failed_at timestamptz,
      result jsonb,
      failure_reason jsonb,
      created_at timestamptz not null default absurd.current_time()
    )$ddl$, 'r_' || p_queue_name) || v_run_range || v_fill;
  execute format($ddl$
    create table if not exists absurd.%1$I (
      task_id uuid not null,
      checkpoint_name text not null,
      state jsonb,
      status text not null default 'committed',
      owner_run_id uuid,
      updated_at timestamptz not null default absurd.current_time(),
      primary key (task_id, checkpoint_name)
    )$ddl$, 'c_' || p_queue_name) || v_task_range || v_fill;
  execute format($ddl$
    create table if not exists absurd.%1$I (
      event_name text primary key,
      payload jsonb,
      emitted_at timestamptz not null default absurd.current_time()
    )$ddl$, 'e_' || p_queue_name);
  execute format($ddl$
    create table if not exists absurd.%1$I (
      task_id uuid not null,
      run_id uuid not null,
      step_name text not null,
      event_name text not null,
      timeout_at timestamptz,
      created_at timestamptz not null default absurd.current_time(),
      primary key (run_id, step_name)
    )$ddl$, 'w_' || p_queue_name) || v_run_range;

  execute format('create index if not exists %I on absurd.%I (task_id) where cancellation is not null',
                 't_' || p_queue_name || '_ci', 't_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (state, available_at)',
                 'r_' || p_queue_name || '_sai', 'r_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (task_id)',
                 'r_' || p_queue_name || '_ti', 'r_' || p_queue_name);
  execute format($ddl$create index if not exists %I on absurd.%I (claim_expires_at)
                   where state = 'running' and claim_expires_at is not null$ddl$,
                 'r_' || p_queue_name || '_cei', 'r_' || p_queue_name);
  -- Three indexes that upstream does not have, for cleanup: when a task ended. Each run has an entry in one of them.
  execute format('create index if not exists %I on absurd.%I (completed_at) where completed_at is not null',
                 'r_' || p_queue_name || '_coi', 'r_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (failed_at) where failed_at is not null',
                 'r_' || p_queue_name || '_fai', 'r_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (cancelled_at) where cancelled_at is not null',
                 't_' || p_queue_name || '_cai', 't_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (emitted_at)',
                 'e_' || p_queue_name || '_eai', 'e_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (event_name)',
                 'w_' || p_queue_name || '_eni', 'w_' || p_queue_name);
  execute format('create index if not exists %I on absurd.%I (task_id)',
                 'w_' || p_queue_name || '_ti', 'w_' || p_queue_name);

  if v_parted then
    execute format('create table if not exists absurd.%I (idempotency_key text primary key, task_id uuid not null)',
                   'i_' || p_queue_name);
    execute format('create index if not exists %I on absurd.%I (task_id)',
                   'i_' || p_queue_name || '_ti', 'i_' || p_queue_name);
    perform absurd.ensure_partitions(p_queue_name);
  end if;
end
$$;

create or replace function absurd.create_queue(p_queue_name text, p_storage_mode text) returns void
language plpgsql as $$
declare
  v_mode text := lower(btrim(coalesce(p_storage_mode, '')));
  v_stored text;
  v_wanted text[];
  v_found integer;
begin
  perform absurd.validate_queue_name(p_queue_name);
  if v_mode not in ('unpartitioned', 'partitioned') then
    raise exception 'storage mode must be unpartitioned or partitioned, not "%"', p_storage_mode;
  end if;
  insert into absurd.queues (queue_name, storage_mode) values (p_queue_name, v_mode)
      on conflict (queue_name) do nothing;
  select storage_mode into v_stored from absurd.queues where queue_name = p_queue_name;
  if v_stored is distinct from v_mode then
    raise exception 'queue "%" exists and is %, not %', p_queue_name, v_stored, v_mode;
  end if;

  select array_agg(prefix || p_queue_name || suffix) into v_wanted
    from (values ('t_', ''), ('r_', ''), ('c_', ''), ('e_', ''), ('w_', ''),
                 ('t_', '_ci'), ('r_', '_sai'), ('r_', '_ti'), ('r_', '_cei'), ('e_', '_eai'), ('w_', '_eni'),
                 ('w_', '_ti'), ('r_', '_coi'), ('r_', '_fai'), ('t_', '_cai')) as part (prefix, suffix);
  if v_mode = 'partitioned' then
    v_wanted := v_wanted || array['i_' || p_queue_name, 'i_' || p_queue_name || '_ti'];
  end if;
  select count(*) into v_found
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
   where n.nspname = 'absurd' and c.relname = any (v_wanted);
  if v_found < cardinality(v_wanted) then
    perform absurd.ensure_queue_tables(p_queue_name);
  elsif v_mode = 'partitioned' then
    perform absurd.ensure_partitions(p_queue_name);
  end if;
end
$$;

create or replace function absurd.create_queue(p_queue_name text) returns void
language sql as $$ select absurd.create_queue(p_queue_name, 'unpartitioned') $$;

create or replace function absurd.drop_queue(p_queue_name text) returns void
language plpgsql as $$
declare
  v_kind text;
begin
  if not exists (select from absurd.queues where queue_name = p_queue_name) then
    return;
  end if;
  -- A legacy name that is too long has no cron entries: enabling them validates the name.
  if octet_length(p_queue_name) <= 57 and to_regclass('cron.job') is not null
     and to_regprocedure('cron.unschedule(bigint)') is not null then
    perform absurd.disable_cron(p_queue_name);
  end if;
  foreach v_kind in array array['i', 'w', 'e', 'c', 'r', 't'] loop
    execute format('drop table if exists absurd.%I cascade', v_kind || '_' || p_queue_name);
  end loop;
  delete from absurd.queues where queue_name = p_queue_name;
end
$$;

create or replace function absurd.list_queues() returns table (queue_name text)
language sql as $$ select q.queue_name from absurd.queues q order by q.queue_name $$;

create or replace function absurd.get_queue_policy(p_queue_name text)
returns table (queue_name text, storage_mode text, default_partition text, partition_lookahead interval,
               partition_lookback interval, cleanup_ttl interval, cleanup_limit integer, detach_mode text,
               detach_min_age interval)
language sql as $$
  select q.queue_name, q.storage_mode, q.default_partition, q.partition_lookahead, q.partition_lookback, q.cleanup_ttl,
         q.cleanup_limit, q.detach_mode, q.detach_min_age
    from absurd.queues q
   where q.queue_name = p_queue_name
$$;

create or replace function absurd.set_queue_policy(p_queue_name text, p_policy jsonb) returns void
language plpgsql as $$
declare
  v_policy jsonb := coalesce(p_policy, '{}'::jsonb);
  v_queue absurd.queues%rowtype;
  v_before text;
  v_key text;
  v_kind text;
  v_full boolean;
begin
  perform absurd.validate_queue_name(p_queue_name);
  if jsonb_typeof(v_policy) <> 'object' then
    raise exception 'queue policy must be a JSON object';
  end if;
  select key into v_key from jsonb_object_keys(v_policy) as key
   where key not in ('partition_lookahead', 'partition_lookback', 'cleanup_ttl', 'cleanup_limit', 'detach_mode',
                     'detach_min_age', 'default_partition')
   limit 1;
  if found then
    raise exception 'unknown queue policy key "%"', v_key;
  end if;
  select * into v_queue from absurd.queues where queue_name = p_queue_name for update;
  if not found then
    raise exception 'Queue "%" not found', p_queue_name;
  end if;
  v_before := v_queue.default_partition;
  if v_policy ? 'partition_lookahead' then
    v_queue.partition_lookahead := (v_policy ->> 'partition_lookahead')::interval;
  end if;
  if v_policy ? 'partition_lookback' then
    v_queue.partition_lookback := (v_policy ->> 'partition_lookback')::interval;
  end if;
  if v_policy ? 'cleanup_ttl' then
    v_queue.cleanup_ttl := (v_policy ->> 'cleanup_ttl')::interval;
  end if;
  if v_policy ? 'cleanup_limit' then
    v_queue.cleanup_limit := (v_policy ->> 'cleanup_limit')::integer;
  end if;
  if v_policy ? 'detach_min_age' then
    v_queue.detach_min_age := (v_policy ->> 'detach_min_age')::interval;
  end if;
  if v_policy ? 'detach_mode' then
    v_queue.detach_mode := lower(btrim(v_policy ->> 'detach_mode'));
    if v_queue.detach_mode is null or v_queue.detach_mode not in ('none', 'empty') then
      raise exception 'detach_mode must be none or empty';
    end if;
  end if;
  if v_policy ? 'default_partition' then
    v_queue.default_partition := lower(btrim(v_policy ->> 'default_partition'));
    if v_queue.default_partition is null or v_queue.default_partition not in ('enabled', 'disabled') then
      raise exception 'default_partition must be enabled or disabled';
    end if;
    if v_queue.storage_mode <> 'partitioned' then
      raise exception 'default_partition is only for partitioned queues';
    end if;
  end if;
  if least(v_queue.partition_lookahead, v_queue.partition_lookback, v_queue.cleanup_ttl, v_queue.detach_min_age)
     < interval '0' then
    raise exception 'intervals of a queue policy must not be negative';
  end if;
  if v_queue.cleanup_limit < 1 then
    raise exception 'cleanup_limit must be at least 1';
  end if;
  update absurd.queues q
     set default_partition = v_queue.default_partition, partition_lookahead = v_queue.partition_lookahead,
         partition_lookback = v_queue.partition_lookback, cleanup_ttl = v_queue.cleanup_ttl,
         cleanup_limit = v_queue.cleanup_limit, detach_mode = v_queue.detach_mode,
         detach_min_age = v_queue.detach_min_age
   where q.queue_name = p_queue_name;

  if v_queue.default_partition = v_before then
    return;
  end if;
  if v_queue.default_partition = 'enabled' then
    perform absurd.ensure_partitions(p_queue_name);
    return;
  end if;
  foreach v_kind in array array['t', 'r', 'c', 'w'] loop
    if exists (select from pg_catalog.pg_inherits
                where inhrelid = to_regclass(format('absurd.%I', v_kind || '_' || p_queue_name || '_d'))) then
      execute format('lock table absurd.%I in access exclusive mode', v_kind || '_' || p_queue_name || '_d');
      execute format('select exists (select from absurd.%I)', v_kind || '_' || p_queue_name || '_d') into v_full;
      if v_full then
        raise exception 'default partition "%" still holds rows', v_kind || '_' || p_queue_name || '_d';
      end if;
      execute format('alter table absurd.%I detach partition absurd.%I',
                     v_kind || '_' || p_queue_name, v_kind || '_' || p_queue_name || '_d');
      execute format('drop table absurd.%I', v_kind || '_' || p_queue_name || '_d');
    end if;
  end loop;
end
$$;

-- 03_policies
-- Retry delays and cancellation policies as pure functions (contract sections 5.3, 5.4, 7.38).

-- A number of a strategy: JSON number or a string that holds one. Anything else is refused with AB003.
create or replace function absurd.strategy_number(p_strategy jsonb, p_key text, p_default double precision)
returns double precision
language plpgsql immutable as $$
declare
  v_value jsonb := p_strategy -> p_key;
begin
  if v_value is null or jsonb_typeof(v_value) = 'null' then
    return p_default;
  end if;
  if jsonb_typeof(v_value) not in ('number', 'string') then
    raise exception 'retry strategy: % is not a number', p_key using errcode = 'AB003';
  end if;
  return (p_strategy ->> p_key)::double precision;
exception when invalid_text_representation or numeric_value_out_of_range then
  raise exception 'retry strategy: % is not a number', p_key using errcode = 'AB003';
end
$$;

create or replace function absurd.retry_delay_seconds(p_strategy jsonb, p_attempt integer) returns double precision
language plpgsql immutable as $$
declare
  v_kind text;
  v_base double precision;
  v_factor double precision;
  v_max double precision;
  v_delay double precision;
  v_power integer := greatest(coalesce(p_attempt, 1), 1) - 1;
begin
  if p_strategy is null then
    return 0;
  end if;
  if jsonb_typeof(p_strategy) <> 'object' then
    raise exception 'retry strategy must be a JSON object' using errcode = 'AB003';
  end if;
  v_kind := coalesce(p_strategy ->> 'kind', 'none');
  if v_kind = 'none' then
    return 0;
  end if;
  if v_kind not in ('fixed', 'exponential') then
    raise exception 'retry strategy: unknown kind "%"', v_kind using errcode = 'AB003';
  end if;
  v_base := absurd.strategy_number(p_strategy, 'base_seconds', case v_kind when 'fixed' then 60 else 30 end);
  -- NaN sorts above every number, so the upper bound refuses it too.
  if v_base < 0 or v_base > 86400 then
    raise exception 'retry strategy: base_seconds must be between 0 and 86400' using errcode = 'AB003';
  end if;
  if v_kind = 'fixed' then
    return v_base;
  end if;
  v_factor := absurd.strategy_number(p_strategy, 'factor', 2);
  if v_factor < 0 or v_factor >= 'infinity'::double precision then
    raise exception 'retry strategy: factor must be finite and not negative' using errcode = 'AB003';
  end if;
  v_max := absurd.strategy_number(p_strategy, 'max_seconds', 86400);
  if v_max < 0 or v_max > 86400 then
    raise exception 'retry strategy: max_seconds must be between 0 and 86400' using errcode = 'AB003';
  end if;
  if v_base = 0 then
    return 0;
  end if;
  begin
    v_delay := v_base * power(v_factor, v_power);
  exception when numeric_value_out_of_range or floating_point_exception then
    v_delay := case when v_factor < 1 then 0 else v_max end;
  end;
  return least(v_delay, v_max);
end
$$;

-- Seconds of a cancellation policy; a value that is no whole number counts as absent, so that one bad task never stops
-- the claims of its queue.
create or replace function absurd.cancellation_seconds(p_policy jsonb, p_key text) returns bigint
language sql immutable as $$
  select case when jsonb_typeof(p_policy) = 'object' and p_policy ->> p_key ~ '^[[:space:]]*[+-]?[0-9]{1,18}[[:space:]]*$'
              then (p_policy ->> p_key)::bigint
         end
$$;

create or replace function absurd.cancellation_due(p_policy jsonb, p_enqueue_at timestamptz,
                                                   p_first_started_at timestamptz, p_now timestamptz)
returns boolean
language sql immutable as $$
  select coalesce(
           case when p_policy is null then false
                when p_first_started_at is null
                then extract(epoch from p_now - p_enqueue_at) >= absurd.cancellation_seconds(p_policy, 'max_delay')
                else extract(epoch from p_now - p_first_started_at)
                     >= absurd.cancellation_seconds(p_policy, 'max_duration')
           end, false)
$$;

-- 04_tasks
-- Tasks: spawn, result, cancel, retry (contract sections 7.10, 7.11, 7.16, 7.23).

create or replace function absurd.spawn_task(p_queue_name text, p_task_name text, p_params jsonb,
                                             p_options jsonb default '{}'::jsonb)
returns table (task_id uuid, run_id uuid, attempt integer, created boolean)
language plpgsql as $$
declare
  v_task_id uuid := absurd.portable_uuidv7();
  v_run_id uuid := absurd.portable_uuidv7();
  v_now timestamptz := absurd.current_time();
  v_options jsonb := coalesce(p_options, '{}'::jsonb);
  v_key text := p_options ->> 'idempotency_key';
  v_max_attempts integer := (p_options ->> 'max_attempts')::integer;
  v_parted boolean := false;
  v_rows integer;
begin
  if p_task_name is null or btrim(p_task_name, ' ') = '' then
    raise exception 'task_name must be provided';
  end if;
  if v_max_attempts < 1 then
    raise exception 'max_attempts must be at least 1';
  end if;
  if v_options ? 'retry_strategy' then
    perform absurd.retry_delay_seconds(v_options -> 'retry_strategy', 1);
  end if;

  if v_key is not null then
    v_parted := to_regclass(format('absurd.%I', 'i_' || p_queue_name)) is not null;
  end if;
  for v_try in 1 .. 10 loop
    if v_parted then
      execute format('insert into absurd.%I (idempotency_key, task_id) values ($1, $2) on conflict do nothing',
                     'i_' || p_queue_name) using v_key, v_task_id;
      get diagnostics v_rows = row_count;
    else
      v_rows := 1;
    end if;
    if v_rows = 1 then
      execute format(
        'insert into absurd.%I (task_id, task_name, params, headers, retry_strategy, max_attempts, cancellation,
                                enqueue_at, state, attempts, last_attempt_run, idempotency_key)
         values ($1, $2, $3, $4, $5, $6, $7, $8, ''pending'', 1, $9, $10) %s',
        't_' || p_queue_name,
        case when v_key is not null and not v_parted then 'on conflict (idempotency_key) do nothing' else '' end)
        using v_task_id, p_task_name, coalesce(p_params, 'null'::jsonb), v_options -> 'headers',
              v_options -> 'retry_strategy', v_max_attempts, v_options -> 'cancellation', v_now, v_run_id, v_key;
      get diagnostics v_rows = row_count;
    end if;
    if v_rows = 1 then
      execute format('insert into absurd.%I (run_id, task_id, attempt, state, available_at, created_at)
                      values ($1, $2, 1, ''pending'', $3, $3)', 'r_' || p_queue_name)
        using v_run_id, v_task_id, v_now;
      return query select v_task_id, v_run_id, 1, true;
      return;
    end if;

    if v_parted then
      execute format('select t.task_id, t.last_attempt_run, t.attempts
                        from absurd.%I i join absurd.%I t on t.task_id = i.task_id
                       where i.idempotency_key = $1 for key share of i',
                     'i_' || p_queue_name, 't_' || p_queue_name)
        into task_id, run_id, attempt using v_key;
      if task_id is null then
        raise exception 'the task of idempotency key "%" is being removed', v_key
          using errcode = '40001', hint = 'retry the spawn';
      end if;
    else
      execute format('select t.task_id, t.last_attempt_run, t.attempts from absurd.%I t where t.idempotency_key = $1',
                     't_' || p_queue_name)
        into task_id, run_id, attempt using v_key;
    end if;
    if task_id is not null then
      if run_id is null then
        raise exception 'task % has no run', task_id;
      end if;
      created := false;
      return next;
      return;
    end if;
    -- The owner of the key was removed between the two statements: try again.
  end loop;
  raise exception 'the idempotency key "%" keeps changing hands', v_key
    using errcode = '40001', hint = 'retry the spawn';
end
$$;

create or replace function absurd.get_task_result(p_queue_name text, p_task_id uuid)
returns table (task_id uuid, state text, result jsonb, failure_reason jsonb)
language plpgsql as $$
begin
  perform absurd.validate_queue_name(p_queue_name);
  return query execute format(
    'select t.task_id, t.state,
            case when t.state = ''completed'' then t.completed_payload end,
            case when t.state = ''failed''
                 then (select r.failure_reason from absurd.%I r where r.run_id = t.last_attempt_run) end
       from absurd.%I t where t.task_id = $1',
    'r_' || p_queue_name, 't_' || p_queue_name) using p_task_id;
end
$$;

-- Runs are locked before the task, in run order, as everywhere.
create or replace function absurd.cancel_task(p_queue_name text, p_task_id uuid) returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_state text;
  v_locked uuid[];
  v_missed boolean;
begin
  loop
    begin
      execute format('select array(select r.run_id from absurd.%I r
                                    where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')
                                    order by r.run_id for update)', 'r_' || p_queue_name)
        into v_locked using p_task_id;
      execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
        into v_state using p_task_id;
      -- A failure or a retry may have made a run since; its lock comes before the task's. Give all back, and begin anew.
      execute format('select exists (select from absurd.%I r
                                      where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')
                                        and r.run_id <> all ($2))', 'r_' || p_queue_name)
        into v_missed using p_task_id, v_locked;
      if v_missed then
        raise exception using errcode = 'AB999', message = 'another run was made meanwhile';
      end if;
      exit;
    exception when sqlstate 'AB999' then
      null;
    end;
  end loop;
  if v_state is null then
    raise exception 'Task % not found in queue "%"', p_task_id, p_queue_name;
  end if;
  if v_state not in ('pending', 'running', 'sleeping') then
    return;
  end if;
  execute format('update absurd.%I r set state = ''cancelled'', claimed_by = null, claim_expires_at = null
                   where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')',
                 'r_' || p_queue_name) using p_task_id;
  execute format('update absurd.%I t set state = ''cancelled'', cancelled_at = coalesce(t.cancelled_at, $2)
                   where t.task_id = $1', 't_' || p_queue_name) using p_task_id, v_now;
  execute format('delete from absurd.%I w where w.task_id = $1', 'w_' || p_queue_name) using p_task_id;
end
$$;

create or replace function absurd.retry_task(p_queue_name text, p_task_id uuid, p_options jsonb default '{}'::jsonb)
returns table (task_id uuid, run_id uuid, attempt integer, created boolean)
language plpgsql as $$
declare
  v_options jsonb := coalesce(p_options, '{}'::jsonb);
  v_spawn_new boolean := coalesce((v_options ->> 'spawn_new')::boolean, false);
  v_max_attempts integer := (v_options ->> 'max_attempts')::integer;
  v_now timestamptz := absurd.current_time();
  v_run_id uuid := absurd.portable_uuidv7();
  v_task record;
  v_copy jsonb;
begin
  if v_max_attempts < 1 then
    raise exception 'max_attempts must be at least 1';
  end if;
  execute format('select t.task_name, t.params, t.headers, t.retry_strategy, t.max_attempts, t.cancellation, t.state,
                         t.attempts
                    from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
    into v_task using p_task_id;
  if v_task.state is null then
    raise exception 'Task % not found in queue "%"', p_task_id, p_queue_name;
  end if;
  if v_task.state <> 'failed' then
    raise exception 'Task % is %, only failed tasks can be retried', p_task_id, v_task.state;
  end if;

  if v_spawn_new then
    v_copy := jsonb_strip_nulls(jsonb_build_object(
      'headers', v_task.headers, 'retry_strategy', v_task.retry_strategy, 'cancellation', v_task.cancellation,
      'max_attempts', coalesce(v_max_attempts, v_task.max_attempts)));
    return query select s.task_id, s.run_id, s.attempt, true
                   from absurd.spawn_task(p_queue_name, v_task.task_name, v_task.params, v_copy) s;
    return;
  end if;

  v_max_attempts := coalesce(v_max_attempts, coalesce(v_task.max_attempts, v_task.attempts) + 1);
  if v_max_attempts <= v_task.attempts then
    raise exception 'max_attempts (%) must be greater than current attempts (%)', v_max_attempts, v_task.attempts;
  end if;
  execute format('insert into absurd.%I (run_id, task_id, attempt, state, available_at, created_at)
                  values ($1, $2, $3, ''pending'', $4, $4)', 'r_' || p_queue_name)
    using v_run_id, p_task_id, v_task.attempts + 1, v_now;
  execute format('update absurd.%I t set state = ''pending'', attempts = $2, max_attempts = $3, last_attempt_run = $4,
                         cancelled_at = null
                   where t.task_id = $1', 't_' || p_queue_name)
    using p_task_id, v_task.attempts + 1, v_max_attempts, v_run_id;
  return query select p_task_id, v_run_id, v_task.attempts + 1, false;
end
$$;

-- 05_runs
-- Runs: claim, complete, fail, schedule, extend (contract sections 7.12 to 7.15, 7.18).

create or replace function absurd.fail_run(p_queue_name text, p_run_id uuid, p_reason jsonb,
                                           p_retry_at timestamptz default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task record;
  v_next_id uuid;
  v_next_at timestamptz;
  v_state text := 'failed';
begin
  execute format('select r.task_id, r.attempt, r.state from absurd.%I r where r.run_id = $1 for update',
                 'r_' || p_queue_name) into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  elsif v_run.state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_run_id using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_run_id using errcode = 'AB002';
  elsif v_run.state not in ('running', 'sleeping') then
    raise exception 'Run % is %, it cannot be failed', p_run_id, v_run.state;
  end if;
  execute format('select t.retry_strategy, t.max_attempts, t.cancellation, t.first_started_at
                    from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
    into v_task using v_run.task_id;
  execute format('update absurd.%I r set state = ''failed'', failed_at = $2, failure_reason = $3, wake_event = null
                   where r.run_id = $1', 'r_' || p_queue_name) using p_run_id, v_now, p_reason;

  if v_task.max_attempts is null or v_run.attempt + 1 <= v_task.max_attempts then
    begin
      v_next_at := greatest(v_now, coalesce(p_retry_at,
                     v_now + absurd.retry_delay_seconds(v_task.retry_strategy, v_run.attempt) * interval '1 second'));
    exception when sqlstate 'AB003' then
      v_next_at := null;  -- an invalid stored strategy: no further attempt
    end;
    if extract(epoch from v_next_at - v_task.first_started_at)
       >= absurd.cancellation_seconds(v_task.cancellation, 'max_duration') then
      v_state := 'cancelled';
    elsif v_next_at is not null then
      v_next_id := absurd.portable_uuidv7();
      v_state := case when v_next_at > v_now then 'sleeping' else 'pending' end;
      execute format('insert into absurd.%I (run_id, task_id, attempt, state, available_at, created_at)
                      values ($1, $2, $3, $4, $5, $6)', 'r_' || p_queue_name)
        using v_next_id, v_run.task_id, v_run.attempt + 1, v_state, v_next_at, v_now;
    end if;
  end if;

  execute format('update absurd.%I t
                     set state = $2, attempts = greatest(t.attempts, $3), last_attempt_run = $4,
                         cancelled_at = case when $2 = ''cancelled'' then coalesce(t.cancelled_at, $5)
                                             else t.cancelled_at end
                   where t.task_id = $1', 't_' || p_queue_name)
    using v_run.task_id, v_state, v_run.attempt + (v_next_id is not null)::integer, coalesce(v_next_id, p_run_id),
          v_now;
  execute format('delete from absurd.%I w where w.run_id = $1', 'w_' || p_queue_name) using p_run_id;
end
$$;

-- Cancels what is due, without waiting for anybody: what is locked stays, and the claim withholds it.
-- A call looks at so many tasks with a policy at most; where there are more, finished ones included, the next call of
-- this session goes on behind them. So the cost of a claim does not grow with the history.
create or replace function absurd.cancel_due_tasks(p_queue_name text, p_limit integer) returns integer
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_setting text := 'absurd.sweep_' || md5(p_queue_name);
  v_after text := coalesce(nullif(current_setting(v_setting, true), ''), '00000000-0000-0000-0000-000000000000');
  v_due uuid[];
  v_seen integer;
  v_last uuid;
  v_task_id uuid;
  v_live integer;
  v_locked integer;
  v_done integer := 0;
begin
  execute format(
    'select array_agg(t.task_id order by t.task_id)
              filter (where t.state in (''pending'', ''running'', ''sleeping'')
                        and absurd.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, $1)),
            count(*), (array_agg(t.task_id order by t.task_id desc))[1]
       from (select t.task_id, t.state, t.cancellation, t.enqueue_at, t.first_started_at from absurd.%I t
              where t.cancellation is not null and t.task_id > $2 order by t.task_id limit $3) t',
    't_' || p_queue_name) into v_due, v_seen, v_last using v_now, v_after::uuid, p_limit;
  if v_seen = p_limit then
    perform set_config(v_setting, v_last::text, false);
  elsif v_after <> '00000000-0000-0000-0000-000000000000' then
    perform set_config(v_setting, '', false);
  end if;

  foreach v_task_id in array coalesce(v_due, '{}') loop
    execute format(
      'with locked as (select 1 from absurd.%1$I r
                        where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')
                        order by r.run_id for update skip locked)
       select (select count(*) from locked),
              (select count(*) from absurd.%1$I r
                where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping''))',
      'r_' || p_queue_name) into v_locked, v_live using v_task_id;
    continue when v_locked < v_live;
    execute format('select count(*) from (select 1 from absurd.%I t where t.task_id = $1 for update skip locked) x',
                   't_' || p_queue_name) into v_locked using v_task_id;
    continue when v_locked = 0;
    perform absurd.cancel_task(p_queue_name, v_task_id);
    v_done := v_done + 1;
  end loop;
  return v_done;
end
$$;

-- Two ordered walks of the (state, available_at) index, one per claimable state, each to as many rows as are wanted,
-- instead of a sort of the whole backlog. The settings hold the planner to these walks where it has no statistics yet,
-- or those of a queue that was empty.
create or replace function absurd.claim_task(p_queue_name text, p_worker_id text, p_claim_timeout integer default 30,
                                             p_qty integer default 1)
returns table (run_id uuid, task_id uuid, attempt integer, task_name text, params jsonb, retry_strategy jsonb,
               max_attempts integer, headers jsonb, wake_event text, event_payload jsonb)
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_now timestamptz := absurd.current_time();
  v_worker text := coalesce(nullif(p_worker_id, ''), 'worker');
  v_timeout integer := greatest(coalesce(p_claim_timeout, 30), 0);
  v_qty integer := greatest(coalesce(p_qty, 1), 1);
  v_expired record;
  v_any boolean;
begin
  perform absurd.cancel_due_tasks(p_queue_name, 500);

  for v_expired in execute format(
    'select r.run_id, r.claimed_by, r.claim_expires_at, r.attempt from absurd.%I r
      where r.state = ''running'' and r.claim_expires_at is not null and r.claim_expires_at <= $1
      order by r.claim_expires_at, r.run_id limit $2 for update skip locked', 'r_' || p_queue_name)
    using v_now, v_qty
  loop
    perform absurd.fail_run(
      p_queue_name, v_expired.run_id,
      jsonb_strip_nulls(jsonb_build_object(
        'name', '$ClaimTimeout',
        'message', format('the lease of worker %s ran out before the run ended',
                          coalesce(regexp_replace(v_expired.claimed_by, '#[A-Za-z0-9_-]{22}$', ''), 'unknown')),
        'workerId', regexp_replace(v_expired.claimed_by, '#[A-Za-z0-9_-]{22}$', ''),
        'claimExpiredAt', v_expired.claim_expires_at,
        'attempt', v_expired.attempt)),
      null);
  end loop;

  -- Most polls find nothing: they shall not pay for the plan of a claim.
  execute format('select exists (select from absurd.%1$I r where r.state = ''pending'' and r.available_at <= $1)
                      or exists (select from absurd.%1$I r where r.state = ''sleeping'' and r.available_at <= $1)',
                 'r_' || p_queue_name) into v_any using v_now;
  if not v_any then
    return;
  end if;

  return query execute format(
    'with pending as (
       select r.run_id, r.task_id, r.available_at
         from absurd.%1$I r join absurd.%2$I t on t.task_id = r.task_id
        where r.state = ''pending'' and r.available_at <= $1
          and t.state in (''pending'', ''sleeping'', ''running'')
          and not absurd.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, $1)
        order by r.available_at, r.run_id limit $2 for update of r, t skip locked),
     sleeping as (
       select r.run_id, r.task_id, r.available_at
         from absurd.%1$I r join absurd.%2$I t on t.task_id = r.task_id
        where r.state = ''sleeping'' and r.available_at <= $1
          and t.state in (''pending'', ''sleeping'', ''running'')
          and not absurd.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, $1)
        order by r.available_at, r.run_id limit $2 for update of r, t skip locked),
     chosen as (
       select * from (select * from pending union all select * from sleeping) x
        order by x.available_at, x.run_id limit $2),
     runs as (
       update absurd.%1$I r
          set state = ''running'', claimed_by = $3, started_at = $1, available_at = $1,
              claim_expires_at = case when $4 > 0 then $1 + make_interval(secs => $4) end
         from chosen where r.run_id = chosen.run_id
       returning r.run_id, r.task_id, r.attempt, r.wake_event, r.event_payload, chosen.available_at),
     tasks as (
       update absurd.%2$I t
          set state = ''running'', attempts = greatest(t.attempts, runs.attempt), last_attempt_run = runs.run_id,
              first_started_at = coalesce(t.first_started_at, $1)
         from runs where t.task_id = runs.task_id
       returning t.task_id, t.task_name, t.params, t.retry_strategy, t.max_attempts, t.headers),
     due as (
       delete from absurd.%3$I w using runs where w.run_id = runs.run_id and w.timeout_at <= $1)
     select runs.run_id, runs.task_id, runs.attempt, tasks.task_name, tasks.params, tasks.retry_strategy,
            tasks.max_attempts, tasks.headers, runs.wake_event, runs.event_payload
       from runs join tasks on tasks.task_id = runs.task_id
      order by runs.available_at, runs.run_id',
    'r_' || p_queue_name, 't_' || p_queue_name, 'w_' || p_queue_name)
    using v_now, v_qty, v_worker, v_timeout;
end
$$;

create or replace function absurd.complete_run(p_queue_name text, p_run_id uuid, p_state jsonb default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
begin
  execute format('select r.task_id, r.state from absurd.%I r where r.run_id = $1 for update', 'r_' || p_queue_name)
    into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  elsif v_run.state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_run_id using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_run_id using errcode = 'AB002';
  elsif v_run.state <> 'running' then
    raise exception 'Run % is %, it cannot be completed', p_run_id, v_run.state;
  end if;
  execute format('update absurd.%I r set state = ''completed'', completed_at = $2, result = $3 where r.run_id = $1',
                 'r_' || p_queue_name) using p_run_id, v_now, p_state;
  execute format('update absurd.%I t set state = ''completed'', completed_payload = $2, last_attempt_run = $3
                   where t.task_id = $1', 't_' || p_queue_name) using v_run.task_id, p_state, p_run_id;
  execute format('delete from absurd.%I w where w.run_id = $1', 'w_' || p_queue_name) using p_run_id;
end
$$;

create or replace function absurd.schedule_run(p_queue_name text, p_run_id uuid, p_wake_at timestamptz) returns void
language plpgsql as $$
declare
  v_task_id uuid;
begin
  execute format('select r.task_id from absurd.%I r where r.run_id = $1 and r.state = ''running'' for update',
                 'r_' || p_queue_name) into v_task_id using p_run_id;
  if v_task_id is null then
    raise exception 'Run % is not currently running in queue "%"', p_run_id, p_queue_name;
  end if;
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = null
                   where r.run_id = $1', 'r_' || p_queue_name) using p_run_id, p_wake_at;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue_name)
    using v_task_id;
end
$$;

create or replace function absurd.extend_claim(p_queue_name text, p_run_id uuid, p_extend_by integer) returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task_state text;
begin
  if p_extend_by is null or p_extend_by <= 0 then
    raise exception 'extend_by must be > 0';
  end if;
  execute format('select r.task_id, r.state, r.claim_expires_at from absurd.%I r where r.run_id = $1 for update',
                 'r_' || p_queue_name) into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  end if;
  execute format('select t.state from absurd.%I t where t.task_id = $1', 't_' || p_queue_name)
    into v_task_state using v_run.task_id;
  if v_task_state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_run_id using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_run_id using errcode = 'AB002';
  elsif v_run.state <> 'running' then
    raise exception 'Run % is not currently running', p_run_id;
  elsif v_run.claim_expires_at is null then
    raise exception 'Run % has no lease to extend', p_run_id;
  end if;
  execute format('update absurd.%I r set claim_expires_at = $2 where r.run_id = $1', 'r_' || p_queue_name)
    using p_run_id, v_now + make_interval(secs => p_extend_by);
end
$$;

-- 06_checkpoints
-- Checkpoints: the stored results of steps (contract sections 7.17, 7.19, 7.20).
-- The writer's run is locked first, so that a late write cannot slip past the failure of its own run.

create or replace function absurd.set_task_checkpoint_state(p_queue_name text, p_task_id uuid, p_step_name text,
                                                            p_state jsonb, p_owner_run uuid,
                                                            p_extend_claim_by integer default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task_state text;
begin
  if p_step_name is null or btrim(p_step_name, ' ') = '' then
    raise exception 'step_name must be provided';
  end if;
  execute format('select r.task_id, r.attempt, r.state from absurd.%I r where r.run_id = $1 for no key update',
                 'r_' || p_queue_name) into v_run using p_owner_run;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_owner_run, p_queue_name;
  end if;
  execute format('select t.state from absurd.%I t where t.task_id = $1', 't_' || p_queue_name)
    into v_task_state using v_run.task_id;
  if v_task_state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_owner_run using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_owner_run using errcode = 'AB002';
  end if;
  if p_extend_claim_by > 0 then
    execute format('update absurd.%I r set claim_expires_at = $2
                     where r.run_id = $1 and r.state = ''running'' and r.claim_expires_at is not null',
                   'r_' || p_queue_name) using p_owner_run, v_now + make_interval(secs => p_extend_claim_by);
  end if;
  execute format(
    'insert into absurd.%1$I as c (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
     values ($1, $2, $3, ''committed'', $4, $5)
         on conflict (task_id, checkpoint_name) do update
        set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
            updated_at = excluded.updated_at
      where not exists (select from absurd.%2$I o where o.run_id = c.owner_run_id and o.attempt > $6)',
    'c_' || p_queue_name, 'r_' || p_queue_name)
    using p_task_id, p_step_name, p_state, p_owner_run, v_now, v_run.attempt;
end
$$;

create or replace function absurd.get_task_checkpoint_state(p_queue_name text, p_task_id uuid, p_step_name text,
                                                            p_include_pending boolean default false)
returns table (checkpoint_name text, state jsonb, status text, owner_run_id uuid, updated_at timestamptz)
language plpgsql as $$
begin
  return query execute format(
    'select c.checkpoint_name, c.state, c.status, c.owner_run_id, c.updated_at from absurd.%I c
      where c.task_id = $1 and c.checkpoint_name = $2 and ($3 or c.status = ''committed'')', 'c_' || p_queue_name)
    using p_task_id, p_step_name, coalesce(p_include_pending, false);
end
$$;

create or replace function absurd.get_task_checkpoint_states(p_queue_name text, p_task_id uuid, p_run_id uuid)
returns table (checkpoint_name text, state jsonb, status text, owner_run_id uuid, updated_at timestamptz)
language plpgsql as $$
declare
  v_run record;
begin
  execute format('select r.task_id, r.attempt from absurd.%I r where r.run_id = $1', 'r_' || p_queue_name)
    into v_run using p_run_id;
  if v_run.task_id is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  end if;
  if v_run.task_id <> p_task_id then
    raise exception 'Run % does not belong to task %', p_run_id, p_task_id;
  end if;
  return query execute format(
    'select c.checkpoint_name, c.state, c.status, c.owner_run_id, c.updated_at
       from absurd.%I c left join absurd.%I o on o.run_id = c.owner_run_id
      where c.task_id = $1 and c.status = ''committed'' and (o.run_id is null or o.attempt <= $2)
      order by c.updated_at', 'c_' || p_queue_name, 'r_' || p_queue_name) using p_task_id, v_run.attempt;
end
$$;

-- 07_events
-- Events: emit and await (contract sections 7.21, 7.22).
-- The event row is locked before the runs on both sides: the awaiter holds it shared, the emitter exclusively, so that
-- no emission falls between "not there yet" and "now I wait".

create or replace function absurd.await_event(p_queue_name text, p_task_id uuid, p_run_id uuid, p_step_name text,
                                              p_event_name text, p_timeout integer default null)
returns table (should_suspend boolean, payload jsonb)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_timeout_at timestamptz;
  v_stored jsonb;
  v_event record;
  v_run record;
  v_task_state text;
begin
  if p_event_name is null or btrim(p_event_name, ' ') = '' then
    raise exception 'event_name must be provided';
  end if;
  if p_timeout < 0 then
    raise exception 'timeout must not be negative';
  end if;
  v_timeout_at := v_now + make_interval(secs => p_timeout);

  execute format('select c.state from absurd.%I c where c.task_id = $1 and c.checkpoint_name = $2',
                 'c_' || p_queue_name) into v_stored using p_task_id, p_step_name;
  if v_stored is not null then
    return query select false, v_stored;
    return;
  end if;

  loop
    execute format('insert into absurd.%I (event_name, payload, emitted_at) values ($1, null, ''epoch'')
                        on conflict (event_name) do nothing', 'e_' || p_queue_name) using p_event_name;
    execute format('select e.payload, true as there from absurd.%I e where e.event_name = $1 for share',
                   'e_' || p_queue_name) into v_event using p_event_name;
    -- A cleanup may have removed the placeholder in between; without the row an emission would pass unseen.
    exit when v_event.there;
  end loop;

  execute format('select r.state, r.wake_event, r.event_payload from absurd.%I r
                   where r.run_id = $1 for update', 'r_' || p_queue_name) into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  end if;
  execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
    into v_task_state using p_task_id;
  if v_task_state = 'cancelled' then
    raise exception 'Task % was cancelled', p_task_id using errcode = 'AB001';
  end if;
  if v_run.event_payload is not null then
    execute format('update absurd.%I r set event_payload = null where r.run_id = $1', 'r_' || p_queue_name)
      using p_run_id;
  end if;
  if v_run.state <> 'running' then
    raise exception 'Run % must be running to await an event, it is %', p_run_id, v_run.state;
  end if;

  if v_event.payload is not null then
    execute format(
      'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       values ($1, $2, $3, ''committed'', $4, $5)
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at', 'c_' || p_queue_name)
      using p_task_id, p_step_name, v_event.payload, p_run_id, v_now;
    return query select false, v_event.payload;
    return;
  end if;

  if v_run.wake_event = p_event_name and v_run.event_payload is null then
    execute format('update absurd.%I r set wake_event = null where r.run_id = $1', 'r_' || p_queue_name)
      using p_run_id;
    return query select false, null::jsonb;
    return;
  end if;

  execute format(
    'insert into absurd.%I (task_id, run_id, step_name, event_name, timeout_at, created_at)
     values ($1, $2, $3, $4, $5, $6)
         on conflict (run_id, step_name) do update
        set event_name = excluded.event_name, timeout_at = excluded.timeout_at, created_at = excluded.created_at',
    'w_' || p_queue_name) using p_task_id, p_run_id, p_step_name, p_event_name, v_timeout_at, v_now;
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = $3, event_payload = null
                   where r.run_id = $1', 'r_' || p_queue_name)
    using p_run_id, coalesce(v_timeout_at, 'infinity'::timestamptz), p_event_name;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue_name)
    using p_task_id;
  return query select true, null::jsonb;
end
$$;

create or replace function absurd.emit_event(p_queue_name text, p_event_name text, p_payload jsonb default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_rows integer;
begin
  if p_event_name is null or btrim(p_event_name, ' ') = '' then
    raise exception 'event_name must be provided';
  end if;
  execute format(
    'insert into absurd.%I as e (event_name, payload, emitted_at) values ($1, $2, $3)
         on conflict (event_name) do update set payload = excluded.payload, emitted_at = excluded.emitted_at
      where e.payload is null', 'e_' || p_queue_name)
    using p_event_name, coalesce(p_payload, 'null'::jsonb), v_now;
  get diagnostics v_rows = row_count;
  if v_rows = 0 then
    return;  -- the first emission wins
  end if;
  execute format(
    'with late as (
       delete from absurd.%1$I w where w.event_name = $1 and w.timeout_at <= $3),
     waiting as (
       select w.run_id, w.task_id, w.step_name from absurd.%1$I w
        where w.event_name = $1 and (w.timeout_at is null or w.timeout_at > $3)),
     locked as (
       select r.run_id from absurd.%2$I r
        where r.run_id in (select run_id from waiting) and r.state = ''sleeping''
        order by r.run_id for update),
     woken as (
       update absurd.%2$I r
          set state = ''pending'', available_at = $3, wake_event = null, event_payload = $2, claimed_by = null,
              claim_expires_at = null
         from locked where r.run_id = locked.run_id
       returning r.run_id),
     stored as (
       insert into absurd.%3$I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
       select waiting.task_id, waiting.step_name, $2, ''committed'', waiting.run_id, $3
         from waiting join woken using (run_id)
           on conflict (task_id, checkpoint_name) do update
          set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
              updated_at = excluded.updated_at),
     tasks as (
       update absurd.%4$I t set state = ''pending''
        where t.task_id in (select waiting.task_id from waiting join woken using (run_id)))
     delete from absurd.%1$I w using woken where w.event_name = $1 and w.run_id = woken.run_id',
    'w_' || p_queue_name, 'r_' || p_queue_name, 'c_' || p_queue_name, 't_' || p_queue_name)
    using p_event_name, coalesce(p_payload, 'null'::jsonb), v_now;
end
$$;

-- 08_cleanup
-- Cleanup of what ended long ago (contract sections 7.24, 7.25). Installed in our side schema too, under the same names:
-- in a database that upstream's tool made, the server cleans up with these.
-- The oldest ends are found by index, one walk per way to end. What is found is locked and looked at again before it
-- goes: a task that was just retried and an event that was just emitted stay. What somebody else holds is left for the
-- next call. The settings hold the planner to these walks where it has no statistics yet.

create or replace function absurd.cleanup_tasks(p_queue_name text, p_ttl_seconds integer, p_limit integer default 1000)
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
create or replace function absurd.cleanup_events(p_queue_name text, p_ttl_seconds integer, p_limit integer default 1000)
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

-- 09_cleanup_all_queues
-- Cleanup by the queues' policies.

create or replace function absurd.cleanup_all_queues(p_queue_name text default null)
returns table (queue_name text, tasks_deleted integer, events_deleted integer)
language plpgsql as $$
declare
  v_queue record;
  v_ttl integer;
begin
  if p_queue_name is not null then
    perform absurd.validate_queue_name(p_queue_name);
    if not exists (select from absurd.queues q where q.queue_name = p_queue_name) then
      raise exception 'Queue "%" not found', p_queue_name;
    end if;
  end if;
  for v_queue in
    select q.queue_name, q.cleanup_ttl, q.cleanup_limit from absurd.queues q
     where p_queue_name is null or q.queue_name = p_queue_name
     order by q.queue_name
  loop
    -- A policy of more than 68 years must not stop the other queues.
    v_ttl := least(floor(extract(epoch from v_queue.cleanup_ttl)), 2147483647)::integer;
    queue_name := v_queue.queue_name;
    tasks_deleted := absurd.cleanup_tasks(v_queue.queue_name, v_ttl, v_queue.cleanup_limit);
    events_deleted := absurd.cleanup_events(v_queue.queue_name, v_ttl, v_queue.cleanup_limit);
    return next;
  end loop;
end
$$;

-- 10_detach
-- Old partitions are detached and dropped (contract sections 7.33, 7.34, 9.3).

-- The upper bound of a weekly partition as a time; null for the default one.
create or replace function absurd.partition_upper_bound(p_partition regclass) returns timestamptz
language sql stable as $$
  select absurd.uuidv7_timestamp(
           (regexp_match(pg_catalog.pg_get_expr(c.relpartbound, c.oid), 'TO [(]''([0-9a-f-]{36})''[)]'))[1]::uuid)
    from pg_catalog.pg_class c
   where c.oid = p_partition
$$;

create or replace function absurd.list_detach_candidates(p_queue_name text default null)
returns table (queue_name text, parent_table text, partition_table text)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_found record;
  v_full boolean;
begin
  if p_queue_name is not null then
    perform absurd.validate_queue_name(p_queue_name);
    if not exists (select from absurd.queues q where q.queue_name = p_queue_name) then
      raise exception 'Queue "%" not found', p_queue_name;
    end if;
  end if;
  for v_found in
    select q.queue_name, p.relname::text as parent, c.relname::text as child
      from absurd.queues q
     cross join unnest(array['t', 'r', 'c', 'w']) with ordinality as k (kind, place)
      join pg_catalog.pg_class p on p.relname = k.kind || '_' || q.queue_name and p.relkind = 'p'
      join pg_catalog.pg_namespace n on n.oid = p.relnamespace and n.nspname = 'absurd'
      join pg_catalog.pg_inherits i on i.inhparent = p.oid
      join pg_catalog.pg_class c on c.oid = i.inhrelid
     where q.storage_mode = 'partitioned' and q.detach_mode = 'empty'
       and (p_queue_name is null or q.queue_name = p_queue_name)
       and absurd.partition_upper_bound(c.oid) < v_now - q.detach_min_age
     order by q.queue_name, k.place, absurd.partition_upper_bound(c.oid), c.relname
  loop
    execute format('select exists (select from absurd.%I)', v_found.child) into v_full;
    if not v_full then
      queue_name := v_found.queue_name;
      parent_table := v_found.parent;
      partition_table := v_found.child;
      return next;
    end if;
  end loop;
end
$$;

-- Drops a partition that is no longer attached, and takes back the cron entries that led here.
create or replace function absurd.drop_detached_partition(p_partition_table text, p_unschedule_job_name text default null)
returns boolean
language plpgsql as $$
declare
  v_partition regclass;
  v_detach_name text := case when starts_with(p_unschedule_job_name, 'absurd_drop_run_')
                             then 'absurd_detach_run_' || substr(p_unschedule_job_name, 17) end;
begin
  if p_partition_table is null or btrim(p_partition_table, ' ') = '' then
    raise exception 'partition table must be provided';
  end if;
  v_partition := to_regclass(format('absurd.%I', p_partition_table));
  if v_partition is null then
    perform absurd.unschedule(v_detach_name);
    perform absurd.unschedule(p_unschedule_job_name);
    return false;
  end if;
  if exists (select from pg_catalog.pg_inherits where inhrelid = v_partition) then
    return false;
  end if;
  perform absurd.unschedule(v_detach_name);
  execute format('drop table absurd.%I', p_partition_table);
  perform absurd.unschedule(p_unschedule_job_name);
  return true;
end
$$;

-- 11_cron
-- Upkeep by pg_cron, where that extension is installed (contract sections 7.35 to 7.37, 9.4).
-- The extension may be absent, so everything that names its schema is dynamic SQL.

-- Part of the names of cron entries that says whose they are.
create or replace function absurd.cron_scope(p_queue_name text) returns text
language sql immutable as $$ select coalesce(left(md5(p_queue_name), 12), 'all') $$;

-- Removes the entries of one name; does nothing without pg_cron.
create or replace function absurd.unschedule(p_job_name text) returns void
language plpgsql as $$
begin
  if p_job_name is null or to_regclass('cron.job') is null or to_regprocedure('cron.unschedule(bigint)') is null then
    return;
  end if;
  execute 'select cron.unschedule(j.jobid) from (select jobid from cron.job where jobname = $1) j' using p_job_name;
end
$$;

create or replace function absurd.require_cron(p_to_schedule boolean) returns void
language plpgsql as $$
begin
  if to_regclass('cron.job') is null or to_regprocedure('cron.unschedule(bigint)') is null
     or (p_to_schedule and to_regprocedure('cron.schedule(text, text, text)') is null) then
    raise exception 'pg_cron is not installed in this database';
  end if;
end
$$;

create or replace function absurd.schedule_detach_jobs(p_queue_name text default null)
returns table (job_name text, job_id bigint, queue_name text, partition_table text, job_kind text)
language plpgsql as $$
declare
  v_scope text := absurd.cron_scope(p_queue_name);
  v_found record;
  v_parent_tag text;
  v_child_tag text;
  v_busy boolean;
  v_default boolean;
begin
  if p_queue_name is not null then
    perform absurd.validate_queue_name(p_queue_name);
  end if;
  perform absurd.require_cron(true);
  -- The oldest candidate of each parent; the next one gets its turn when this one is gone.
  for v_found in
    select distinct on (c.queue_name, c.parent_table) c.queue_name, c.parent_table, c.partition_table
      from absurd.list_detach_candidates(p_queue_name) with ordinality
           as c (queue_name, parent_table, partition_table, place)
     order by c.queue_name, c.parent_table, c.place
  loop
    v_parent_tag := left(md5(v_found.parent_table), 8);
    v_child_tag := left(md5(v_found.parent_table || ':' || v_found.partition_table), 12);
    execute 'select exists (select from cron.job where jobname ~ $1)' into v_busy
      using '^absurd_(detach|drop)_run_[^_]+_' || v_parent_tag || '_';
    continue when v_busy;
    select exists (select from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
                    where i.inhparent = to_regclass(format('absurd.%I', v_found.parent_table))
                      and pg_catalog.pg_get_expr(c.relpartbound, c.oid) = 'DEFAULT') into v_default;
    queue_name := v_found.queue_name;
    partition_table := v_found.partition_table;

    job_kind := 'detach';
    job_name := format('absurd_detach_run_%s_%s_%s', v_scope, v_parent_tag, v_child_tag);
    execute 'select cron.schedule($1, $2, $3)' into job_id
      using job_name, '* * * * *',
            format('alter table absurd.%I detach partition absurd.%I', v_found.parent_table, v_found.partition_table)
            || case when v_default then '' else ' concurrently' end;
    return next;

    job_kind := 'drop';
    job_name := format('absurd_drop_run_%s_%s_%s', v_scope, v_parent_tag, v_child_tag);
    execute 'select cron.schedule($1, $2, $3)' into job_id
      using job_name, '* * * * *',
            format('select absurd.drop_detached_partition(%L, %L)', v_found.partition_table, job_name);
    return next;
  end loop;
end
$$;

create or replace function absurd.enable_cron(p_queue_name text default null,
                                              p_partition_schedule text default '5 * * * *',
                                              p_cleanup_schedule text default '17 * * * *',
                                              p_detach_schedule text default '29 * * * *')
returns table (job_name text, job_id bigint)
language plpgsql as $$
declare
  v_entry record;
begin
  if p_queue_name is not null then
    perform absurd.validate_queue_name(p_queue_name);
    if not exists (select from absurd.queues q where q.queue_name = p_queue_name) then
      raise exception 'Queue "%" not found', p_queue_name;
    end if;
  end if;
  if exists (select from unnest(array[p_partition_schedule, p_cleanup_schedule, p_detach_schedule]) as s
              where s is null or btrim(s, ' ') = '') then
    raise exception 'cron schedules must not be blank';
  end if;
  perform absurd.require_cron(true);
  for v_entry in
    select e.prefix || absurd.cron_scope(p_queue_name) as name, e.schedule,
           e.command || '(' || coalesce(quote_literal(p_queue_name), 'null::text') || ')' as command
      from (values (1, 'absurd_partitions_', p_partition_schedule, 'select absurd.ensure_partitions'),
                   (2, 'absurd_cleanup_', p_cleanup_schedule, 'select * from absurd.cleanup_all_queues'),
                   (3, 'absurd_detach_plan_', p_detach_schedule, 'select * from absurd.schedule_detach_jobs'))
           as e (place, prefix, schedule, command)
     order by e.place
  loop
    perform absurd.unschedule(v_entry.name);
    job_name := v_entry.name;
    execute 'select cron.schedule($1, $2, $3)' into job_id using v_entry.name, v_entry.schedule, v_entry.command;
    return next;
  end loop;
end
$$;

create or replace function absurd.disable_cron(p_queue_name text default null)
returns table (job_name text, job_id bigint)
language plpgsql as $$
declare
  v_scope text := absurd.cron_scope(p_queue_name);
  v_entry record;
begin
  if p_queue_name is not null then
    perform absurd.validate_queue_name(p_queue_name);
  end if;
  perform absurd.require_cron(false);
  for v_entry in execute
    'select j.jobname::text as name, j.jobid as id from cron.job j
      where j.jobname::text = any ($1) or starts_with(j.jobname::text, $2)
         or starts_with(j.jobname::text, $3)
      order by j.jobname, j.jobid'
    using array['absurd_partitions_' || v_scope, 'absurd_cleanup_' || v_scope, 'absurd_detach_plan_' || v_scope],
          'absurd_detach_run_' || v_scope || '_', 'absurd_drop_run_' || v_scope || '_'
  loop
    execute 'select cron.unschedule($1::bigint)' using v_entry.id;
    job_name := v_entry.name;
    job_id := v_entry.id;
    return next;
  end loop;
end
$$;

-- 12_existing_queues
-- Queues that exist get what a newer version of their tables has. Nothing is done where nothing is missing.

select absurd.create_queue(q.queue_name, q.storage_mode)
  from absurd.queues q
 where octet_length(q.queue_name) <= 57 and to_regclass(format('absurd.%I', 't_' || q.queue_name)) is not null;

