-- Fails runs and makes the next attempts; one row per item. Pauses and cancellations follow the rules of
-- `absurd.fail_run` (`tests/it/contract/retries.sql`, `tests/it/contract/cancellation.sql`).
-- With sweep set an item fails only when its lease has run out, and the reason is made here.
with item as materialized (
       select * from unnest($1::uuid[],         -- runs, each at most once
                            $2::text[],         -- digests; null: no token was shown
                            $3::jsonb[],        -- reasons
                            $4::timestamptz[],  -- retry at; null: as the strategy says
                            $5::uuid[],         -- id of the next run, should there be one
                            $6::boolean[],      -- sweep
                            $7::boolean[])      -- no further attempt
                with ordinality as i (run_id, digest, reason, retry_at, next_run_id, sweep, no_retry, item)),
     clock as materialized (select absurd.current_time() as now),
     locked as materialized (
       select r.run_id, r.task_id, r.attempt, r.state, i.item, i.retry_at, i.no_retry, i.next_run_id, r.failure_reason,
              i.digest is null or coalesce(right(r.claimed_by, 23) = '#' || i.digest, false) as owned,
              case when i.sweep then r.state = 'running' and coalesce(r.claim_expires_at <= i.now, false)
                   when i.digest is null then r.state in ('running', 'sleeping')
                   else r.state = 'running' end as able,
              case when i.sweep
                   then jsonb_strip_nulls(jsonb_build_object(
                          'name', '$ClaimTimeout',
                          'message', 'the lease of worker '
                                     || coalesce(regexp_replace(r.claimed_by, '#[A-Za-z0-9_-]{22}$', ''), 'unknown')
                                     || ' ran out before the run ended',
                          'workerId', regexp_replace(r.claimed_by, '#[A-Za-z0-9_-]{22}$', ''),
                          'claimExpiredAt', r.claim_expires_at,
                          'attempt', r.attempt))
                   else i.reason end as reason
         from (select item.*, clock.now from item cross join clock order by item.run_id) i
         cross join lateral (select * from {r} r where r.run_id = i.run_id for update {wait}) r),
     held as materialized (
       select l.*, t.retry_strategy, t.max_attempts, t.cancellation, t.first_started_at
         from (select * from locked l where l.able and l.owned order by l.task_id) l
         cross join lateral (
           select t.retry_strategy, t.max_attempts, t.cancellation, t.first_started_at
             from {t} t where t.task_id = l.task_id for update {wait}) t),
     plan as materialized (
       select h.item, h.run_id, h.task_id, h.attempt, h.next_run_id, h.reason, h.cancellation, h.first_started_at,
              case when not h.no_retry and (h.max_attempts is null or h.attempt < h.max_attempts)
                   then greatest(clock.now, coalesce(h.retry_at, clock.now
                                                     + absurd_server.retry_delay(h.retry_strategy, h.attempt)))
                        -- greatest() skips nulls: an unusable strategy must not become "now".
                        + case when h.retry_at is null
                                    and absurd_server.retry_delay(h.retry_strategy, h.attempt) is null
                               then null else interval '0' end
              end as next_at
         from held h cross join clock),
     decided as materialized (
       select p.*,
              case when p.next_at is null then 'failed'
                   when extract(epoch from p.next_at - p.first_started_at)
                        >= absurd_server.cancellation_seconds(p.cancellation, 'max_duration') then 'cancelled'
                   when p.next_at > clock.now then 'sleeping'
                   else 'pending' end as next_state
         from plan p cross join clock),
     runs as (
       update {r} r
          set state = 'failed', failed_at = clock.now, failure_reason = d.reason, wake_event = null
         from decided d cross join clock
        where r.run_id = d.run_id
       returning r.run_id),
     next as (
       insert into {r} (run_id, task_id, attempt, state, available_at, created_at)
       select d.next_run_id, d.task_id, d.attempt + 1, d.next_state, d.next_at, clock.now
         from decided d cross join clock
        where d.next_state in ('pending', 'sleeping')
       returning run_id),
     tasks as (
       update {t} t
          set state = d.next_state,
              attempts = greatest(t.attempts, d.attempt + (d.next_state in ('pending', 'sleeping'))::integer),
              last_attempt_run = case when d.next_state in ('pending', 'sleeping') then d.next_run_id
                                      else d.run_id end,
              cancelled_at = case when d.next_state = 'cancelled' then coalesce(t.cancelled_at, clock.now)
                                  else t.cancelled_at end
         from decided d cross join clock
        where t.task_id = d.task_id),
     waits as (
       delete from {w} w using decided d where w.run_id = d.run_id)
select i.item, coalesce(l.run_id, seen.run_id) is not null as found, l.run_id is null as skipped,
       coalesce(l.state, seen.state) as state, coalesce(l.owned, false) as owned, d.run_id is not null as done,
       coalesce(l.task_id, seen.task_id) as task_id,
       l.state = 'failed' and l.failure_reason is not distinct from i.reason as same,
       coalesce(l.failure_reason ->> 'name' = '$ClaimTimeout', false) as expired,
       coalesce(d.next_state, task.state) as task_state,
       coalesce(case when d.next_state in ('pending', 'sleeping') then d.next_run_id end, after.run_id) as next_run_id,
       coalesce(case when d.next_state in ('pending', 'sleeping') then d.attempt + 1 end, after.attempt)
         as next_attempt,
       coalesce(case when d.next_state in ('pending', 'sleeping') then d.next_at end, after.available_at)
         as next_available_at,
       coalesce(ceil(extract(epoch from d.next_at - clock.now) * 1000), 0)::bigint as next_in_ms
  from item i
  cross join clock
  left join locked l on l.item = i.item
  left join lateral (select r.run_id, r.task_id, r.state from {r} r where l.run_id is null and r.run_id = i.run_id
                     offset 0) seen on true
  left join decided d on d.item = i.item
  -- For a repeated call: what the first one led to.
  left join lateral (select t.state from {t} t
                      where d.run_id is null and l.state = 'failed' and t.task_id = l.task_id offset 0) task on true
  left join lateral (select r.run_id, r.attempt, r.available_at from {r} r
                      where d.run_id is null and l.state = 'failed' and r.task_id = l.task_id
                        and r.attempt = l.attempt + 1 offset 0) after on true
 order by i.item
