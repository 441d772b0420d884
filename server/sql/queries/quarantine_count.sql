-- How many tasks are set aside, by reason.
select q.reason, count(*) as tasks from absurd_server.quarantine q group by q.reason
