-- Drops a queue by the contract's function (7.6).
select absurd.drop_queue($1::text)::text
