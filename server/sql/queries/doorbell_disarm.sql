-- Takes away what this replica armed, or what replicas armed that are gone.
delete from absurd_server.armed a
 where a.replica_id = $1::text
    or not exists (select from absurd_server.replica r
                    where r.replica_id = a.replica_id and r.seen_at > clock_timestamp() - interval '1 minute')
