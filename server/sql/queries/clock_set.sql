-- The time of this session, in microseconds since 1970; null: the real one.
select set_config('absurd.fake_now',
                  coalesce((timestamptz 'epoch' + $1::bigint * interval '1 microsecond')::text, ''), false) as set_to
