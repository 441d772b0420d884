-- Lets the creators of a queue take turns, until their transactions end.
select pg_advisory_xact_lock(hashtextextended('absurd create queue ' || $1::text, 0))::text
