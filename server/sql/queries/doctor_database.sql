-- Settings and states of the database that a server should know of.
select current_setting('server_version') as version,
       current_setting('fsync') as fsync,
       current_setting('synchronous_commit') as synchronous_commit,
       current_setting('autovacuum') as autovacuum,
       nullif(btrim(current_setting('absurd.fake_now', true)), '') as fake_now,
       pg_is_in_recovery() as standby
