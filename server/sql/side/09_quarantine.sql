-- Tasks that cannot be moved on: set aside with a reason, so that they hold up nobody else and an operator sees them.

create table if not exists absurd_server.quarantine (
  queue_name text not null,
  run_id     uuid not null,
  task_id    uuid not null,
  reason     text not null,
  problem    text not null,
  times      integer not null default 1,
  since      timestamptz not null default absurd.current_time(),
  retry_at   timestamptz not null,
  primary key (queue_name, run_id)
);

-- claim: claiming it raises, or it cannot be read; lease: its lease ran out and its failure raises; policy: its cancellation
-- raises; size: it fits into no message.
alter table absurd_server.quarantine drop constraint if exists quarantine_reason_check;
alter table absurd_server.quarantine
  add constraint quarantine_reason_check check (reason in ('claim', 'lease', 'policy', 'size'));

-- Forgets what has moved on, or whose queue is gone. A queue that cannot be read now keeps its entries.
create or replace function absurd_server.quarantine_forget() returns void
language plpgsql set lock_timeout = '20ms' as $$
declare
  v_queue text;
begin
  for v_queue in select distinct q.queue_name from absurd_server.quarantine q order by q.queue_name loop
    begin
      if to_regclass(format('absurd.%I', 'r_' || v_queue)) is null then
        delete from absurd_server.quarantine q where q.queue_name = v_queue;
      else
        perform absurd_server.lock_for_read('r_' || v_queue);
        execute format(
          'delete from absurd_server.quarantine q
            where q.queue_name = $1
              and not exists (select from absurd.%I r
                               where r.run_id = q.run_id
                                 and case q.reason when ''lease'' then r.state = ''running''
                                                   when ''policy''
                                                     then r.state in (''pending'', ''sleeping'', ''running'')
                                                   -- One that is too large is put off: it sleeps.
                                                   else r.state in (''pending'', ''sleeping'') end)',
          'r_' || v_queue) using v_queue;
      end if;
    exception when others then
      raise warning 'the set aside tasks of queue % could not be looked at: %', v_queue, sqlerrm;
    end;
  end loop;
end
$$;
