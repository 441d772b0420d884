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
