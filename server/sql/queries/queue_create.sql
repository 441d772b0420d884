-- Creates a queue by the contract's function (7.5).
select absurd.create_queue($1::text, $2::text)::text
