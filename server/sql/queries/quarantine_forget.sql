-- Forgets what was set aside and has moved on since.
select absurd_server.quarantine_forget()
