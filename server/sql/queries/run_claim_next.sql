-- The $4 runs that would be claimed next by streams of these names ($1; none: all), after a cursor ($2), past those that are
-- passed over ($3). Locked, so that they can be tried one by one. Seldom run: only after a claim was refused.
with clock as materialized (select absurd.current_time() as now),
     pending as materialized (
       select r.run_id, r.available_at
         from {r} r join {t} t on t.task_id = r.task_id
        where r.state = 'pending' and r.available_at <= (select now from clock) and r.run_id <> all ($3::uuid[])
          and t.state in ('pending', 'sleeping', 'running')
          and (cardinality($1::text[]) = 0 or t.task_name = any ($1::text[]) and r.available_at >= $2::timestamptz)
          and (t.cancellation is null
               or not absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at,
                                                     (select now from clock)))
        order by r.available_at
        limit $4::integer
          for update of r, t skip locked),
     sleeping as materialized (
       select r.run_id, r.available_at
         from {r} r join {t} t on t.task_id = r.task_id
        where r.state = 'sleeping' and r.available_at <= (select now from clock) and r.run_id <> all ($3::uuid[])
          and t.state in ('pending', 'sleeping', 'running')
          and (cardinality($1::text[]) = 0 or t.task_name = any ($1::text[]) and r.available_at >= $2::timestamptz)
          and (t.cancellation is null
               or not absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at,
                                                     (select now from clock)))
        order by r.available_at
        limit $4::integer
          for update of r, t skip locked)
select x.run_id from (select * from pending union all select * from sleeping) x
 order by x.available_at, x.run_id
 limit $4::integer
