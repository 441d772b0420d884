//! Runs: claims, checks of claims, cuts of leases, and reads.

use std::time::Duration;

use postgres_types::ToSql;
use tokio_postgres::Row;
use uuid::Uuid;

use super::statement::{
    CHECKPOINT_LIST, RELEASE_COUNT, RELEASE_FORGET, RUN_CHECK, RUN_CLAIM, RUN_CLAIM_NAMED, RUN_CLAIM_NEXT,
    RUN_CLAIM_TRY, RUN_CUT_LEASE, RUN_GET, RUN_LIST, RUN_LIST_CLAIMED, RUN_LIST_EXPIRED, RUN_SILENT,
};
use super::text::{ANSWER_BYTES_MAX, FIELD_BYTES_MAX};
use super::{Fault, Store, Wait};
use crate::domain::claim::{Checkpoint, Secret};
use crate::domain::{Claim, ClaimToken, Digest, Error, Instant, RunId, State, TaskId, WorkerId};
use crate::scope::Scope;

/// Runs that are tried one by one after Postgres refused a claim.
const TRIED: i32 = 50;

/// One unit of credit of one stream.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Worker that will hold the run.
    pub worker_id: WorkerId,
    /// Secret of the claim, if one is made.
    pub secret: Secret,
    /// Lease in seconds; 0 never expires.
    pub lease_seconds: u32,
}

impl Slot {
    /// The lease as a statement parameter.
    pub(super) fn lease(&self) -> i32 {
        i32::try_from(self.lease_seconds).unwrap_or(i32::MAX)
    }
}

/// Position of a walk over the runs in claim order, for streams with a filter on task names.
#[derive(Debug, Clone, Copy)]
pub struct Cursor {
    available_at: Instant,
    /// Block and offset of the row (`ctid`).
    place: (u32, u16),
}

impl Cursor {
    /// Start of the walk, before every run.
    pub const HEAD: Self = Self { available_at: Instant::from_micros(0), place: (0, 0) };

    /// Block and offset in the text form of `tid`.
    fn place(self) -> String {
        format!("({},{})", self.place.0, self.place.1)
    }
}

/// Parses the text form of `tid` into block and offset.
fn parse_place(text: &str) -> Option<(u32, u16)> {
    let (page, line) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    Some((page.parse().ok()?, line.parse().ok()?))
}

/// Result of a claim statement.
#[derive(Debug)]
pub struct Claimed {
    /// Claims, each with the index of its slot.
    pub claims: Vec<(usize, Claim)>,
    /// Start of the next walk.
    pub cursor: Cursor,
    /// Whether the walk continues at `cursor`, because it has not reached the end.
    pub more: bool,
    /// Runs that were claimed and whose rows cannot be read, with the error.
    pub unreadable: Vec<(ClaimToken, String)>,
}

impl Claimed {
    /// A result without claims.
    pub const NONE: Self = Self { claims: Vec::new(), cursor: Cursor::HEAD, more: false, unreadable: Vec::new() };

    /// Whether nothing was claimed, readable or not.
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty() && self.unreadable.is_empty()
    }
}

/// Current standing of a claim.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// State of the run; `None` if it does not exist.
    pub state: Option<State>,
    /// Whether the claim still owns the run.
    pub owned: bool,
    /// End of the lease; `None` means never.
    pub claim_expires_at: Option<Instant>,
    /// Whether the run failed with `$ClaimTimeout`, usually because its lease expired.
    pub expired: bool,
}

/// A run as stored.
#[derive(Debug)]
pub struct RunRecord {
    /// Columns of the statement `run_get`, read by name.
    pub row: Row,
}

