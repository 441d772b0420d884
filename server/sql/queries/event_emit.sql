-- Emits events and wakes those who wait for them, up to a limit. No row: somebody holds the event.
with item as materialized (select * from unnest($2::text[], $3::jsonb[]) as i (event_name, payload)),
     held as materialized (
       select e.event_name from (select event_name from item order by event_name) i
        cross join lateral (select e.event_name from {e} e where e.event_name = i.event_name offset 0 for update {wait}) e),
     free as materialized (
       select array_agg(i.event_name order by i.event_name) as names, array_agg(i.payload order by i.event_name) as payloads
         from item i
        where i.event_name in (select event_name from held)
           or not exists (select from {e} e where e.event_name = i.event_name))
select s.event_name, s.applied, s.woken, s.more
  from free cross join lateral absurd_server.emit_events($1::text, free.names, free.payloads, $4::integer) s
