#!/bin/sh
# The original operators' tool: every command, against the database in ABSURD_DATABASE_URL.
set -eu
cd "$(dirname "$0")/../.."
ctl() { .venv/bin/absurdctl "$@"; }
sql() { psql -XAtq "$ABSURD_DATABASE_URL" -c "$1"; }
has() { # what, text
  case "$2" in *"$1"*) ;; *) echo "expected \"$1\" in: $2" >&2; exit 1 ;; esac
}

has 0.5.1 "$(ctl schema-version)"
ctl create-queue mails
ctl create-queue parts --storage-mode partitioned
has mails "$(ctl list-queues)"
ctl queue-policy mails --cleanup-ttl '7 days' --cleanup-limit 3 >/dev/null
has '7 days' "$(ctl queue-policy mails)"

ctl spawn-task -q mails greet -P user.name=Alice -P count:=42 --max-attempts 1 -H h=1 >/dev/null
task=$(sql "select task_id from absurd.t_mails")
has '"count": 42' "$(sql "select params from absurd.t_mails")"
has "$task" "$(ctl list-tasks -q mails --status pending)"
run=$(sql "select run_id from absurd.claim_task('mails', 'w')")
sql "select absurd.set_task_checkpoint_state('mails', '$task', 'step-1', '\"saved\"', '$run')"
sql "select absurd.fail_run('mails', '$run', '{\"name\": \"Oops\", \"message\": \"it broke\"}')"
has 'it broke' "$(ctl dump-task --task-id="$task")"
has 'step-1' "$(ctl dump-task --run-id="$run")"
ctl retry-task -q mails "$task" --max-attempts 5 >/dev/null
[ "$(sql "select max_attempts from absurd.t_mails")" = 5 ]
run=$(sql "select run_id from absurd.claim_task('mails', 'w')")
sql "select absurd.await_event('mails', '$task', '$run', 's', 'go')"
ctl emit-event -q mails go -P by=me >/dev/null
has '"by": "me"' "$(sql "select payload from absurd.e_mails")"
ctl cancel-task -q mails "$task" >/dev/null
has "$task" "$(ctl list-tasks -q mails -s cancelled)"
sql "update absurd.t_mails set cancelled_at = now() - interval '40 days'"
ctl cleanup --dry-run -v mails 30 >/dev/null
[ "$(sql "select count(*) from absurd.t_mails")" = 1 ]
ctl cleanup mails 30 >/dev/null
[ "$(sql "select count(*) from absurd.t_mails")" = 0 ]

sql "select set_config('absurd.fake_now', '2020-01-01', false); select absurd.ensure_partitions('parts')" >/dev/null
ctl queue-policy parts --detach-mode empty >/dev/null
first=$(ctl list-detach-candidates --queue parts | grep -o 't_parts_[0-9]*' | head -1)
ctl detach-candidate --queue parts "$first" --drop >/dev/null
[ -z "$(sql "select to_regclass('absurd.$first')")" ]
if ctl cron --enable 2>/tmp/absurdctl.$$; then echo "cron is not installed" >&2; exit 1; fi
rm -f /tmp/absurdctl.$$

ctl drop-queue mails --yes >/dev/null
ctl drop-queue parts --yes >/dev/null
case "$(ctl list-queues)" in *mails*) exit 1 ;; esac
echo ok
