-- Makes a record; said twice, it says whether the first one was the same.
with made as (
  insert into absurd_server.workflow_run (workflow_run_id, workflow_name, workflow_version, workflow_hash, absurd_run_id,
                                          absurd_queue, inputs, created_by, tags)
  values ($1::uuid, $2::text, $3::text, $4::text, $5::uuid, $6::text, $7::jsonb, $8::text, $9::jsonb)
      on conflict (workflow_run_id) do nothing
  returning 1)
select exists (select from made)
       or exists (select from absurd_server.workflow_run w
                   where w.workflow_run_id = $1::uuid and w.workflow_name = $2::text and w.workflow_version = $3::text
                     and w.inputs is not distinct from $7::jsonb) as same
