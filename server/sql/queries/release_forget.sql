-- Forgets release counts that are a day old.
delete from absurd_server.released r where r.released_at < clock_timestamp() - interval '1 day'
