-- Tasks: spawn, result, cancel, retry (contract sections 7.10, 7.11, 7.16, 7.23).

create or replace function absurd.spawn_task(p_queue_name text, p_task_name text, p_params jsonb,
                                             p_options jsonb default '{}'::jsonb)
returns table (task_id uuid, run_id uuid, attempt integer, created boolean)
language plpgsql as $$
declare
  v_task_id uuid := absurd.portable_uuidv7();
  v_run_id uuid := absurd.portable_uuidv7();
  v_now timestamptz := absurd.current_time();
  v_options jsonb := coalesce(p_options, '{}'::jsonb);
  v_key text := p_options ->> 'idempotency_key';
  v_max_attempts integer := (p_options ->> 'max_attempts')::integer;
  v_parted boolean := false;
  v_rows integer;
begin
  if p_task_name is null or btrim(p_task_name, ' ') = '' then
    raise exception 'task_name must be provided';
  end if;
  if v_max_attempts < 1 then
    raise exception 'max_attempts must be at least 1';
  end if;
  if v_options ? 'retry_strategy' then
    perform absurd.retry_delay_seconds(v_options -> 'retry_strategy', 1);
  end if;

  if v_key is not null then
    v_parted := to_regclass(format('absurd.%I', 'i_' || p_queue_name)) is not null;
  end if;
  for v_try in 1 .. 10 loop
    if v_parted then
      execute format('insert into absurd.%I (idempotency_key, task_id) values ($1, $2) on conflict do nothing',
                     'i_' || p_queue_name) using v_key, v_task_id;
      get diagnostics v_rows = row_count;
    else
      v_rows := 1;
    end if;
    if v_rows = 1 then
      execute format(
        'insert into absurd.%I (task_id, task_name, params, headers, retry_strategy, max_attempts, cancellation,
                                enqueue_at, state, attempts, last_attempt_run, idempotency_key)
         values ($1, $2, $3, $4, $5, $6, $7, $8, ''pending'', 1, $9, $10) %s',
        't_' || p_queue_name,
        case when v_key is not null and not v_parted then 'on conflict (idempotency_key) do nothing' else '' end)
        using v_task_id, p_task_name, coalesce(p_params, 'null'::jsonb), v_options -> 'headers',
              v_options -> 'retry_strategy', v_max_attempts, v_options -> 'cancellation', v_now, v_run_id, v_key;
      get diagnostics v_rows = row_count;
    end if;
    if v_rows = 1 then
      execute format('insert into absurd.%I (run_id, task_id, attempt, state, available_at, created_at)
                      values ($1, $2, 1, ''pending'', $3, $3)', 'r_' || p_queue_name)
        using v_run_id, v_task_id, v_now;
      return query select v_task_id, v_run_id, 1, true;
      return;
    end if;

    if v_parted then
      execute format('select t.task_id, t.last_attempt_run, t.attempts
                        from absurd.%I i join absurd.%I t on t.task_id = i.task_id
                       where i.idempotency_key = $1 for key share of i',
                     'i_' || p_queue_name, 't_' || p_queue_name)
        into task_id, run_id, attempt using v_key;
      if task_id is null then
        raise exception 'the task of idempotency key "%" is being removed', v_key
          using errcode = '40001', hint = 'retry the spawn';
      end if;
    else
      execute format('select t.task_id, t.last_attempt_run, t.attempts from absurd.%I t where t.idempotency_key = $1',
                     't_' || p_queue_name)
        into task_id, run_id, attempt using v_key;
    end if;
    if task_id is not null then
      if run_id is null then
        raise exception 'task % has no run', task_id;
      end if;
      created := false;
      return next;
      return;
    end if;
    -- The owner of the key was removed between the two statements: try again.
  end loop;
  raise exception 'the idempotency key "%" keeps changing hands', v_key
    using errcode = '40001', hint = 'retry the spawn';
end
$$;

create or replace function absurd.get_task_result(p_queue_name text, p_task_id uuid)
returns table (task_id uuid, state text, result jsonb, failure_reason jsonb)
language plpgsql as $$
begin
  perform absurd.validate_queue_name(p_queue_name);
  return query execute format(
    'select t.task_id, t.state,
            case when t.state = ''completed'' then t.completed_payload end,
            case when t.state = ''failed''
                 then (select r.failure_reason from absurd.%I r where r.run_id = t.last_attempt_run) end
       from absurd.%I t where t.task_id = $1',
    'r_' || p_queue_name, 't_' || p_queue_name) using p_task_id;
end
$$;

-- Runs are locked before the task, in run order, as everywhere.
create or replace function absurd.cancel_task(p_queue_name text, p_task_id uuid) returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_state text;
  v_locked uuid[];
  v_missed boolean;
begin
  loop
    begin
      execute format('select array(select r.run_id from absurd.%I r
                                    where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')
                                    order by r.run_id for update)', 'r_' || p_queue_name)
        into v_locked using p_task_id;
      execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
        into v_state using p_task_id;
      -- A failure or a retry may have made a run since; its lock comes before the task's. Give all back, and begin anew.
      execute format('select exists (select from absurd.%I r
                                      where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')
                                        and r.run_id <> all ($2))', 'r_' || p_queue_name)
        into v_missed using p_task_id, v_locked;
      if v_missed then
        raise exception using errcode = 'AB999', message = 'another run was made meanwhile';
      end if;
      exit;
    exception when sqlstate 'AB999' then
      null;
    end;
  end loop;
  if v_state is null then
    raise exception 'Task % not found in queue "%"', p_task_id, p_queue_name;
  end if;
  if v_state not in ('pending', 'running', 'sleeping') then
    return;
  end if;
  execute format('update absurd.%I r set state = ''cancelled'', claimed_by = null, claim_expires_at = null
                   where r.task_id = $1 and r.state in (''pending'', ''running'', ''sleeping'')',
                 'r_' || p_queue_name) using p_task_id;
  execute format('update absurd.%I t set state = ''cancelled'', cancelled_at = coalesce(t.cancelled_at, $2)
                   where t.task_id = $1', 't_' || p_queue_name) using p_task_id, v_now;
  execute format('delete from absurd.%I w where w.task_id = $1', 'w_' || p_queue_name) using p_task_id;
end
$$;

create or replace function absurd.retry_task(p_queue_name text, p_task_id uuid, p_options jsonb default '{}'::jsonb)
returns table (task_id uuid, run_id uuid, attempt integer, created boolean)
language plpgsql as $$
declare
  v_options jsonb := coalesce(p_options, '{}'::jsonb);
  v_spawn_new boolean := coalesce((v_options ->> 'spawn_new')::boolean, false);
  v_max_attempts integer := (v_options ->> 'max_attempts')::integer;
  v_now timestamptz := absurd.current_time();
  v_run_id uuid := absurd.portable_uuidv7();
  v_task record;
  v_copy jsonb;
begin
  if v_max_attempts < 1 then
    raise exception 'max_attempts must be at least 1';
  end if;
  execute format('select t.task_name, t.params, t.headers, t.retry_strategy, t.max_attempts, t.cancellation, t.state,
                         t.attempts
                    from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue_name)
    into v_task using p_task_id;
  if v_task.state is null then
    raise exception 'Task % not found in queue "%"', p_task_id, p_queue_name;
  end if;
  if v_task.state <> 'failed' then
    raise exception 'Task % is %, only failed tasks can be retried', p_task_id, v_task.state;
  end if;

  if v_spawn_new then
    v_copy := jsonb_strip_nulls(jsonb_build_object(
      'headers', v_task.headers, 'retry_strategy', v_task.retry_strategy, 'cancellation', v_task.cancellation,
      'max_attempts', coalesce(v_max_attempts, v_task.max_attempts)));
    return query select s.task_id, s.run_id, s.attempt, true
                   from absurd.spawn_task(p_queue_name, v_task.task_name, v_task.params, v_copy) s;
    return;
  end if;

  v_max_attempts := coalesce(v_max_attempts, coalesce(v_task.max_attempts, v_task.attempts) + 1);
  if v_max_attempts <= v_task.attempts then
    raise exception 'max_attempts (%) must be greater than current attempts (%)', v_max_attempts, v_task.attempts;
  end if;
  execute format('insert into absurd.%I (run_id, task_id, attempt, state, available_at, created_at)
                  values ($1, $2, $3, ''pending'', $4, $4)', 'r_' || p_queue_name)
    using v_run_id, p_task_id, v_task.attempts + 1, v_now;
  execute format('update absurd.%I t set state = ''pending'', attempts = $2, max_attempts = $3, last_attempt_run = $4,
                         cancelled_at = null
                   where t.task_id = $1', 't_' || p_queue_name)
    using p_task_id, v_task.attempts + 1, v_max_attempts, v_run_id;
  return query select p_task_id, v_run_id, v_task.attempts + 1, false;
end
$$;
