-- Tracking records of workflow runs. The engine does not read them; tasks name them in their headers.

create table if not exists absurd_server.workflow_run (
  workflow_run_id  uuid primary key,
  workflow_name    text not null,
  workflow_version text not null,
  workflow_hash    text,
  status           text not null default 'pending'
                   check (status in ('pending', 'running', 'completed', 'failed', 'cancelled')),
  absurd_run_id    uuid,
  absurd_queue     text not null,
  inputs           jsonb,
  result           jsonb,
  error            jsonb,
  created_by       text,
  tags             jsonb,
  task_count       integer,
  created_at       timestamptz not null default absurd.current_time(),
  started_at       timestamptz,
  completed_at     timestamptz
);
-- Newest first, over all, and within a name or a state.
create index if not exists workflow_run_created on absurd_server.workflow_run (created_at, workflow_run_id);
create index if not exists workflow_run_name on absurd_server.workflow_run (workflow_name, created_at, workflow_run_id);
create index if not exists workflow_run_status on absurd_server.workflow_run (status, created_at, workflow_run_id);
create index if not exists workflow_run_tags on absurd_server.workflow_run using gin (tags jsonb_path_ops);
