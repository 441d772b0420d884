-- Changes how a queue is kept.
select absurd.set_queue_policy($1::text, $2::text::jsonb)::text
