-- Wakes the next of those who wait for an event that was emitted.
select woken, more from absurd_server.emit_more($1::text, $2::text, $3::integer)
