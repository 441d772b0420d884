-- Retry delays and cancellation policies as pure functions (contract sections 5.3, 5.4, 7.38).

-- A number of a strategy: JSON number or a string that holds one. Anything else is refused with AB003.
create or replace function absurd.strategy_number(p_strategy jsonb, p_key text, p_default double precision)
returns double precision
language plpgsql immutable as $$
declare
  v_value jsonb := p_strategy -> p_key;
begin
  if v_value is null or jsonb_typeof(v_value) = 'null' then
    return p_default;
  end if;
  if jsonb_typeof(v_value) not in ('number', 'string') then
    raise exception 'retry strategy: % is not a number', p_key using errcode = 'AB003';
  end if;
  return (p_strategy ->> p_key)::double precision;
exception when invalid_text_representation or numeric_value_out_of_range then
  raise exception 'retry strategy: % is not a number', p_key using errcode = 'AB003';
end
$$;

create or replace function absurd.retry_delay_seconds(p_strategy jsonb, p_attempt integer) returns double precision
language plpgsql immutable as $$
declare
  v_kind text;
  v_base double precision;
  v_factor double precision;
  v_max double precision;
  v_delay double precision;
  v_power integer := greatest(coalesce(p_attempt, 1), 1) - 1;
begin
  if p_strategy is null then
    return 0;
  end if;
  if jsonb_typeof(p_strategy) <> 'object' then
    raise exception 'retry strategy must be a JSON object' using errcode = 'AB003';
  end if;
  v_kind := coalesce(p_strategy ->> 'kind', 'none');
  if v_kind = 'none' then
    return 0;
  end if;
  if v_kind not in ('fixed', 'exponential') then
    raise exception 'retry strategy: unknown kind "%"', v_kind using errcode = 'AB003';
  end if;
  v_base := absurd.strategy_number(p_strategy, 'base_seconds', case v_kind when 'fixed' then 60 else 30 end);
  -- NaN sorts above every number, so the upper bound refuses it too.
  if v_base < 0 or v_base > 86400 then
    raise exception 'retry strategy: base_seconds must be between 0 and 86400' using errcode = 'AB003';
  end if;
  if v_kind = 'fixed' then
    return v_base;
  end if;
  v_factor := absurd.strategy_number(p_strategy, 'factor', 2);
  if v_factor < 0 or v_factor >= 'infinity'::double precision then
    raise exception 'retry strategy: factor must be finite and not negative' using errcode = 'AB003';
  end if;
  v_max := absurd.strategy_number(p_strategy, 'max_seconds', 86400);
  if v_max < 0 or v_max > 86400 then
    raise exception 'retry strategy: max_seconds must be between 0 and 86400' using errcode = 'AB003';
  end if;
  if v_base = 0 then
    return 0;
  end if;
  begin
    v_delay := v_base * power(v_factor, v_power);
  exception when numeric_value_out_of_range or floating_point_exception then
    v_delay := case when v_factor < 1 then 0 else v_max end;
  end;
  return least(v_delay, v_max);
end
$$;

-- Seconds of a cancellation policy; a value that is no whole number counts as absent, so that one bad task never stops
-- the claims of its queue.
create or replace function absurd.cancellation_seconds(p_policy jsonb, p_key text) returns bigint
language sql immutable as $$
  select case when jsonb_typeof(p_policy) = 'object' and p_policy ->> p_key ~ '^[[:space:]]*[+-]?[0-9]{1,18}[[:space:]]*$'
              then (p_policy ->> p_key)::bigint
         end
$$;

create or replace function absurd.cancellation_due(p_policy jsonb, p_enqueue_at timestamptz,
                                                   p_first_started_at timestamptz, p_now timestamptz)
returns boolean
language sql immutable as $$
  select coalesce(
           case when p_policy is null then false
                when p_first_started_at is null
                then extract(epoch from p_now - p_enqueue_at) >= absurd.cancellation_seconds(p_policy, 'max_delay')
                else extract(epoch from p_now - p_first_started_at)
                     >= absurd.cancellation_seconds(p_policy, 'max_duration')
           end, false)
$$;
