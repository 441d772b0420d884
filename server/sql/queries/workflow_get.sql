-- One record.
select w.* from absurd_server.workflow_run w where w.workflow_run_id = $1::uuid
