-- One checkpoint of a task, or a part of it. What is longer than $6 bytes is left out unless a part is asked for.
select c.checkpoint_name, left(c.status, 2048) as status, c.owner_run_id, c.updated_at,
       case when $4::integer is not null then substr(x.state, $4::integer + 1, $5::integer)
            when octet_length(x.state) <= $6::integer then x.state end as state,
       coalesce(octet_length(x.state) > $6::integer and $4::integer is null, false) as omitted,
       coalesce(length(x.state), 0)::bigint as length
  from {c} c
 cross join lateral (select c.state::text as state offset 0) x
 where c.task_id = $1::uuid and c.checkpoint_name = $2::text and ($3::boolean or c.status = 'committed')
