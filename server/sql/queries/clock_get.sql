-- The database's time, in microseconds since 1970.
select (extract(epoch from absurd.current_time()) * 1000000)::bigint as now_us
