-- How many tasks of a queue can be claimed and wait; counts up to a bound, in the index.
select count(*) as waiting
  from (select from {r} r where r.state = 'pending' and r.available_at <= absurd.current_time() limit $1) as waiting
