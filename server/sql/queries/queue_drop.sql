-- Drops a queue by the contract's function. A queue that does not exist is no error.
select absurd.drop_queue($1::text)::text