impl Store {
    /// Claims at most one run per slot, oldest first, except for the runs in `passed_over`. With `names`, claims only
    /// tasks of these names, from `cursor` on.
    pub async fn run_claim(
        &self,
        scope: &Scope,
        slots: &[Slot],
        names: &[String],
        cursor: Cursor,
        passed_over: &[RunId],
    ) -> Result<Claimed, Fault> {
        let rows = self.claim_rows(scope, slots, (names, cursor), passed_over).await?;
        let mut next = Cursor::HEAD;
        let mut more = false;
        if let Some(row) = rows.first().filter(|_| !names.is_empty())
            && let Some(available_at) = row.get::<_, Option<Instant>>("edge_at")
            && let Some(place) = row.get::<_, Option<&str>>("edge_place").and_then(parse_place)
        {
            next = Cursor { available_at, place };
            more = true;
        }
        let mut claimed = Claimed { cursor: next, more, ..Claimed::NONE };
        for row in &rows {
            let Some((index, token)) = token(slots, row) else { continue };
            match claim(token.clone(), row) {
                Ok(claim) => claimed.claims.push((index, claim)),
                Err(error) => claimed.unreadable.push((token, error.to_string())),
            }
        }
        Ok(claimed)
    }

    async fn claim_rows(
        &self,
        scope: &Scope,
        slots: &[Slot],
        (names, cursor): (&[String], Cursor),
        passed_over: &[RunId],
    ) -> Result<Vec<Row>, Fault> {
        let workers: Vec<&str> = slots.iter().map(|slot| slot.worker_id.as_str()).collect();
        let digests: Vec<String> = slots.iter().map(|slot| slot.secret.digest().as_str().to_owned()).collect();
        let leases: Vec<i32> = slots.iter().map(Slot::lease).collect();
        let quantity = i32::try_from(slots.len()).unwrap_or(i32::MAX);
        let place = cursor.place();
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![&workers, &digests, &leases, &quantity];
        let statement = if names.is_empty() {
            &RUN_CLAIM
        } else {
            params.extend([&names as &(dyn ToSql + Sync), &cursor.available_at, &place]);
            &RUN_CLAIM_NAMED
        };
        params.push(&passed_over);
        self.rows(statement, Wait::Skip, Some(scope), &params).await
    }

    /// Finds the runs whose claim Postgres refuses, among the next 50 runs to be claimed, and the errors. Rolls
    /// everything back, so nothing is claimed.
    pub async fn run_refused(
        &self,
        scope: &Scope,
        worker: &WorkerId,
        names: &[String],
        cursor: Cursor,
        passed_over: &[RunId],
    ) -> Result<Vec<(RunId, String)>, Fault> {
        let tx = self.begin(Duration::from_secs(1)).await?;
        let tried = async {
            let params: [&(dyn ToSql + Sync); 4] = [&names, &cursor.available_at, &passed_over, &TRIED];
            let next = tx.rows(&RUN_CLAIM_NEXT, Wait::Skip, Some(scope), &params).await?;
            let mut refused = Vec::new();
            for row in &next {
                let run_id: RunId = row.get("run_id");
                tx.say("savepoint one").await?;
                match tx.rows(&RUN_CLAIM_TRY, Wait::Skip, Some(scope), &[&run_id, &worker.as_str()]).await {
                    Err(fault) if fault.is_refusal() => refused.push((run_id, fault.problem())),
                    tried => drop(tried?),
                }
                tx.say("rollback to one").await?;
            }
            Ok(refused)
        };
        let refused = tried.await;
        tx.rollback().await;
        refused
    }

    /// Adds to each resumed claim the checkpoints that its run may see, up to `budget` bytes per claim. Clears
    /// `checkpoints_complete` if some do not fit.
    pub async fn run_load_checkpoints(
        &self,
        scope: &Scope,
        claims: &mut [(usize, Claim)],
        budget: i64,
    ) -> Result<(), Fault> {
        let resumed: Vec<&Claim> = claims.iter().map(|(_, claim)| claim).filter(|claim| claim.resumed).collect();
        if resumed.is_empty() {
            return Ok(());
        }
        let tasks: Vec<Uuid> = resumed.iter().map(|claim| claim.task_id).collect();
        let runs: Vec<Uuid> = resumed.iter().map(|claim| claim.run_id).collect();
        let attempts: Vec<i32> = resumed.iter().map(|claim| claim.attempt).collect();
        let rows = self.rows(&CHECKPOINT_LIST, Wait::Skip, Some(scope), &[&tasks, &runs, &attempts, &budget]).await?;
        for row in rows {
            let run_id: Uuid = row.get("run_id");
            let Some((_, claim)) = claims.iter_mut().find(|(_, claim)| claim.run_id == run_id) else { continue };
            if row.get::<_, bool>("beyond") {
                claim.checkpoints_complete = false;
                continue;
            }
            claim.checkpoints.push(Checkpoint {
                name: row.get("checkpoint_name"),
                state: row.get("state"),
                owner_run_id: row.get("owner_run_id"),
                updated_at: row.get("updated_at"),
            });
        }
        Ok(())
    }

