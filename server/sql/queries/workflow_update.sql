-- Changes what is given.
update absurd_server.workflow_run w
   set status = coalesce($2::text, w.status), result = coalesce($3::jsonb, w.result), error = coalesce($4::jsonb, w.error),
       started_at = coalesce($5::timestamptz, w.started_at), completed_at = coalesce($6::timestamptz, w.completed_at),
       task_count = coalesce($7::integer, w.task_count)
 where w.workflow_run_id = $1::uuid
returning true as found
