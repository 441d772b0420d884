-- Emissions that have not woken all who wait, of each queue the first few: no queue takes the places of the others.
select q.queue_name, e.event_name
  from (select distinct queue_name from absurd_server.emission) q
 cross join lateral (select x.event_name from absurd_server.emission x
                      where x.queue_name = q.queue_name order by x.event_name limit 10) e
 order by q.queue_name, e.event_name
 limit 1000
