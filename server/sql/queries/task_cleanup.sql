-- Deletes a batch of tasks that ended long ago.
select absurd_server.cleanup_tasks($1::text, $2::integer, $3::integer) as deleted
