-- Rings other replicas.
select absurd_server.ring($1::text[], $2::text)::text
