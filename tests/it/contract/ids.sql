-- Time and ids: `portable_uuidv7`, `uuidv7_timestamp`, `uuidv7_floor`, weeks, and the clock that a session can set.
do $$
declare
  v_id uuid := absurd.portable_uuidv7();
  v_day timestamptz;
begin
  perform pg_temp.at('2026-02-03T04:05:06.789999Z');
  v_id := absurd.portable_uuidv7();
  perform pg_temp.eq(substr(v_id::text, 15, 1), '7', 'version');
  perform pg_temp.eq(substr(v_id::text, 20, 1) in ('8', '9', 'a', 'b'), true, 'variant');
  perform pg_temp.eq(absurd.uuidv7_timestamp(v_id), '2026-02-03T04:05:06.789Z'::timestamptz, 'cut off, not rounded');
  perform pg_temp.eq(absurd.uuidv7_timestamp(gen_random_uuid()), null::timestamptz);
  perform pg_temp.eq(absurd.uuidv7_floor('1970-01-01T00:00:00.001999Z'), '00000000-0001-7000-8000-000000000000'::uuid);
  perform pg_temp.fails($q$select absurd.uuidv7_floor('1960-01-01')$q$);
  perform pg_temp.fails($q$select absurd.uuidv7_floor('20000-01-01')$q$);
  perform pg_temp.eq(absurd.week_bucket_utc('2026-01-04T23:59:59Z'), '2025-12-29T00:00:00Z'::timestamptz);
  perform pg_temp.eq(absurd.partition_week_tag('2021-01-01'), '053');
  perform pg_temp.eq(absurd.partition_week_tag('2024-01-01'), '401');
  perform pg_temp.eq(absurd.partition_week_tag('2024-12-31'), '501');
  perform set_config('absurd.fake_now', '  ', false);
  v_day := absurd.current_time();
  perform pg_temp.eq(v_day between clock_timestamp() - interval '1 minute' and clock_timestamp(), true, 'blank is unset');
  perform pg_temp.eq(absurd.current_time() > v_day, true, 'the clock moves inside a transaction');
  perform pg_temp.eq(absurd.get_schema_version(), '0.5.1');
end
$$;
