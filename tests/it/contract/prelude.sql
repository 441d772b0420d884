-- What the contract's test files share. Each file runs in a transaction of its own and is rolled back.
create function pg_temp.fails(p_sql text, p_code text default 'P0001', p_part text default '') returns void
language plpgsql as $$
begin
  begin
    execute p_sql;
  exception when others then
    if sqlstate <> p_code or position(lower(p_part) in lower(sqlerrm)) = 0 then
      raise exception 'wanted % "%", got % "%": %', p_code, p_part, sqlstate, sqlerrm, p_sql;
    end if;
    return;
  end;
  raise exception 'did not fail with %: %', p_code, p_sql;
end
$$;
create function pg_temp.eq(p_got anycompatible, p_wanted anycompatible, p_what text default '') returns void
language plpgsql as $$
begin
  if p_got is distinct from p_wanted then
    raise exception 'wanted %, got %: %', p_wanted, p_got, p_what;
  end if;
end
$$;
-- Moves the session's clock.
create function pg_temp.at(p_time text) returns void
language sql as $$ select set_config('absurd.fake_now', p_time, false) $$;
-- Spawns into queue q; the ids in between are not of interest.
create function pg_temp.spawn(p_options jsonb default '{}', p_queue text default 'q') returns uuid
language sql as $$ select s.task_id from absurd.spawn_task(p_queue, 'n', '{"a": 1}', p_options) s $$;
create function pg_temp.claim(p_queue text default 'q', p_timeout integer default 30) returns uuid
language sql as $$ select c.run_id from absurd.claim_task(p_queue, 'w', p_timeout, 1) c $$;
create function pg_temp.task(p_task uuid, p_column text, p_queue text default 'q') returns text
language plpgsql as $$
declare
  v_value text;
begin
  execute format('select t.%I::text from absurd.%I t where t.task_id = $1', p_column, 't_' || p_queue)
    into strict v_value using p_task;
  return v_value;
end
$$;
create function pg_temp.run(p_run uuid, p_column text, p_queue text default 'q') returns text
language plpgsql as $$
declare
  v_value text;
begin
  execute format('select r.%I::text from absurd.%I r where r.run_id = $1', p_column, 'r_' || p_queue)
    into strict v_value using p_run;
  return v_value;
end
$$;
create function pg_temp.count_rows(p_table text) returns bigint
language plpgsql as $$
declare
  v_count bigint;
begin
  execute format('select count(*) from absurd.%I', p_table) into v_count;
  return v_count;
end
$$;
set time zone 'UTC';
select absurd.create_queue('q');
select pg_temp.at('2026-01-01T00:00:00Z');
