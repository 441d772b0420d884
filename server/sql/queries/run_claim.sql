-- Claims up to $4 runs, one per slot; a slot is one unit of credit of one stream.
-- Two ordered walks of the (state, available_at) index, each to as many rows as are wanted.
-- Slots and runs are laid side by side as arrays, and parts carry along what later parts need: a join of the one with the
-- other would compare each pair. Runs that Postgres refuses to have claimed ($5) are passed over.
with clock as materialized (select absurd.current_time() as now),
     pending as materialized (
       select r.run_id, r.task_id, r.available_at, r.started_at, t.first_started_at
         from {r} r join {t} t on t.task_id = r.task_id
        where r.state = 'pending' and r.available_at <= (select now from clock) and r.run_id <> all ($5::uuid[])
          and t.state in ('pending', 'sleeping', 'running')
          and (t.cancellation is null
               or not absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at,
                                                     (select now from clock)))
        order by r.available_at
        limit $4::integer
          for update of r, t skip locked),
     sleeping as materialized (
       select r.run_id, r.task_id, r.available_at, r.started_at, t.first_started_at
         from {r} r join {t} t on t.task_id = r.task_id
        where r.state = 'sleeping' and r.available_at <= (select now from clock) and r.run_id <> all ($5::uuid[])
          and t.state in ('pending', 'sleeping', 'running')
          and (t.cancellation is null
               or not absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at,
                                                     (select now from clock)))
        order by r.available_at
        limit $4::integer
          for update of r, t skip locked),
     chosen as materialized (
       select x.* from (select * from pending union all select * from sleeping) x
        order by x.available_at, x.run_id
        limit $4::integer),
     slot as materialized (
       select s.*
         from (select array_agg(run_id) as run_ids, array_agg(available_at) as available_at,
                      array_agg(started_at is not null) as resumed, array_agg(first_started_at is null) as first_claim
                 from chosen) c
        cross join lateral unnest($1::text[],     -- worker ids
                                  $2::text[],     -- digests of the claim secrets
                                  $3::integer[],  -- leases in seconds, 0 for ever
                                  c.run_ids, c.available_at, c.resumed, c.first_claim)
          with ordinality as s (worker_id, digest, lease, run_id, available_at, resumed, first_claim, slot)
        where s.run_id is not null),
     runs as (
       update {r} r
          set state = 'running', claimed_by = slot.worker_id || '#' || slot.digest, started_at = clock.now,
              available_at = clock.now,
              claim_expires_at = case when slot.lease > 0 then clock.now + make_interval(secs => slot.lease) end
         from slot cross join clock
        where r.run_id = slot.run_id
       returning r.run_id, r.task_id, r.attempt, r.wake_event, r.event_payload, r.claim_expires_at, slot.slot,
                 slot.available_at as was_available_at, slot.resumed, slot.first_claim),
     due as (
       delete from {w} w using runs, clock where runs.resumed and w.run_id = runs.run_id and w.timeout_at <= clock.now),
     claimed as (
       update {t} t
          set state = 'running', attempts = greatest(t.attempts, runs.attempt), last_attempt_run = runs.run_id,
              first_started_at = coalesce(t.first_started_at, clock.now)
         from runs cross join clock
        where t.task_id = runs.task_id
       returning runs.slot, runs.run_id, runs.task_id, runs.attempt, t.task_name, t.params, t.retry_strategy,
                 t.max_attempts, t.headers, runs.wake_event, runs.event_payload, runs.claim_expires_at,
                 runs.was_available_at, runs.resumed, runs.first_claim)
select * from claimed order by slot
