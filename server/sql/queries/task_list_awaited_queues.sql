-- Queues of which tasks are awaited.
select distinct a.queue_name from absurd_server.awaited_task a order by a.queue_name limit 1000
