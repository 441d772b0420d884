-- Creates a queue by the contract's function. A repeated call succeeds; one with another storage mode fails.
select absurd.create_queue($1::text, $2::text)::text
