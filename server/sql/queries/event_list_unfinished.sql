-- Emissions that have not woken all who wait.
select queue_name, event_name from absurd_server.emission limit 100
