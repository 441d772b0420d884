//! The clock of a server that was started with `--test-clock`.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use absurd_proto::v1::test_clock_service_client::TestClockServiceClient;
use tonic::Code;
use tonic::transport::Channel;

use crate::{ConnectOptions, Error, Reason, wire};

/// Sets the time of a test server: `absurd dev --test-clock`, `absurd serve --test-clock`. Sleeps, timeouts, retries,
/// leases and cancellation rules fall due by it. When a call returns, everything due is done: expired leases have
/// ended, and runs that wake are offered to workers.
///
/// ```no_run
/// # async fn test() -> Result<(), absurd_client::Error> {
/// use absurd_client::{ConnectOptions, durable::testing::TestClock};
/// use std::time::Duration;
///
/// let clock = TestClock::connect(&ConnectOptions::from_env())?;
/// // ... a task sleeps for a day
/// clock.advance(Duration::from_secs(86_400)).await?;
/// // ... and is awake.
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct TestClock {
    grpc: TestClockServiceClient<Channel>,
}

impl TestClock {
    /// The clock of a server; it connects on first use.
    pub fn connect(options: &ConnectOptions) -> Result<Self, Error> {
        Ok(Self { grpc: TestClockServiceClient::new(options.channel()?) })
    }

    /// Reads the server's time.
    pub async fn now(&self) -> Result<SystemTime, Error> {
        let answer = self.grpc.clone().get_time(pb::GetTimeRequest {}).await.map_err(explained)?;
        wire::time(answer.into_inner().time).ok_or_else(wire::unclear)
    }

    /// Sets the time, between the years 2000 and 2999. It stands still from then on.
    pub async fn set(&self, time: SystemTime) -> Result<SystemTime, Error> {
        self.set_to(Some(time.into())).await
    }

    /// Advances the time. It stands still from then on.
    pub async fn advance(&self, by: Duration) -> Result<SystemTime, Error> {
        self.set(self.now().await? + by).await
    }

    /// Lets the time follow the real time again.
    pub async fn unset(&self) -> Result<SystemTime, Error> {
        self.set_to(None).await
    }

    async fn set_to(&self, time: Option<prost_types::Timestamp>) -> Result<SystemTime, Error> {
        let answer = self.grpc.clone().set_time(pb::SetTimeRequest { time }).await.map_err(explained)?;
        wire::time(answer.into_inner().time).ok_or_else(wire::unclear)
    }
}

fn explained(status: tonic::Status) -> Error {
    if status.code() == Code::Unimplemented {
        let problem = "this server has no test clock; start it with --test-clock";
        return Error::new(Reason::Other, Code::Unimplemented, problem);
    }
    Error::from(status)
}
