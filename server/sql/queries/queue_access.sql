-- How far the tables of a queue can be used now; waits for nothing.
select absurd_server.queue_access($1::text) as access
