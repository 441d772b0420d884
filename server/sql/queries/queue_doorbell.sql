-- Hangs the doorbell on a queue, unless it hangs there.
select absurd_server.install_doorbell($1::text)
