//! `TestClockService`: lets a test set the time of a server with `--test-clock`.

use std::sync::Arc;

use absurd_proto::v1 as pb;
use absurd_proto::v1::test_clock_service_server::TestClockService;
use tonic::{Request, Response, Status};

use super::convert::{self, timestamp};
use super::status::status;
use crate::domain::{Error, Instant};
use crate::engine::Engine;
use crate::maintenance;
use crate::store::Fault;

/// 2000-01-01 to 3000-01-01 in seconds since 1970; version 7 UUIDs and the storage's times hold this range with room to
/// spare.
const YEARS: std::ops::Range<i64> = 946_684_800..32_503_680_000;

/// The implementation of the service.
#[derive(Debug)]
pub struct TestClock {
    engine: Arc<Engine>,
}

impl TestClock {
    /// Sets the test clock of this engine's store.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    async fn read(&self) -> Result<Instant, Error> {
        self.engine.store.clock().await.map_err(Fault::into_database_read_error)
    }

    async fn set(&self, request: pb::SetTimeRequest) -> Result<Instant, Error> {
        let time = request.time.map(|time| parse(&time)).transpose()?;
        self.engine.store.set_test_time(time);
        let now = self.read().await?;
        self.engine.dispatcher.note_unheard();
        maintenance::catch_up(&self.engine).await;
        Ok(now)
    }
}

fn parse(time: &prost_types::Timestamp) -> Result<Instant, Error> {
    if !YEARS.contains(&time.seconds) {
        return Err(Error::invalid("time", "must be between the years 2000 and 2999"));
    }
    convert::instant("time", time)
}

#[tonic::async_trait]
impl TestClockService for TestClock {
    async fn get_time(&self, _: Request<pb::GetTimeRequest>) -> Result<Response<pb::GetTimeResponse>, Status> {
        let now = self.read().await.map_err(|error| status(&error))?;
        let is_set = self.engine.store.test_time().is_some();
        Ok(Response::new(pb::GetTimeResponse { time: timestamp(now), is_set }))
    }

    async fn set_time(&self, request: Request<pb::SetTimeRequest>) -> Result<Response<pb::SetTimeResponse>, Status> {
        let now = self.set(request.into_inner()).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::SetTimeResponse { time: timestamp(now) }))
    }
}
