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
