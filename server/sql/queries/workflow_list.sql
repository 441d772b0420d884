-- A page of records, newest first, after a place.
select w.*
  from absurd_server.workflow_run w
 where ($1::text is null or w.workflow_name = $1::text)
   and ($2::text is null or w.workflow_version = $2::text)
   and ($3::text is null or w.status = $3::text)
   and ($4::jsonb is null or w.tags @> $4::jsonb)
   and ($5::timestamptz is null or w.created_at >= $5::timestamptz)
   and ($6::timestamptz is null or w.created_at < $6::timestamptz)
   and (w.created_at, w.workflow_run_id) < ($7::timestamptz, $8::uuid)
 order by w.created_at desc, w.workflow_run_id desc
 limit $9::bigint
