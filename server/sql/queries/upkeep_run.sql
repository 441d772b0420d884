-- One bounded batch of a queue's policies.
select tasks_deleted, events_deleted, partitions_dropped, more, problem from absurd_server.upkeep($1::text)
