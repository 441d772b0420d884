-- Checkpoints: the stored results of steps (contract sections 7.17, 7.19, 7.20).
-- The writer's run is locked first, so that a late write cannot slip past the failure of its own run.

create or replace function absurd.set_task_checkpoint_state(p_queue_name text, p_task_id uuid, p_step_name text,
                                                            p_state jsonb, p_owner_run uuid,
                                                            p_extend_claim_by integer default null)
returns void
language plpgsql as $$
declare
  v_now timestamptz := absurd.current_time();
  v_run record;
  v_task_state text;
begin
  if p_step_name is null or btrim(p_step_name, ' ') = '' then
    raise exception 'step_name must be provided';
  end if;
  execute format('select r.task_id, r.attempt, r.state from absurd.%I r where r.run_id = $1 for no key update',
                 'r_' || p_queue_name) into v_run using p_owner_run;
  if v_run.state is null then
    raise exception 'Run % not found in queue "%"', p_owner_run, p_queue_name;
  end if;
  execute format('select t.state from absurd.%I t where t.task_id = $1', 't_' || p_queue_name)
    into v_task_state using v_run.task_id;
  if v_task_state = 'cancelled' then
    raise exception 'Task of run % was cancelled', p_owner_run using errcode = 'AB001';
  elsif v_run.state = 'failed' then
    raise exception 'Run % has already failed', p_owner_run using errcode = 'AB002';
  end if;
  if p_extend_claim_by > 0 then
    execute format('update absurd.%I r set claim_expires_at = $2
                     where r.run_id = $1 and r.state = ''running'' and r.claim_expires_at is not null',
                   'r_' || p_queue_name) using p_owner_run, v_now + make_interval(secs => p_extend_claim_by);
  end if;
  execute format(
    'insert into absurd.%1$I as c (task_id, checkpoint_name, state, status, owner_run_id, updated_at)
     values ($1, $2, $3, ''committed'', $4, $5)
         on conflict (task_id, checkpoint_name) do update
        set state = excluded.state, status = excluded.status, owner_run_id = excluded.owner_run_id,
            updated_at = excluded.updated_at
      where not exists (select from absurd.%2$I o where o.run_id = c.owner_run_id and o.attempt > $6)',
    'c_' || p_queue_name, 'r_' || p_queue_name)
    using p_task_id, p_step_name, p_state, p_owner_run, v_now, v_run.attempt;
end
$$;

create or replace function absurd.get_task_checkpoint_state(p_queue_name text, p_task_id uuid, p_step_name text,
                                                            p_include_pending boolean default false)
returns table (checkpoint_name text, state jsonb, status text, owner_run_id uuid, updated_at timestamptz)
language plpgsql as $$
begin
  return query execute format(
    'select c.checkpoint_name, c.state, c.status, c.owner_run_id, c.updated_at from absurd.%I c
      where c.task_id = $1 and c.checkpoint_name = $2 and ($3 or c.status = ''committed'')', 'c_' || p_queue_name)
    using p_task_id, p_step_name, coalesce(p_include_pending, false);
end
$$;

create or replace function absurd.get_task_checkpoint_states(p_queue_name text, p_task_id uuid, p_run_id uuid)
returns table (checkpoint_name text, state jsonb, status text, owner_run_id uuid, updated_at timestamptz)
language plpgsql as $$
declare
  v_run record;
begin
  execute format('select r.task_id, r.attempt from absurd.%I r where r.run_id = $1', 'r_' || p_queue_name)
    into v_run using p_run_id;
  if v_run.task_id is null then
    raise exception 'Run % not found in queue "%"', p_run_id, p_queue_name;
  end if;
  if v_run.task_id <> p_task_id then
    raise exception 'Run % does not belong to task %', p_run_id, p_task_id;
  end if;
  return query execute format(
    'select c.checkpoint_name, c.state, c.status, c.owner_run_id, c.updated_at
       from absurd.%I c left join absurd.%I o on o.run_id = c.owner_run_id
      where c.task_id = $1 and c.status = ''committed'' and (o.run_id is null or o.attempt <= $2)
      order by c.updated_at', 'c_' || p_queue_name, 'r_' || p_queue_name) using p_task_id, v_run.attempt;
end
$$;
