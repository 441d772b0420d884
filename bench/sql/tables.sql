-- The columns and indexes that a queue's tasks and runs have, for the limit of the machine.
create table tasks (
  task_id uuid primary key, task_name text not null, params jsonb not null, headers jsonb, retry_strategy jsonb,
  max_attempts integer, cancellation jsonb, enqueue_at timestamptz not null, first_started_at timestamptz,
  state text not null, attempts integer not null, last_attempt_run uuid, completed_payload jsonb,
  cancelled_at timestamptz, idempotency_key text unique
) with (fillfactor = 70);
create table runs (
  run_id uuid primary key, task_id uuid not null, attempt integer not null, state text not null, claimed_by text,
  claim_expires_at timestamptz, available_at timestamptz not null, wake_event text, event_payload jsonb,
  started_at timestamptz, completed_at timestamptz, failed_at timestamptz, result jsonb, failure_reason jsonb,
  created_at timestamptz not null default now()
) with (fillfactor = 70);
create index on runs (state, available_at);
create index on runs (task_id);
create index on runs (claim_expires_at) where state = 'running' and claim_expires_at is not null;
