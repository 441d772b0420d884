-- Deletes a batch of old events.
select absurd_server.cleanup_events($1::text, $2::integer, $3::integer) as deleted
