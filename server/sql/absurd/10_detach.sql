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
