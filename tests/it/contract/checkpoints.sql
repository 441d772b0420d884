-- Checkpoints: the runs that may write one, and the attempts that see it.
do $$
declare
  v_task uuid;
  v_one uuid;
  v_two uuid;
begin
  v_task := pg_temp.spawn('{"max_attempts": 3}');
  v_one := pg_temp.claim();
  perform pg_temp.fails(format('select absurd.set_task_checkpoint_state(%L, %L, %L, %L, %L)', 'q', v_task, ' ', '1', v_one));
  perform pg_temp.fails(format('select absurd.set_task_checkpoint_state(%L, %L, %L, %L, %L)', 'q', v_task, 's', '1',
                               gen_random_uuid()));
  perform absurd.set_task_checkpoint_state('q', v_task, 's', '{"v": 1}', v_one, 100);
  perform pg_temp.eq(pg_temp.run(v_one, 'claim_expires_at'), '2026-01-01 00:01:40+00');
  perform pg_temp.eq((select (g.checkpoint_name, g.state, g.status, g.owner_run_id, g.updated_at)::text
                        from absurd.get_task_checkpoint_state('q', v_task, 's') g),
                     ('s', '{"v": 1}'::jsonb, 'committed', v_one, '2026-01-01 00:00:00+00'::timestamptz)::text);
  perform absurd.set_task_checkpoint_state('q', v_task, 's', null, v_one);
  perform pg_temp.eq((select g.state::text from absurd.get_task_checkpoint_state('q', v_task, 's') g), null::text);
  perform pg_temp.eq(pg_temp.run(v_one, 'claim_expires_at'), '2026-01-01 00:01:40+00', 'no extension was asked for');

  -- An older attempt never replaces what a newer one wrote.
  perform absurd.fail_run('q', v_one, '1');
  perform pg_temp.fails(format('select absurd.set_task_checkpoint_state(%L, %L, %L, %L, %L)', 'q', v_task, 's', '1', v_one),
                        'AB002');
  v_two := pg_temp.claim();
  perform absurd.set_task_checkpoint_state('q', v_task, 's', '"new"', v_two);
  perform pg_temp.at('2026-01-01T00:00:01Z');
  perform absurd.set_task_checkpoint_state('q', v_task, 'later', '"l"', v_two);
  update absurd.r_q r set state = 'completed' where r.run_id = v_one;
  perform absurd.set_task_checkpoint_state('q', v_task, 's', '"old"', v_one);
  perform pg_temp.eq((select g.state::text from absurd.get_task_checkpoint_state('q', v_task, 's') g), '"new"');
  perform pg_temp.eq((select array_agg(g.checkpoint_name) from absurd.get_task_checkpoint_states('q', v_task, v_two) g),
                     array['s', 'later'], 'by time');
  perform pg_temp.eq((select count(*)::integer from absurd.get_task_checkpoint_states('q', v_task, v_one)), 0,
                     'an older attempt does not see them');
  perform pg_temp.fails(format('select absurd.get_task_checkpoint_states(%L, %L, %L)', 'q', v_task, gen_random_uuid()));
  perform pg_temp.fails(format('select absurd.get_task_checkpoint_states(%L, %L, %L)', 'q', gen_random_uuid(), v_two),
                        'P0001', 'does not belong');

  -- Other statuses are for those who ask.
  insert into absurd.c_q (task_id, checkpoint_name, status) values (v_task, 'p', 'pending');
  perform pg_temp.eq((select count(*)::integer from absurd.get_task_checkpoint_state('q', v_task, 'p')), 0);
  perform pg_temp.eq((select count(*)::integer from absurd.get_task_checkpoint_state('q', v_task, 'p', true)), 1);
  -- The task id of a checkpoint is taken as it comes.
  perform absurd.set_task_checkpoint_state('q', v_two, 's', '1', v_two);
end
$$;