    /// Finds the runs that a claim statement took although its answer was lost. `since` is at most the start of that
    /// statement.
    pub async fn run_list_claimed(
        &self,
        scope: &Scope,
        slots: &[Slot],
        since: Instant,
    ) -> Result<Vec<(RunId, Digest)>, Fault> {
        let by: Vec<String> =
            slots.iter().map(|slot| format!("{}#{}", slot.worker_id.as_str(), slot.secret.digest().as_str())).collect();
        let rows = self.rows(&RUN_LIST_CLAIMED, Wait::Skip, Some(scope), &[&by, &since]).await?;
        Ok(rows
            .iter()
            .filter_map(|row| {
                let claimed_by: String = row.get("claimed_by");
                let index = by.iter().position(|by| *by == claimed_by)?;
                Some((row.get("run_id"), slots[index].secret.digest()))
            })
            .collect())
    }

    /// Checks claims without locks. Returns one answer per claim, in order.
    pub async fn run_check(&self, scope: &Scope, claims: &[(RunId, Digest)]) -> Result<Vec<Check>, Fault> {
        let runs: Vec<Uuid> = claims.iter().map(|(run, _)| *run).collect();
        let digests: Vec<&str> = claims.iter().map(|(_, digest)| digest.as_str()).collect();
        let rows = self.rows(&RUN_CHECK, Wait::Skip, Some(scope), &[&runs, &digests]).await?;
        Ok(rows
            .iter()
            .map(|row| Check {
                state: row.get::<_, Option<String>>("state").as_deref().and_then(State::from_stored),
                owned: row.get("owned"),
                claim_expires_at: row.get("claim_expires_at"),
                expired: row.get("expired"),
            })
            .collect())
    }

    /// Tells for each claim whether it still holds and its worker has been silent: neither a later end of the lease nor
    /// a checkpoint. The instant is the end of the lease as of the claim.
    pub async fn run_silent(
        &self,
        scope: &Scope,
        claims: &[(ClaimToken, Option<Instant>)],
    ) -> Result<Vec<bool>, Fault> {
        let runs: Vec<Uuid> = claims.iter().map(|(token, _)| token.run_id).collect();
        let digests: Vec<Digest> = claims.iter().map(|(token, _)| token.digest()).collect();
        let digests: Vec<&str> = digests.iter().map(Digest::as_str).collect();
        let expires: Vec<Option<Instant>> = claims.iter().map(|(_, expires_at)| *expires_at).collect();
        let leases: Vec<i32> =
            claims.iter().map(|(token, _)| i32::try_from(token.lease_seconds).unwrap_or(i32::MAX)).collect();
        let rows = self.rows(&RUN_SILENT, Wait::Skip, Some(scope), &[&runs, &digests, &expires, &leases]).await?;
        Ok(rows.iter().map(|row| row.get("silent")).collect())
    }

    /// Shortens leases to `grace_ms` from now, where the end is still the one given. Skips locked runs, and never
    /// extends a lease.
    pub async fn run_cut_lease(
        &self,
        scope: &Scope,
        claims: &[(RunId, Digest, Instant)],
        grace_ms: i32,
    ) -> Result<(), Fault> {
        let runs: Vec<Uuid> = claims.iter().map(|(run, _, _)| *run).collect();
        let digests: Vec<&str> = claims.iter().map(|(_, digest, _)| digest.as_str()).collect();
        let seen: Vec<Instant> = claims.iter().map(|(_, _, seen)| *seen).collect();
        let grace: Vec<i32> = claims.iter().map(|_| grace_ms).collect();
        self.rows(&RUN_CUT_LEASE, Wait::Skip, Some(scope), &[&runs, &digests, &seen, &grace]).await?;
        Ok(())
    }

