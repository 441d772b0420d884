-- Sets runs aside that cannot be moved on, each for 30 s at first and twice as long each time, up to 10 min.
insert into absurd_server.quarantine as q (queue_name, run_id, task_id, reason, problem, retry_at)
select $1::text, i.run_id, r.task_id, $2::text, i.problem, absurd.current_time() + interval '30 seconds'
  from unnest($3::uuid[], $4::text[]) as i (run_id, problem)
 cross join lateral (select r.task_id from {r} r where r.run_id = i.run_id offset 0) r
 order by i.run_id
    on conflict (queue_name, run_id) do update
   set reason = excluded.reason, problem = excluded.problem, times = q.times + 1,
       retry_at = absurd.current_time() + least(interval '10 minutes', interval '30 seconds' * power(2, least(q.times, 10)))
