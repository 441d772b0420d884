-- Tells other replicas which runs ended here, in messages of a few hundred ids.
select pg_notify('absurd_server', m)::text from unnest($1::text[]) as m