    /// Runs whose lease has expired, except quarantined ones.
    pub async fn run_list_expired(&self, scope: &Scope, limit: i64) -> Result<Vec<RunId>, Fault> {
        let rows = self.rows(&RUN_LIST_EXPIRED, Wait::Skip, Some(scope), &[&limit, &scope.queue().as_str()]).await?;
        Ok(rows.iter().map(|row| row.get("run_id")).collect())
    }

    /// Counts a release of runs that had been delivered, and returns the new counts.
    pub async fn release_count(&self, scope: &Scope, runs: &[RunId]) -> Result<Vec<(RunId, i32)>, Fault> {
        let rows = self.rows(&RELEASE_COUNT, Wait::Skip, None, &[&scope.queue().as_str(), &runs]).await?;
        Ok(rows.iter().map(|row| (row.get("run_id"), row.get("releases"))).collect())
    }

    /// Deletes release counts that are older than a day.
    pub async fn release_forget(&self) -> Result<(), Fault> {
        self.rows(&RELEASE_FORGET, Wait::Skip, None, &[]).await?;
        Ok(())
    }

    /// A page of a task's runs in order of attempt and run, after `after`. A row marked `beyond` exceeds the byte limit
    /// and belongs to the next page, unless it is alone.
    pub async fn run_list(
        &self,
        scope: &Scope,
        task_id: TaskId,
        after: (i32, RunId),
        limit: i64,
    ) -> Result<Vec<Row>, Error> {
        let params: [&(dyn ToSql + Sync); 6] =
            [&task_id, &after.0, &after.1, &limit, &FIELD_BYTES_MAX, &ANSWER_BYTES_MAX];
        let rows = self.rows(&RUN_LIST, Wait::Skip, Some(scope), &params).await;
        rows.map_err(|fault| fault.into_read_error(scope))
    }

    /// Reads a run. Payloads above [`FIELD_BYTES_MAX`] are left out.
    pub async fn run_get(&self, scope: &Scope, run_id: RunId) -> Result<RunRecord, Error> {
        let rows = self
            .rows(&RUN_GET, Wait::Skip, Some(scope), &[&run_id, &FIELD_BYTES_MAX])
            .await
            .map_err(|fault| fault.into_read_error(scope))?;
        rows.into_iter().next().map(|row| RunRecord { row }).ok_or(Error::RunNotFound(run_id))
    }
}

/// The slot for which a row was claimed, and the token of that claim.
fn token(slots: &[Slot], row: &Row) -> Option<(usize, ClaimToken)> {
    let slot: i64 = row.get::<_, Option<i64>>("slot")?;
    let index = usize::try_from(slot).ok()?.checked_sub(1)?;
    let taken = slots.get(index)?;
    let (was_available_at, first_claim) = (row.get("was_available_at"), row.get("first_claim"));
    let token = ClaimToken::new(row.get("run_id"), taken.secret, taken.lease_seconds, was_available_at, first_claim);
    Some((index, token))
}

/// Reads the rest of a claimed row. Direct SQL writers may have stored values that cannot be read.
fn claim(token: ClaimToken, row: &Row) -> Result<Claim, tokio_postgres::Error> {
    let (attempt, resumed): (i32, bool) = (row.try_get("attempt")?, row.try_get("resumed")?);
    Ok(Claim {
        run_id: token.run_id,
        token,
        task_id: row.try_get("task_id")?,
        attempt,
        task_name: row.try_get("task_name")?,
        params: row.try_get("params")?,
        retry_strategy: row.try_get("retry_strategy")?,
        max_attempts: row.try_get("max_attempts")?,
        headers: row.try_get("headers")?,
        wake_event: row.try_get("wake_event")?,
        event_payload: row.try_get("event_payload")?,
        claim_expires_at: row.try_get("claim_expires_at")?,
        resumed: resumed || attempt > 1,
        checkpoints: Vec::new(),
        checkpoints_complete: true,
        params_omitted: false,
    })
}
