-- Entries of pg_cron. The stand-in for the extension has only the parts that the contract allows its functions to use.
do $$
begin
  perform pg_temp.fails($q$select absurd.enable_cron('nowhere')$q$);
  perform pg_temp.fails($q$select absurd.enable_cron(null, ' ')$q$);
  perform pg_temp.fails($q$select absurd.enable_cron()$q$);
  perform pg_temp.fails($q$select absurd.schedule_detach_jobs()$q$);
end
$$;
create schema cron;
create table cron.job (jobid bigint generated always as identity, jobname text, schedule text, command text);
create function cron.schedule(a text, b text, c text) returns bigint
language sql as $$ insert into cron.job (jobname, schedule, command) values (a, b, c) returning jobid $$;
create function cron.unschedule(a bigint) returns boolean
language sql as $$ with gone as (delete from cron.job where jobid = a returning 1) select exists (select from gone) $$;
do $$
declare
  v_scope text := left(md5('it''s p'), 12);
  v_drop record;
begin
  perform absurd.create_queue('it''s p', 'partitioned');
  perform pg_temp.eq((select array_agg(e.job_name) from absurd.enable_cron('it''s p', '1 * * * *') e),
                     array['absurd_partitions_' || v_scope, 'absurd_cleanup_' || v_scope, 'absurd_detach_plan_' || v_scope]);
  perform absurd.enable_cron('it''s p');
  perform pg_temp.eq((select count(*)::integer from cron.job), 3, 'replaced, not doubled');
  perform pg_temp.eq((select array_agg(j.schedule order by j.jobid) from cron.job j), array['5 * * * *', '17 * * * *', '29 * * * *']);
  perform pg_temp.eq((select position($c$absurd.ensure_partitions('it''s p')$c$ in j.command) > 0 from cron.job j
                       where j.jobname like 'absurd_partitions%'), true);
  perform absurd.enable_cron();
  perform pg_temp.eq((select position('absurd.cleanup_all_queues(null::text)' in j.command) > 0 from cron.job j
                       where j.jobname = 'absurd_cleanup_all'), true);

  perform pg_temp.at('2027-01-01T00:00:00Z');
  perform absurd.set_queue_policy('it''s p', '{"detach_mode": "empty"}');
  perform pg_temp.eq((select array_agg(s.job_kind || ' ' || s.partition_table) from absurd.schedule_detach_jobs('it''s p') s
                       where s.partition_table like 't\_%' or s.partition_table like 'w\_%'),
                     array['detach t_it''s p_601', 'drop t_it''s p_601', 'detach w_it''s p_601', 'drop w_it''s p_601']);
  perform pg_temp.eq((select count(*)::integer from absurd.schedule_detach_jobs('it''s p')), 0, 'one at a time per table');
  perform pg_temp.eq((select count(*)::integer from absurd.schedule_detach_jobs()), 0, 'in any scope');
  perform pg_temp.eq((select j.command from cron.job j
                       where j.jobname = format('absurd_detach_run_%s_%s_%s', v_scope, left(md5('t_it''s p'), 8),
                                                left(md5('t_it''s p:t_it''s p_601'), 12))),
                     'alter table absurd."t_it''s p" detach partition absurd."t_it''s p_601"');
  select * into v_drop from cron.job j where j.command like '%drop_detached_partition(''t\_%';
  execute v_drop.command;
  perform pg_temp.eq((select count(*)::integer from cron.job j where j.jobid = v_drop.jobid), 1, 'not detached yet');
  alter table absurd."t_it's p" detach partition absurd."t_it's p_601";
  execute v_drop.command;
  perform pg_temp.eq((select count(*)::integer from cron.job j where j.command like '%t\_it%'), 0);
  perform pg_temp.eq(to_regclass('absurd."t_it''s p_601"') is null, true);

  -- Without a default partition the detach may be concurrent.
  perform absurd.set_queue_policy('it''s p', '{"default_partition": "disabled"}');
  perform absurd.schedule_detach_jobs('it''s p');
  perform pg_temp.eq((select j.command from cron.job j where j.command like 'alter table absurd."t\_%'),
                     'alter table absurd."t_it''s p" detach partition absurd."t_it''s p_602" concurrently');

  perform pg_temp.eq((select count(*)::integer from absurd.disable_cron('it''s p')), 11, 'three and four pairs');
  perform pg_temp.eq((select count(*)::integer from absurd.disable_cron('it''s p')), 0);
  perform absurd.enable_cron('it''s p');
  perform absurd.drop_queue('it''s p');
  perform pg_temp.eq((select array_agg(j.jobname order by j.jobname) from cron.job j),
                     array['absurd_cleanup_all', 'absurd_detach_plan_all', 'absurd_partitions_all']);
  perform pg_temp.eq((select count(*)::integer from absurd.disable_cron()), 3);
end
$$;
