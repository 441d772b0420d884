//! Named statements, one file each. Placeholders `{t} {r} {c} {e} {w} {i}` stand for a queue's tables: tasks, runs,
//! checkpoints, events, waits, idempotency keys.

use super::pool::Role;

/// Statements of [`Role::Lease`].
const LEASE: &[&str] = &[
    "queue_access",
    "replica_leave",
    "run_check",
    "run_cut_lease",
    "run_extend",
    "run_list_expired",
    "run_silent",
    "task_list_cancellable",
    "tick",
];
/// Statements of [`Role::Upkeep`], which may take long.
const UPKEEP: &[&str] = &[
    "doctor_access",
    "doctor_database",
    "doctor_indexes",
    "doctor_queue",
    "doctor_registry",
    "doctor_upkeep",
    "event_cleanup",
    "quarantine_forget",
    "queue_drop",
    "queue_stats",
    "release_forget",
    "snapshot_age",
    "task_cleanup",
    "upkeep_note",
    "upkeep_run",
    "upkeep_take",
];
/// Statements of [`Role::Read`], which only read.
const READ: &[&str] = &[
    "checkpoint_get",
    "checkpoint_page",
    "event_list_unfinished",
    "quarantine_count",
    "quarantine_list",
    "queue_backlog",
    "queue_collision",
    "queue_get",
    "queue_list",
    "queue_policy",
    "run_find",
    "run_get",
    "run_list",
    "task_find",
    "task_get",
    "task_list",
    "task_list_awaited",
    "task_list_awaited_queues",
    "task_list_edge",
    "task_result",
    "task_search",
    "wait_list_event",
    "wait_list_task",
    "workflow_get",
    "workflow_get_part",
    "workflow_list",
];

/// Treatment of rows that another transaction has locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wait {
    /// Leave them out (`skip locked`).
    Skip,
    /// Wait for them, as long as `lock_timeout` allows.
    Block,
}

/// A statement template, not yet rendered for a queue.
#[derive(Debug, Clone, Copy)]
pub struct Statement {
    /// Name of its file, without `.sql`.
    pub name: &'static str,
    template: &'static str,
    /// Whether the text depends on the queue.
    pub(super) per_queue: bool,
}

/// Whether a template contains a placeholder for a table of a queue.
const fn names_tables(template: &str) -> bool {
    let text = template.as_bytes();
    let mut at = 2;
    while at < text.len() {
        if text[at - 2] == b'{' && text[at] == b'}' && matches!(text[at - 1], b't' | b'r' | b'c' | b'e' | b'w' | b'i') {
            return true;
        }
        at += 1;
    }
    false
}

impl Statement {
    /// Role of the statement; [`Role::Work`] unless it is listed for another one.
    pub fn role(&self) -> Role {
        let named = |names: &[&str]| names.contains(&self.name);
        if named(LEASE) {
            Role::Lease
        } else if named(UPKEEP) {
            Role::Upkeep
        } else if named(READ) {
            Role::Read
        } else {
            Role::Work
        }
    }

    /// Whether the statement uses the table of idempotency keys, which only partitioned queues have.
    pub fn is_for_partitioned(&self) -> bool {
        self.template.contains("{i}")
    }

    /// Renders the text for a queue.
    pub fn render(&self, queue: &str, wait: Wait) -> String {
        let mut text = format!("-- {}\n{}", self.name, self.template);
        for kind in ["t", "r", "c", "e", "w", "i"] {
            let mark = format!("{{{kind}}}");
            if text.contains(&mark) {
                text = text.replace(&mark, &table(kind, queue));
            }
        }
        text.replace(
            "{wait}",
            match wait {
                Wait::Skip => "skip locked",
                Wait::Block => "",
            },
        )
    }
}

/// A queue's table as a quoted identifier. Apart from `migrate`, this is the only place where a queue name becomes SQL
/// text.
fn table(kind: &str, queue: &str) -> String {
    format!("absurd.\"{kind}_{}\"", queue.replace('"', "\"\""))
}

macro_rules! statements {
    ($($constant:ident = $name:literal;)*) => {
        $(
            #[doc = concat!("`sql/queries/", $name, ".sql`")]
            pub const $constant: Statement = Statement {
                name: $name,
                template: include_str!(concat!("../../sql/queries/", $name, ".sql")),
                per_queue: names_tables(include_str!(concat!("../../sql/queries/", $name, ".sql"))),
            };
        )*
        /// All named statements.
        pub const ALL: &[Statement] = &[$($constant),*];
    };
}

