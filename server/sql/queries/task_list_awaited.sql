-- Whether a run waits for a task at all.
select exists (select from absurd_server.awaited_task) as awaited
