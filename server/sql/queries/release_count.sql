-- Counts releases of runs that had reached a transport; returns the new counts.
insert into absurd_server.released as r (queue_name, run_id, releases, released_at)
select $1::text, u, 1, clock_timestamp() from unnest($2::uuid[]) as u order by u
    on conflict (queue_name, run_id) do update
   set releases = r.releases + 1, released_at = excluded.released_at
returning r.run_id, r.releases
