-- Time and ids of the storage contract (sections 4 and 7.27 to 7.31).
-- Every function reads the clock through absurd.current_time(), so that a session can move it for a test.

create schema if not exists absurd;
-- Tells our databases from upstream's when the side schema is gone.
comment on schema absurd is 'storage contract 0.5.1, installed by absurd-server';

create or replace function absurd.current_time() returns timestamptz
language sql volatile as $$
  select coalesce(nullif(btrim(current_setting('absurd.fake_now', true)), '')::timestamptz, clock_timestamp())
$$;

create or replace function absurd.get_schema_version() returns text
language sql as $$ select '0.5.1'::text $$;

-- 48 bits of milliseconds over a random version 4 id; two set bits turn version 4 into version 7.
create or replace function absurd.portable_uuidv7() returns uuid
language sql volatile as $$
  select encode(
           set_bit(set_bit(
             overlay(uuid_send(gen_random_uuid())
                     placing substring(int8send(floor(extract(epoch from absurd.current_time()) * 1000)::bigint) from 3)
                     from 1 for 6),
             52, 1), 53, 1),
           'hex')::uuid
$$;

create or replace function absurd.uuidv7_timestamp(p_id uuid) returns timestamptz
language sql immutable strict as $$
  select case when get_byte(uuid_send(p_id), 6) >> 4 = 7
              then timestamptz '1970-01-01 00:00:00+00'
                   + ('x0000' || encode(substring(uuid_send(p_id) from 1 for 6), 'hex'))::bit(64)::bigint
                     * interval '1 millisecond'
         end
$$;

create or replace function absurd.uuidv7_floor(p_ts timestamptz) returns uuid
language plpgsql immutable strict as $$
declare
  v_ms numeric := floor(extract(epoch from p_ts) * 1000);
begin
  if v_ms < 0 or v_ms >= 281474976710656 then
    raise exception 'the time % does not fit into an id', p_ts;
  end if;
  return (lpad(to_hex(v_ms::bigint), 12, '0') || '70008000000000000000')::uuid;
end
$$;

create or replace function absurd.week_bucket_utc(p_ts timestamptz) returns timestamptz
language sql immutable strict as $$
  select date_trunc('week', p_ts at time zone 'UTC') at time zone 'UTC'
$$;

create or replace function absurd.partition_week_tag(p_ts timestamptz) returns text
language sql immutable strict as $$
  select right(to_char(absurd.week_bucket_utc(p_ts) at time zone 'UTC', 'IYYY'), 1)
         || to_char(absurd.week_bucket_utc(p_ts) at time zone 'UTC', 'IW')
$$;
