-- Time for callers of the server: moving runs, sleeping, and the orchestrator's "this run sleeps now".

-- Locks a run and its task, in this order, and says what a write about the run needs to know.
create or replace function absurd_server.hold_run(p_queue text, p_run_id uuid, p_digest text)
returns table (known boolean, owned boolean, state text, expired boolean, task_id uuid, claimed boolean, wake_event text,
               available_at timestamptz)
language plpgsql as $$
declare
  v_run record;
  v_task_state text;
begin
  execute format('select r.task_id, r.state, r.claimed_by, r.wake_event, r.available_at,
                         coalesce(r.failure_reason ->> ''name'' = ''$ClaimTimeout'', false) as expired
                    from absurd.%I r where r.run_id = $1 for update', 'r_' || p_queue) into v_run using p_run_id;
  known := v_run.task_id is not null;
  if known then
    execute format('select t.state from absurd.%I t where t.task_id = $1 for update', 't_' || p_queue)
      into v_task_state using v_run.task_id;
    task_id := v_run.task_id;
    state := case when v_task_state = 'cancelled' then v_task_state else v_run.state end;
    owned := p_digest is null or coalesce(right(v_run.claimed_by, 23) = '#' || p_digest, false);
    expired := v_run.expired;
    claimed := v_run.claimed_by is not null;
    wake_event := v_run.wake_event;
    available_at := v_run.available_at;
  end if;
  return next;
end
$$;

-- Lets a run and its task sleep until a time; the claim is over.
create or replace function absurd_server.suspend_run(p_queue text, p_run_id uuid, p_task_id uuid, p_until timestamptz,
                                                     p_event text) returns void
language plpgsql as $$
begin
  execute format('update absurd.%I r set state = ''sleeping'', claimed_by = null, claim_expires_at = null,
                         available_at = $2, wake_event = $3
                   where r.run_id = $1', 'r_' || p_queue) using p_run_id, p_until, p_event;
  execute format('update absurd.%I t set state = ''sleeping'' where t.task_id = $1', 't_' || p_queue) using p_task_id;
end
$$;

create or replace function absurd_server.schedule_run(p_queue text, p_run_id uuid, p_digest text, p_wake_at timestamptz,
                                                      p_delay_ms bigint)
returns table (known boolean, owned boolean, state text, expired boolean, done boolean, wake_at timestamptz)
language plpgsql as $$
declare
  v_held record;
  v_wake_at timestamptz := coalesce(p_wake_at, absurd.current_time() + p_delay_ms * interval '1 millisecond');
begin
  select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
  known := v_held.known;
  owned := v_held.owned;
  state := v_held.state;
  expired := v_held.expired;
  if v_held.state = 'running' and v_held.owned
     or v_held.state in ('pending', 'sleeping') and v_held.wake_event is null and p_digest is null then
    perform absurd_server.suspend_run(p_queue, p_run_id, v_held.task_id, v_wake_at, null);
    done := true;
    wake_at := v_wake_at;
  elsif v_held.state = 'sleeping' and v_held.wake_event is null and not v_held.claimed then
    done := true;  -- said twice: the claim that is shown has put it to sleep
    wake_at := v_held.available_at;
  end if;
  return next;
end
$$;

drop function if exists absurd_server.sleep_run(text, uuid, text, text, bigint);
create or replace function absurd_server.sleep_run(p_queue text, p_run_id uuid, p_digest text, p_step text,
                                                   p_wake_at timestamptz, p_duration_us bigint)
returns table (known boolean, owned boolean, state text, expired boolean, done boolean, wake_at timestamptz)
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_held record;
  v_stored jsonb;
  v_wake_at timestamptz;
begin
  select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
  known := v_held.known;
  owned := v_held.owned;
  state := v_held.state;
  expired := v_held.expired;
  if not known then
    return next;
    return;
  end if;
  execute format('select c.state from absurd.%I c where c.task_id = $1 and c.checkpoint_name = $2', 'c_' || p_queue)
    into v_stored using v_held.task_id, p_step;
  -- A time as the SDKs store it: a text in ISO form. Anything else under this name is another step's result.
  begin
    v_wake_at := (v_stored #>> '{}')::timestamptz;
  exception when data_exception then
    raise exception 'is the name of a step whose result is no time; two steps need two names';
  end;
  if v_held.state = 'running' and v_held.owned then
    if v_wake_at is null then
      -- Ten years of microseconds are far below 2^53, so the product is exact.
      v_wake_at := coalesce(p_wake_at, v_now + p_duration_us * interval '1 microsecond');
      execute format(
        'insert into absurd.%I (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
         values ($1, $2, $3, ''committed'', $4, $5)
             on conflict (task_id, checkpoint_name) do update
            set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
                updated_at = excluded.updated_at', 'c_' || p_queue)
        using v_held.task_id, p_step, to_jsonb(to_char(v_wake_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')),
              p_run_id, v_now;
    end if;
    done := true;
    if v_wake_at > v_now then
      perform absurd_server.suspend_run(p_queue, p_run_id, v_held.task_id, v_wake_at, null);
      wake_at := v_wake_at;
    end if;
  elsif v_held.state in ('pending', 'sleeping') and not v_held.claimed and v_wake_at = v_held.available_at then
    done := true;  -- said twice
    wake_at := v_wake_at;
  end if;
  return next;
end
$$;

create or replace function absurd_server.set_run_sleeping(p_queue text, p_run_id uuid, p_digest text, p_event text)
returns table (known boolean, owned boolean, state text, expired boolean, done boolean, wake_at timestamptz)
language plpgsql as $$
declare
  v_held record;
  v_wake_at timestamptz;
begin
  select * into v_held from absurd_server.hold_run(p_queue, p_run_id, p_digest);
  known := v_held.known;
  owned := v_held.owned;
  state := v_held.state;
  expired := v_held.expired;
  if v_held.state = 'sleeping' and v_held.wake_event = p_event then
    done := true;
    wake_at := nullif(v_held.available_at, 'infinity');
  elsif v_held.state = 'running' and v_held.owned then
    execute format('select coalesce(min(w.timeout_at), $2) from absurd.%I w where w.run_id = $1', 'w_' || p_queue)
      into v_wake_at using p_run_id, absurd.current_time() + interval '24 hours';
    perform absurd_server.suspend_run(p_queue, p_run_id, v_held.task_id, v_wake_at, p_event);
    done := true;
    wake_at := v_wake_at;
  end if;
  return next;
end
$$;
