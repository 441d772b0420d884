-- Committed checkpoints of a task after a place, oldest first: those that an attempt may see, which leaves out those of
-- later attempts, or those that a run itself has written. A value of more than $7 bytes is left out. The page ends with
-- the row that takes its values past $7 bytes; `beyond` marks that row, which belongs to the next page unless it is
-- alone.
select q.checkpoint_name, q.status, q.owner_run_id, q.updated_at, q.length, q.omitted, q.upto > $7::integer as beyond,
       case when not q.omitted
            then (select s.state::text from {c} s where s.task_id = $1::uuid and s.checkpoint_name = q.checkpoint_name)
       end as state
  from (select p.checkpoint_name, p.status, p.owner_run_id, p.updated_at, p.length, p.omitted,
               sum(p.bytes) over places as upto, sum(p.bytes) over places - p.bytes as before
          from (select c.checkpoint_name, left(c.status, 2048) as status, c.owner_run_id, c.updated_at,
                       coalesce(length(c.state::text), 0)::bigint as length,
                       coalesce(octet_length(c.state::text) > $7::integer, false) as omitted,
                       octet_length(c.checkpoint_name) + octet_length(left(c.status, 2048)) + 128
                       + case when octet_length(c.state::text) <= $7::integer then octet_length(c.state::text) else 0 end
                       as bytes
                  from {c} c
                  left join lateral (select r.attempt from {r} r where r.run_id = c.owner_run_id offset 0) o on true
                 where c.task_id = $1::uuid and c.status = 'committed'
                   and ($2::integer is null or o.attempt is null or o.attempt <= $2::integer)
                   and ($3::uuid is null or c.owner_run_id = $3::uuid)
                   and (c.updated_at, c.checkpoint_name) > ($4::timestamptz, $5::text)
                 order by c.updated_at, c.checkpoint_name
                 limit $6::bigint) p
        window places as (order by p.updated_at, p.checkpoint_name)) q
 where q.before <= $7::integer
 order by q.updated_at, q.checkpoint_name
