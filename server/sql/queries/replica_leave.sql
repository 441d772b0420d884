-- This replica stops.
delete from absurd_server.replica r
 where r.replica_id = $1::text or r.seen_at < clock_timestamp() - interval '1 hour'
