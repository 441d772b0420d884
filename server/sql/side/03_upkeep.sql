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
