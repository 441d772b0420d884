-- Seconds for which the oldest transaction of this database has kept dead rows from being removed. Vacuums keep none.
-- What others do is visible to members of pg_read_all_stats only.
select coalesce(max(seconds), 0)::float8 as seconds
  from (select extract(epoch from clock_timestamp() - a.xact_start)
          from pg_catalog.pg_stat_activity a
         where a.datname = current_database() and a.backend_xmin is not null and a.pid <> pg_backend_pid()
           and a.backend_type <> 'autovacuum worker'
         union all
        select extract(epoch from clock_timestamp() - p.prepared)
          from pg_catalog.pg_prepared_xacts p where p.database = current_database()) open (seconds)
