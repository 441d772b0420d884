-- Checkpoints that each run of a batch may see, oldest first, while their text fits a budget. Those that a later
-- attempt wrote are left out (`tests/it/contract/checkpoints.sql`).
-- At least one row beyond the budget comes back too, so that the reader can tell "all" from "cut".
select i.run_id, x.checkpoint_name, x.state, x.owner_run_id, x.updated_at, x.bytes > $4::bigint as beyond
  from unnest($1::uuid[],     -- tasks
              $2::uuid[],     -- runs
              $3::integer[])  -- attempts
         as i (task_id, run_id, attempt)
 cross join lateral (
       select c.checkpoint_name, c.state, c.owner_run_id, c.updated_at,
              sum(coalesce(octet_length(c.state::text), 4) + octet_length(c.checkpoint_name) + 128)
                over (order by c.updated_at, c.checkpoint_name) as bytes,
              sum(coalesce(octet_length(c.state::text), 4) + octet_length(c.checkpoint_name) + 128)
                over (order by c.updated_at, c.checkpoint_name rows between unbounded preceding and 1 preceding)
                as before
         from {c} c left join {r} o on o.run_id = c.owner_run_id
        where c.task_id = i.task_id and c.status = 'committed' and (o.run_id is null or o.attempt <= i.attempt)
        order by c.updated_at, c.checkpoint_name
        limit 10001) x
 where coalesce(x.before, 0) <= $4::bigint
 order by i.run_id, x.updated_at, x.checkpoint_name
