-- Keys (suffix null) and indexes that a queue should have and does not have, or has half built. The name decides nothing: any index will do that is
-- valid and begins with the column.
select q.queue_name, k.kind, k.suffix, k.columns, k.condition
  from absurd.queues q
 cross join (values
         ('t', null, 'task_id', null),
         ('r', null, 'run_id', null),
         ('c', null, 'task_id, checkpoint_name', null),
         ('e', null, 'event_name', null),
         ('w', null, 'run_id, step_name', null),
         ('t', 'ci', 'task_id', 'cancellation is not null'),
         ('t', 'cai', 'cancelled_at', 'cancelled_at is not null'),
         ('r', 'sai', 'state, available_at', null),
         ('r', 'ti', 'task_id', null),
         ('r', 'cei', 'claim_expires_at', 'state = ''running'' and claim_expires_at is not null'),
         ('r', 'coi', 'completed_at', 'completed_at is not null'),
         ('r', 'fai', 'failed_at', 'failed_at is not null'),
         ('e', 'eai', 'emitted_at', null),
         ('w', 'eni', 'event_name', null),
         ('w', 'ti', 'task_id', null)) k(kind, suffix, columns, condition)
  join pg_catalog.pg_class c
    on c.relname = k.kind || '_' || q.queue_name and c.relnamespace = to_regnamespace('absurd')
 where not exists (
         select from pg_catalog.pg_index i
          where i.indrelid = c.oid and i.indisvalid and i.indisready and (k.suffix is not null or i.indisunique)
            and (i.indpred is null) = (k.condition is null)
            and starts_with((select string_agg(a.attname, ', ' order by key.ordinal)
                               from unnest(i.indkey::smallint[]) with ordinality as key(number, ordinal)
                               join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = key.number), k.columns))
 order by 1, 2, 3
