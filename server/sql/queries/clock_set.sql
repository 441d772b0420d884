-- The time of this session, in microseconds since 1970; null: the real one. Seconds apart,
-- because a product of an interval goes through a double.
select set_config('absurd.fake_now',
                  coalesce((timestamptz 'epoch' + $1::bigint / 1000000 * interval '1 second'
                            + $1::bigint % 1000000 * interval '1 microsecond')::text, ''), false) as set_to
