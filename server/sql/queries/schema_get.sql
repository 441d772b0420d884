-- Whether the schemas are there, and how many of the tables that every queue has.
select
  to_regclass('absurd.queues') is not null as contract,
  to_regclass('absurd_server.setting') is not null as side,
  (
    select count(*)::int
    from unnest(array['t', 'r', 'c', 'e', 'w']) as kind
    where to_regclass(format('absurd.%I', kind || '_' || coalesce($1::text, ''))) is not null
  ) as tables
