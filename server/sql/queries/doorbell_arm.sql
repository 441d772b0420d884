-- Arms the doorbell of queues.
select absurd_server.arm($1::text[], $2::text)::text
