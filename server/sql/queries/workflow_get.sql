-- One record. Tags, inputs, result and error are left out, in this order, where they would take it past $2 bytes.
select w.workflow_run_id, left(w.workflow_name, 2048) as workflow_name, left(w.workflow_version, 2048) as workflow_version,
       left(w.workflow_hash, 2048) as workflow_hash, w.status, w.absurd_run_id, left(w.absurd_queue, 2048) as absurd_queue,
       left(w.created_by, 2048) as created_by, w.task_count, w.created_at, w.started_at, w.completed_at,
       case when upto.tags <= $2::integer then w.tags end as tags,
       case when upto.inputs <= $2::integer then w.inputs end as inputs,
       case when upto.result <= $2::integer then w.result end as result,
       case when upto.error <= $2::integer then w.error end as error,
       upto.error > $2::integer as omitted
  from absurd_server.workflow_run w
 cross join lateral (
       select coalesce(octet_length(w.tags::text), 0) as tags, coalesce(octet_length(w.inputs::text), 0) as inputs,
              coalesce(octet_length(w.result::text), 0) as result, coalesce(octet_length(w.error::text), 0) as error
       offset 0) size
 cross join lateral (
       select size.tags, size.tags + size.inputs as inputs, size.tags + size.inputs + size.result as result,
              size.tags + size.inputs + size.result + size.error as error) upto
 where w.workflow_run_id = $1::uuid
