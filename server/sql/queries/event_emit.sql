-- Emits an event and wakes those who wait for it.
select applied, woken from absurd_server.emit_event($1::text, $2::text, $3::jsonb)
