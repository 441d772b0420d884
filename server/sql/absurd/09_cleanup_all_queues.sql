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
