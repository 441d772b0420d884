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
