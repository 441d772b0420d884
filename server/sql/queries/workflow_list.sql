-- A page of records, newest first, after a place. Tags, inputs, result and error are left out, in this order, where they would
-- take the record past $10 bytes. The page ends with the record that takes it past $10 bytes; `beyond` marks that record, which
-- belongs to the next page unless it is alone.
with place as materialized (
       select w.workflow_run_id, w.created_at
         from absurd_server.workflow_run w
        where ($1::text is null or w.workflow_name = $1::text)
          and ($2::text is null or w.workflow_version = $2::text)
          and ($3::text is null or w.status = $3::text)
          and ($4::jsonb is null or w.tags @> $4::jsonb)
          and ($5::timestamptz is null or w.created_at >= $5::timestamptz)
          and ($6::timestamptz is null or w.created_at < $6::timestamptz)
          and (w.created_at, w.workflow_run_id) < ($7::timestamptz, $8::uuid)
        order by w.created_at desc, w.workflow_run_id desc
        limit $9::bigint)
select w.workflow_run_id, left(w.workflow_name, 2048) as workflow_name, left(w.workflow_version, 2048) as workflow_version,
       left(w.workflow_hash, 2048) as workflow_hash, w.status, w.absurd_run_id, left(w.absurd_queue, 2048) as absurd_queue,
       left(w.created_by, 2048) as created_by, w.task_count, w.created_at, w.started_at, w.completed_at,
       case when q.tags <= $10::integer then w.tags end as tags,
       case when q.inputs <= $10::integer then w.inputs end as inputs,
       case when q.result <= $10::integer then w.result end as result,
       case when q.error <= $10::integer then w.error end as error,
       q.error > $10::integer as omitted, q.upto > $10::integer as beyond
  from (select p.*, sum(p.bytes) over places as upto, sum(p.bytes) over places - p.bytes as before
          from (select place.*, upto.*,
                       1024 + size.texts
                       + case when upto.error <= $10::integer then upto.error when upto.result <= $10::integer then upto.result
                              when upto.inputs <= $10::integer then upto.inputs when upto.tags <= $10::integer then upto.tags
                              else 0 end as bytes
                  from place
                 cross join lateral (
                       select coalesce(octet_length(w.tags::text), 0) as tags,
                              coalesce(octet_length(w.inputs::text), 0) as inputs,
                              coalesce(octet_length(w.result::text), 0) as result,
                              coalesce(octet_length(w.error::text), 0) as error,
                              octet_length(concat(left(w.workflow_name, 2048), left(w.workflow_version, 2048),
                                                  left(w.workflow_hash, 2048), left(w.absurd_queue, 2048),
                                                  left(w.created_by, 2048))) as texts
                         from absurd_server.workflow_run w where w.workflow_run_id = place.workflow_run_id offset 0) size
                 cross join lateral (
                       select size.tags, size.tags + size.inputs as inputs, size.tags + size.inputs + size.result as result,
                              size.tags + size.inputs + size.result + size.error as error) upto) p
        window places as (order by p.created_at desc, p.workflow_run_id desc)) q
 cross join lateral (select * from absurd_server.workflow_run w where w.workflow_run_id = q.workflow_run_id offset 0) w
 where q.before <= $10::integer
 order by q.created_at desc, q.workflow_run_id desc
