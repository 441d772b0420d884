-- Wakes runs whose awaited tasks have ended; says which queues have woken runs.
select distinct waiting_queue from absurd_server.settle_awaited($1::text, $2::uuid[], $3::integer)
