-- A part of one payload of a record, and the length of the whole.
select substr(x.text, $3::integer + 1, $4::integer) as part, coalesce(length(x.text), 0)::bigint as length
  from absurd_server.workflow_run w
 cross join lateral (
       select case $2::text when 'tags' then w.tags when 'inputs' then w.inputs when 'result' then w.result
                            when 'error' then w.error end::text as text
       offset 0) x
 where w.workflow_run_id = $1::uuid
