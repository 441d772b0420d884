//! The RPCs about claimed runs. Each item has its own outcome, in the order of the request.

use std::collections::HashMap;

use absurd_proto::v1 as pb;
use tokio::time::Instant;
use uuid::Uuid;

use super::convert::{pb_verdict, run_ref, scope, timestamp};
use super::service::Service;
use crate::dispatch::verdict;
use crate::domain::{Error, Settled, Verdict};
use crate::scope::Scope;
use crate::store::batch::{RunRef, Write};

impl Service {
    pub(super) async fn settle_one(
        &self,
        queue: &str,
        run: Result<RunRef, Error>,
        write: Result<Write, Error>,
        deadline: Instant,
    ) -> Result<Settled, Error> {
        let scope = scope(queue)?;
        self.engine.settle(&scope, run?, write?, deadline).await
    }

    /// Items of different runs join shared batches. Several items of one run are written in order, those of one claim
    /// in one transaction. Each item is checked against its own token, because a former holder of the run may send
    /// items as well.
    pub(super) async fn settle_many(
        &self,
        scope: &Scope,
        items: Vec<Result<(RunRef, Write), Error>>,
        deadline: Instant,
    ) -> Vec<Result<Settled, Error>> {
        let mut outcomes: Vec<Option<Result<Settled, Error>>> = items.iter().map(|_| None).collect();
        let mut by_run: HashMap<Uuid, Vec<(usize, RunRef, Write)>> = HashMap::new();
        for (index, item) in items.into_iter().enumerate() {
            match item {
                Ok((run, write)) => by_run.entry(run.run_id).or_default().push((index, run, write)),
                Err(error) => outcomes[index] = Some(Err(error)),
            }
        }
        let work = by_run.into_values().map(|group| self.settle_run(scope, group, deadline));
        for (index, outcome) in futures_util::future::join_all(work).await.into_iter().flatten() {
            outcomes[index] = Some(outcome);
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or(Err(Error::ItemSkipped))).collect()
    }

    /// Writes the items of one run, claim by claim.
    async fn settle_run(
        &self,
        scope: &Scope,
        items: Vec<(usize, RunRef, Write)>,
        deadline: Instant,
    ) -> Vec<(usize, Result<Settled, Error>)> {
        let mut answered = Vec::with_capacity(items.len());
        for claim in items.chunk_by(|(_, one, _), (_, next, _)| one.digest == next.digest) {
            let (_, run, write) = &claim[0];
            let outcomes = if let [_] = claim {
                vec![self.engine.settle(scope, run.clone(), write.clone(), deadline).await]
            } else {
                let writes = claim.iter().map(|(_, _, write)| write.clone()).collect();
                self.engine.settle_in_order(scope, run.clone(), writes, deadline).await
            };
            answered.extend(claim.iter().map(|(index, _, _)| *index).zip(outcomes));
        }
        answered
    }

    /// Writes about each claim, and returns the verdicts; `done` is the verdict of a successful write.
    pub(super) async fn verdicts(
        &self,
        scope: &Scope,
        claims: Vec<pb::ClaimRef>,
        write: impl Fn(Option<&crate::domain::ClaimToken>) -> Result<Write, Error>,
        done: Verdict,
        deadline: Instant,
    ) -> Result<Vec<pb::ClaimVerdict>, Error> {
        self.limits.batch("claims", claims.len())?;
        let mut items = Vec::with_capacity(claims.len());
        for claim in &claims {
            let item = match run_ref(&claim.run_id, claim.claim_token.as_deref(), &self.limits) {
                Ok((run, token)) => Ok((run, write(token.as_ref())?)),
                Err(error) => Err(error),
            };
            items.push(item);
        }
        let outcomes = self.settle_many(scope, items, deadline).await;
        Ok(claims
            .into_iter()
            .zip(outcomes)
            .map(|(claim, outcome)| pb::ClaimVerdict {
                claim_token: claim.claim_token.unwrap_or_default(),
                verdict: pb_verdict(outcome.as_ref().map_or_else(verdict, |_| done)),
                claim_expires_at: outcome.ok().and_then(|settled| settled.claim_expires_at).and_then(timestamp),
            })
            .collect())
    }
}
