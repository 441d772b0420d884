-- Runs: claim, complete, fail, schedule, extend (contract sections 7.12 to 7.15, 7.18).

create or replace function absurd.fail_run(p_queue_name text, p_run_id uuid, p_reason jsonb,
                                           p_retry_at timestamptz default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task record;
  v_next_id uuid;
  v_next_at timestamptz;
  v_state text := 'failed';
begin
  execute format('select r.task_id, r.attempt, r.state from absurd.%I r where r.run_id = $1 for update',
                 'r_' || p_queue_name) into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  elsif v_run.state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_run_id using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_run_id using errcode = 'AB002';
  elsif v_run.state not in ('running', 'sleeping') then
    raise exception 'Run % is %, it cannot be failed', p_run_id, v_run.state;
  end if;
  execute format('select t.retry_strategy, t.max_attempts, t.cancellation, t.first_started_at
                    from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
    into v_task using v_run.task_id;
  execute format('update absurd.%I r set state = ''failed'', failed_at = $2, failure_reason = $3, wake_event = null
                   where r.run_id = $1', 'r_' || p_queue_name) using p_run_id, v_now, p_reason;

  if v_task.max_attempts is null or v_run.attempt + 1 <= v_task.max_attempts then
    begin
      v_next_at := greatest(v_now, coalesce(p_retry_at,
                     v_now + absurd.retry_delay_seconds(v_task.retry_strategy, v_run.attempt) * interval '1 second'));
    exception when sqlstate 'AB003' then
      v_next_at := null;  -- an invalid stored strategy: no further attempt
    end;
    if extract(epoch from v_next_at - v_task.first_started_at)
       >= absurd.cancellation_seconds(v_task.cancellation, 'max_duration') then
      v_state := 'cancelled';
    elsif v_next_at is not null then
      v_next_id := absurd.portable_uuidv7();
      v_state := case when v_next_at > v_now then 'sleeping' else 'pending' end;
      execute format('insert into absurd.%I (run_id, task_id, attempt, state, available_at, created_at)
                      values ($1, $2, $3, $4, $5, $6)', 'r_' || p_queue_name)
        using v_next_id, v_run.task_id, v_run.attempt + 1, v_state, v_next_at, v_now;
    end if;
  end if;

  execute format('update absurd.%I t
                     set state = $2, attempts = greatest(t.attempts, $3), last_attempt_run = $4,
                         cancelled_at = case when $2 = ''cancelled'' then coalesce(t.cancelled_at, $5)
                                             else t.cancelled_at end
                   where t.task_id = $1', 't_' || p_queue_name)
    using v_run.task_id, v_state, v_run.attempt + (v_next_id is not null)::integer, coalesce(v_next_id, p_run_id),
          v_now;
  execute format('delete from absurd.%I w where w.run_id = $1', 'w_' || p_queue_name) using p_run_id;
end
$$;

-- Cancels what is due, without waiting for anybody: what is locked stays, and the claim withholds it.
-- A call looks at so many tasks with a policy at most; where there are more, finished ones included, the next call of
-- this session goes on behind them. So the cost of a claim does not grow with the history.
create or replace function absurd.cancel_due_tasks(p_queue_name text, p_limit integer) returns integer
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_setting text := 'absurd.sweep_' || md5(p_queue_name);
  v_after text := coalesce(nullif(current_setting(v_setting, true), ''), '00000000-0000-0000-0000-000000000000');
  v_due uuid[];
  v_seen integer;
  v_last uuid;
  v_task_id uuid;
  v_live integer;
  v_locked integer;
  v_done integer := 0;
begin
  execute format(
    'select array_agg(t.task_id order by t.task_id)
              filter (where t.state in (''pending'', ''running'', ''sleeping'')
                        and absurd.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, $1)),
            count(*), (array_agg(t.task_id order by t.task_id desc))[1]
       from (select t.task_id, t.state, t.cancellation, t.enqueue_at, t.first_started_at from absurd.%I t
              where t.cancellation is not null and t.task_id > $2 order by t.task_id limit $3) t',
    't_' || p_queue_name) into v_due, v_seen, v_last using v_now, v_after::uuid, p_limit;
  if v_seen = p_limit then
    perform set_config(v_setting, v_last::text, false);
  elsif v_after <> '00000000-0000-0000-0000-000000000000' then
    perform set_config(v_setting, '', false);
  end if;

  foreach v_task_id in array coalesce(v_due, '{}') loop
    execute format(
      'with locked as (select 1 from absurd.%1$I r
                        where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')
                        order by r.run_id for update skip locked)
       select (select count(*) from locked),
              (select count(*) from absurd.%1$I r
                where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping''))',
      'r_' || p_queue_name) into v_locked, v_live using v_task_id;
    continue when v_locked < v_live;
    execute format('select count(*) from (select 1 from absurd.%I t where t.task_id = $1 for update skip locked) x',
                   't_' || p_queue_name) into v_locked using v_task_id;
    continue when v_locked = 0;
    perform absurd.cancel_task(p_queue_name, v_task_id);
    v_done := v_done + 1;
  end loop;
  return v_done;
end
$$;

-- Two ordered walks of the (state, available_at) index, one per claimable state, each to as many rows as are wanted,
-- instead of a sort of the whole backlog. The settings hold the planner to these walks where it has no statistics yet,
-- or those of a queue that was empty.
create or replace function absurd.claim_task(p_queue_name text, p_worker_id text, p_claim_timeout integer default 30,
                                             p_qty integer default 1)
returns table (run_id uuid, task_id uuid, attempt integer, task_name text, params jsonb, retry_strategy jsonb,
               max_attempts integer, headers jsonb, wake_event text, event_payload jsonb)
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  v_now timestamptz := absurd.current_time();
  v_worker text := coalesce(nullif(p_worker_id, ''), 'worker');
  v_timeout integer := greatest(coalesce(p_claim_timeout, 30), 0);
  v_qty integer := greatest(coalesce(p_qty, 1), 1);
  v_expired record;
  v_any boolean;
begin
  perform absurd.cancel_due_tasks(p_queue_name, 500);

  for v_expired in execute format(
    'select r.run_id, r.claimed_by, r.claim_expires_at, r.attempt from absurd.%I r
      where r.state = ''running'' and r.claim_expires_at is not null and r.claim_expires_at <= $1
      order by r.claim_expires_at, r.run_id limit $2 for update skip locked', 'r_' || p_queue_name)
    using v_now, v_qty
  loop
    perform absurd.fail_run(
      p_queue_name, v_expired.run_id,
      jsonb_strip_nulls(jsonb_build_object(
        'name', '$ClaimTimeout',
        'message', format('the lease of worker %s ran out before the run ended',
                          coalesce(regexp_replace(v_expired.claimed_by, '#[A-Za-z0-9_-]{22}$', ''), 'unknown')),
        'workerId', regexp_replace(v_expired.claimed_by, '#[A-Za-z0-9_-]{22}$', ''),
        'claimExpiredAt', v_expired.claim_expires_at,
        'attempt', v_expired.attempt)),
      null);
  end loop;

  -- Most polls find nothing: they shall not pay for the plan of a claim.
  execute format('select exists (select from absurd.%1$I r where r.state = ''pending'' and r.available_at <= $1)
                      or exists (select from absurd.%1$I r where r.state = ''sleeping'' and r.available_at <= $1)',
                 'r_' || p_queue_name) into v_any using v_now;
  if not v_any then
    return;
  end if;

  return query execute format(
    'with pending as (
       select r.run_id, r.task_id, r.available_at
         from absurd.%1$I r join absurd.%2$I t on t.task_id = r.task_id
        where r.state = ''pending'' and r.available_at <= $1
          and t.state in (''pending'', ''sleeping'', ''running'')
          and not absurd.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, $1)
        order by r.available_at, r.run_id limit $2 for update of r, t skip locked),
     sleeping as (
       select r.run_id, r.task_id, r.available_at
         from absurd.%1$I r join absurd.%2$I t on t.task_id = r.task_id
        where r.state = ''sleeping'' and r.available_at <= $1
          and t.state in (''pending'', ''sleeping'', ''running'')
          and not absurd.cancellation_due(t.cancellation, t.enqueue_at, t.first_started_at, $1)
        order by r.available_at, r.run_id limit $2 for update of r, t skip locked),
     chosen as (
       select * from (select * from pending union all select * from sleeping) x
        order by x.available_at, x.run_id limit $2),
     runs as (
       update absurd.%1$I r
          set state = ''running'', claimed_by = $3, started_at = $1, available_at = $1,
              claim_expires_at = case when $4 > 0 then $1 + make_interval(secs => $4) end
         from chosen where r.run_id = chosen.run_id
       returning r.run_id, r.task_id, r.attempt, r.wake_event, r.event_payload, chosen.available_at),
     tasks as (
       update absurd.%2$I t
          set state = ''running'', attempts = greatest(t.attempts, runs.attempt), last_attempt_run = runs.run_id,
              first_started_at = coalesce(t.first_started_at, $1)
         from runs where t.task_id = runs.task_id
       returning t.task_id, t.task_name, t.params, t.retry_strategy, t.max_attempts, t.headers),
     due as (
       delete from absurd.%3$I w using runs where w.run_id = runs.run_id and w.timeout_at <= $1)
     select runs.run_id, runs.task_id, runs.attempt, tasks.task_name, tasks.params, tasks.retry_strategy,
            tasks.max_attempts, tasks.headers, runs.wake_event, runs.event_payload
       from runs join tasks on tasks.task_id = runs.task_id
      order by runs.available_at, runs.run_id',
    'r_' || p_queue_name, 't_' || p_queue_name, 'w_' || p_queue_name)
    using v_now, v_qty, v_worker, v_timeout;
end
$$;

create or replace function absurd.complete_run(p_queue_name text, p_run_id uuid, p_state jsonb default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
begin
  execute format('select r.task_id, r.state from absurd.%I r where r.run_id = $1 for update', 'r_' || p_queue_name)
    into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  elsif v_run.state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_run_id using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_run_id using errcode = 'AB002';
  elsif v_run.state <> 'running' then
    raise exception 'Run % is %, it cannot be completed', p_run_id, v_run.state;
  end if;
  execute format('update absurd.%I r set state = ''completed'', completed_at = $2, result = $3 where r.run_id = $1',
                 'r_' || p_queue_name) using p_run_id, v_now, p_state;
  execute format('update absurd.%I t set state = ''completed'', completed_payload = $2, last_attempt_run = $3
                   where t.task_id = $1', 't_' || p_queue_name) using v_run.task_id, p_state, p_run_id;
  execute format('delete from absurd.%I w where w.run_id = $1', 'w_' || p_queue_name) using p_run_id;
end
$$;

create or replace function absurd.schedule_run(p_queue_name text, p_run_id uuid, p_wake_at timestamptz) returns void
language plpgsql as $$
declare
  v_task_id uuid;
begin
  execute format('select r.task_id from absurd.%I r where r.run_id = $1 and r.state = ''running'' for update',
                 'r_' || p_queue_name) into v_task_id using p_run_id;
  if v_task_id is null then
    raise exception 'Run % is not currently running in queue "%"', p_run_id, p_queue_name;
  end if;
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = null
                   where r.run_id = $1', 'r_' || p_queue_name) using p_run_id, p_wake_at;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue_name)
    using v_task_id;
end
$$;

create or replace function absurd.extend_claim(p_queue_name text, p_run_id uuid, p_extend_by integer) returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task_state text;
begin
  if p_extend_by is null or p_extend_by <= 0 then
    raise exception 'extend_by must be > 0';
  end if;
  execute format('select r.task_id, r.state, r.claim_expires_at from absurd.%I r where r.run_id = $1 for update',
                 'r_' || p_queue_name) into v_run using p_run_id;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  end if;
  execute format('select t.state from absurd.%I t where t.task_id = $1', 't_' || p_queue_name)
    into v_task_state using v_run.task_id;
  if v_task_state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_run_id using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_run_id using errcode = 'AB002';
  elsif v_run.state <> 'running' then
    raise exception 'Run % is not currently running', p_run_id;
  elsif v_run.claim_expires_at is null then
    raise exception 'Run % has no lease to extend', p_run_id;
  end if;
  execute format('update absurd.%I r set claim_expires_at = $2 where r.run_id = $1', 'r_' || p_queue_name)
    using p_run_id, v_now + make_interval(secs => p_extend_by);
end
$$;
