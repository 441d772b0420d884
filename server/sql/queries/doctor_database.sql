-- Settings and states of the database that a server should know of.
select current_setting('server_version') as version,
       current_setting('fsync') as fsync,
       current_setting('synchronous_commit') as synchronous_commit,
       current_setting('autovacuum') as autovacuum,
       nullif(btrim(current_setting('absurd.fake_now', true)), '') as fake_now,
       pg_is_in_recovery() as standby,
       (select max(extract(epoch from clock_timestamp() - a.xact_start))::bigint
          from pg_catalog.pg_stat_activity a where a.backend_xmin is not null and a.pid <> pg_backend_pid())
         as oldest_snapshot_seconds
