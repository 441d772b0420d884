-- Tables of queues that the role of the server cannot use in full: tables and columns that are missing, rights, row security,
-- triggers of others.
select q.queue_name, k.kind, c.oid is null as missing,
       array(select f.name from unnest(k.columns) f(name)
              where c.oid is not null
                and not exists (select from pg_catalog.pg_attribute a
                                 where a.attrelid = c.oid and a.attname = f.name and not a.attisdropped)) as lost,
       array(select p from unnest(array['select', 'insert', 'update', 'delete']) p
              where c.oid is not null and not has_table_privilege(c.oid, p)) as lacks,
       c.oid is not null and row_security_active(c.oid) as row_security,
       array(select t.tgname::text from pg_catalog.pg_trigger t
              where t.tgrelid = c.oid and not t.tgisinternal and t.tgname <> 'absurd_server_doorbell'
                and t.tgenabled <> 'D') as triggers
  from absurd.queues q
 cross join (values
         ('t', array['task_id', 'task_name', 'params', 'headers', 'retry_strategy', 'max_attempts', 'cancellation',
                     'enqueue_at', 'first_started_at', 'state', 'attempts', 'last_attempt_run', 'completed_payload',
                     'cancelled_at']),
         ('r', array['run_id', 'task_id', 'attempt', 'state', 'claimed_by', 'claim_expires_at', 'available_at',
                     'wake_event', 'event_payload', 'started_at', 'completed_at', 'failed_at', 'result', 'failure_reason',
                     'created_at']),
         ('c', array['task_id', 'checkpoint_name', 'state', 'owner_run_id', 'updated_at']),
         ('e', array['event_name', 'payload', 'emitted_at']),
         ('w', array['task_id', 'run_id', 'step_name', 'event_name', 'timeout_at'])) k(kind, columns)
  left join pg_catalog.pg_class c
    on c.relname = k.kind || '_' || q.queue_name and c.relnamespace = to_regnamespace('absurd')
 order by 1, 2
