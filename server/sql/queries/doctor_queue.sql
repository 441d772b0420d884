-- What should not be in a queue's tables, counted up to a bound.
select
  (select count(*) from (select from {c} c where not exists (select from {t} t where t.task_id = c.task_id)
                          limit $1::bigint) x) as orphan_checkpoints,
  (select count(*) from (select from {r} r where not exists (select from {t} t where t.task_id = r.task_id)
                          limit $1::bigint) x) as orphan_runs,
  (select count(*) from (select from {w} w
                          where not exists (select from {r} r where r.run_id = w.run_id and r.state = 'sleeping')
                          limit $1::bigint) x) as stale_waits,
  (select count(*) from (select from {e} e
                          where e.payload is null and not exists (select from {w} w where w.event_name = e.event_name)
                          limit $1::bigint) x) as idle_placeholders,
  (select count(*) from (select from {t} t
                          where t.state in ('completed', 'failed', 'cancelled')
                            and not exists (select from {r} r where r.run_id = t.last_attempt_run)
                          limit $1::bigint) x) as endless_tasks,
  (select count(*) from (select from {t} t
                          where t.state in ('pending', 'running', 'sleeping')
                            and not exists (select from {r} r where r.task_id = t.task_id
                                               and r.state in ('pending', 'running', 'sleeping'))
                          limit $1::bigint) x) as stuck_tasks,
  (select count(*) from (select from {r} r
                          where r.state = 'running' and r.claim_expires_at < absurd.current_time() - interval '1 minute'
                          limit $1::bigint) x) as overdue_leases,
  (select count(*) from (select from {t} t where t.tableoid = to_regclass(format('absurd.%I', 't_' || $2::text || '_d'))
                          limit $1::bigint) x) as in_default_partition