statements! {
    CHECKPOINT_GET = "checkpoint_get";
    CHECKPOINT_LIST = "checkpoint_list";
    CHECKPOINT_PAGE = "checkpoint_page";
    CHECKPOINT_PUT = "checkpoint_put";
    CLOCK_GET = "clock_get";
    CLOCK_SET = "clock_set";
    CREDIT_NOTIFY = "credit_notify";
    DOORBELL_ARM = "doorbell_arm";
    DOORBELL_DISARM = "doorbell_disarm";
    DOORBELL_MISSING = "doorbell_missing";
    DOORBELL_RING = "doorbell_ring";
    DOCTOR_ACCESS = "doctor_access";
    DOCTOR_DATABASE = "doctor_database";
    DOCTOR_INDEXES = "doctor_indexes";
    DOCTOR_QUEUE = "doctor_queue";
    DOCTOR_REGISTRY = "doctor_registry";
    DOCTOR_UPKEEP = "doctor_upkeep";
    EVENT_AWAIT = "event_await";
    EVENT_CLEANUP = "event_cleanup";
    EVENT_EMIT = "event_emit";
    EVENT_EMIT_MORE = "event_emit_more";
    EVENT_LIST_UNFINISHED = "event_list_unfinished";
    KEY_RESERVE = "key_reserve";
    QUARANTINE_COUNT = "quarantine_count";
    QUARANTINE_FORGET = "quarantine_forget";
    QUARANTINE_LIST = "quarantine_list";
    QUARANTINE_PUT = "quarantine_put";
    QUEUE_ACCESS = "queue_access";
    QUEUE_BACKLOG = "queue_backlog";
    QUEUE_COLLISION = "queue_collision";
    QUEUE_CREATE = "queue_create";
    QUEUE_DOORBELL = "queue_doorbell";
    QUEUE_DROP = "queue_drop";
    QUEUE_GET = "queue_get";
    QUEUE_LIST = "queue_list";
    QUEUE_LOCK = "queue_lock";
    QUEUE_POLICY = "queue_policy";
    QUEUE_SET_POLICY = "queue_set_policy";
    QUEUE_STATS = "queue_stats";
    RELEASE_COUNT = "release_count";
    RELEASE_FORGET = "release_forget";
    REPLICA_LEAVE = "replica_leave";
    RUN_CHECK = "run_check";
    RUN_SILENT = "run_silent";
    RUN_CLAIM = "run_claim";
    RUN_CLAIM_NAMED = "run_claim_named";
    RUN_CLAIM_NEXT = "run_claim_next";
    RUN_CLAIM_TRY = "run_claim_try";
    RUN_COMPLETE = "run_complete";
    RUN_CUT_LEASE = "run_cut_lease";
    RUN_EXTEND = "run_extend";
    RUN_FAIL = "run_fail";
    RUN_FIND = "run_find";
    RUN_GET = "run_get";
    RUN_LIST = "run_list";
    RUN_LIST_CLAIMED = "run_list_claimed";
    RUN_LIST_EXPIRED = "run_list_expired";
    RUN_LOCK = "run_lock";
    RUN_RELEASE = "run_release";
    RUN_SCHEDULE = "run_schedule";
    RUN_SET_SLEEPING = "run_set_sleeping";
    RUN_SLEEP = "run_sleep";
    SCHEMA_GET = "schema_get";
    SNAPSHOT_AGE = "snapshot_age";
    TASK_AWAIT = "task_await";
    TASK_CANCEL = "task_cancel";
    TASK_CANCELLED = "task_cancelled";
    TASK_CLEANUP = "task_cleanup";
    TASK_ENDED = "task_ended";
    TASK_FIND = "task_find";
    TASK_FIND_KEYED = "task_find_keyed";
    TASK_GET = "task_get";
    TASK_LIST = "task_list";
    TASK_LIST_AWAITED = "task_list_awaited";
    TASK_LIST_AWAITED_QUEUES = "task_list_awaited_queues";
    TASK_LIST_CANCELLABLE = "task_list_cancellable";
    TASK_LIST_EDGE = "task_list_edge";
    TASK_RESPAWN = "task_respawn";
    TASK_RESULT = "task_result";
    TASK_RETRY = "task_retry";
    TASK_SETTLE_AWAITED = "task_settle_awaited";
    TASK_SEARCH = "task_search";
    TASK_SPAWN = "task_spawn";
    TASK_SPAWN_CLAIMED = "task_spawn_claimed";
    TASK_SPAWN_LATER = "task_spawn_later";
    TICK = "tick";
    UPKEEP_NOTE = "upkeep_note";
    UPKEEP_RUN = "upkeep_run";
    UPKEEP_TAKE = "upkeep_take";
    WAIT_LIST_EVENT = "wait_list_event";
    WAIT_LIST_TASK = "wait_list_task";
    WORKFLOW_CREATE = "workflow_create";
    WORKFLOW_GET = "workflow_get";
    WORKFLOW_GET_PART = "workflow_get_part";
    WORKFLOW_LIST = "workflow_list";
    WORKFLOW_UPDATE = "workflow_update";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_a_statement() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/sql/queries");
        let mut files: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap().replace(".sql", ""))
            .collect();
        files.sort();
        let mut names: Vec<&str> = ALL.iter().map(|statement| statement.name).collect();
        names.sort_unstable();
        assert_eq!(files, names);
    }

    #[test]
    fn a_queue_name_is_quoted() {
        let text = RUN_LOCK.render("it's \"odd\"", Wait::Block);
        assert!(text.contains("absurd.\"r_it's \"\"odd\"\"\""), "{text}");
        assert!(!text.contains('{'), "{text}");
    }
}
