-- Counts of a queue, each up to a cap.
select (select count(*) from (select from {r} r where r.state = 'pending' limit $1::bigint) x) as pending,
       (select count(*) from (select from {r} r where r.state = 'sleeping' limit $1::bigint) x) as sleeping,
       (select count(*) from (select from {r} r where r.state = 'running' limit $1::bigint) x) as running,
       (select count(*) from (select from {r} r where r.state = 'failed' limit $1::bigint) x) as failed,
       (select count(*) from (select from {r} r where r.state = 'completed' limit $1::bigint) x) as completed,
       (select count(*) from (select from {r} r where r.state = 'cancelled' limit $1::bigint) x) as cancelled,
       (extract(epoch from absurd.current_time() - least(
          (select r.available_at from {r} r where r.state = 'pending' and r.available_at <= absurd.current_time()
            order by r.available_at limit 1),
          (select r.available_at from {r} r where r.state = 'sleeping' and r.available_at <= absurd.current_time()
            order by r.available_at limit 1))) * 1000)::bigint as oldest_ms
