-- Emits an event and wakes those who wait for it, up to a limit.
select applied, woken, more from absurd_server.emit_event($1::text, $2::text, $3::jsonb, $4::integer)
