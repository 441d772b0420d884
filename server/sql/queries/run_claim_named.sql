-- As run_claim, for streams that take only some task names. Looks at up to 1,000 runs in claim order after a cursor, so
-- that a queue full of other names costs the same each time; the caller moves the cursor on or back to the head. Runs of
-- the same time are walked by their place in the table, which is the order of the index: nothing is sorted before the page
-- is full.
with clock as materialized (select absurd.current_time() as now),
     seen as materialized (
       (select r.run_id, r.task_id, r.available_at, r.ctid as place
          from {r} r
         where r.state = 'pending' and r.available_at <= (select now from clock)
           and r.available_at >= $6::timestamptz and (r.available_at, r.ctid) > ($6::timestamptz, $7::text::tid)
         order by r.available_at
         limit 1000)
       union all
       (select r.run_id, r.task_id, r.available_at, r.ctid as place
          from {r} r
         where r.state = 'sleeping' and r.available_at <= (select now from clock)
           and r.available_at >= $6::timestamptz and (r.available_at, r.ctid) > ($6::timestamptz, $7::text::tid)
         order by r.available_at
         limit 1000)),
     looked as materialized (
       select * from seen order by available_at, place limit 1000),
     wanted as materialized (
       -- In order, and no further than needed.
       select l.run_id
         from (select * from looked order by available_at, place) l
         cross join lateral (select from {t} t where t.task_id = l.task_id and t.task_name = any ($5::text[]) offset 0) t
        where l.run_id <> all ($8::uuid[])
        limit $4::integer * 2),
     locked as materialized (
       select r.run_id, r.task_id, r.available_at, r.started_at, t.first_started_at
         from wanted
         join {r} r on r.run_id = wanted.run_id
         join {t} t on t.task_id = r.task_id
        where r.state in ('pending', 'sleeping') and r.available_at <= (select now from clock)
          and r.run_id <> all ($8::uuid[])
          and t.state in ('pending', 'sleeping', 'running')
          and (t.cancellation is null
               or not absurd_server.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at,
                                                     (select now from clock)))
          for update of r, t skip locked),
     chosen as materialized (
       select * from locked order by available_at, run_id limit $4::integer),
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
                 runs.was_available_at, runs.resumed, runs.first_claim),
     -- The cursor moves only when a full page was looked at; else the next look starts at the head again.
     edge as (
       select available_at, place from looked
        where (select count(*) from looked) = 1000 and (select count(*) from wanted) < $4::integer * 2
        order by available_at desc, place desc limit 1)
select claimed.*, edge.available_at as edge_at, edge.place::text as edge_place
  from (select 1) as one
  left join edge on true
  left join claimed on true
 order by claimed.slot
