//! `AbsurdClient`: access to one queue of the service, and the rules by which calls are repeated. The modules beside
//! this one hold the calls, by topic.

use std::future::Future;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::backoff::Backoff;
use crate::connect::ConnectOptions;
use crate::registry::Registry;
use crate::replicas::Replicas;
use crate::settle::Settler;
use crate::{Error, Reason};

/// Makes one call of the service. A failure that may pass is followed by another try, until the client's deadline.
macro_rules! rpc {
    ($client:ident.$method:ident($request:ident)) => {
        $client
            .call($request, $client.limit(), |mut grpc: $crate::client::Grpc, request| async move {
                grpc.$method(request).await
            })
            .await
    };
}
pub(crate) use rpc;

/// The generated client of one replica.
pub(crate) type Grpc = AbsurdServiceClient<Channel>;

/// Queue of [`AbsurdClient::connect`] when `ABSURD_DEFAULT_QUEUE` is not set.
pub const DEFAULT_QUEUE: &str = "default";
/// Longest queue name that [`AbsurdClient::new`] accepts, in bytes.
const IDENTIFIER_BYTES_MAX: usize = 57;

/// Access to one queue of the service. Cheap to clone; all clones share one connection per replica.
///
/// Each call takes effect by itself; no transaction spans two calls. Calls that are safe to repeat are repeated until
/// the deadline. Calls about a run that was claimed through this client show the claim token automatically.
#[derive(Debug, Clone)]
pub struct AbsurdClient {
    queue: Arc<str>,
    worker_id: Arc<str>,
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) replicas: Replicas,
    pub(crate) settler: Settler,
    pub(crate) registry: Registry,
    pub(crate) next_stream: AtomicU64,
    deadline: Duration,
}

impl AbsurdClient {
    /// Constructor of the original client, for the service at `ABSURD_URL`. The client connects on first use, and needs
    /// the Tokio runtime in which it was made.
    ///
    /// The queue is `queue_name`, else `ABSURD_DEFAULT_QUEUE`, else `absurd_default`. The worker id is `worker_id`,
    /// else `ABSURD_WORKER_ID`, else `absurd_worker_1`. An empty argument counts as none; an empty variable is used as
    /// it is.
    ///
    /// The queue name must be an ASCII letter or an underscore, followed by letters, digits and underscores, 57 bytes
    /// at most; otherwise the error is [`Reason::InvalidArgument`]. [`AbsurdClient::connect`] and
    /// [`AbsurdClient::with_queue`] accept every name that the storage contract allows.
    pub fn new(queue_name: Option<&str>, worker_id: Option<&str>) -> Result<Self, Error> {
        let queue = choose(queue_name, std::env::var("ABSURD_DEFAULT_QUEUE").ok(), "absurd_default");
        check_identifier("queue_name", &queue)?;
        let worker_id = choose(worker_id, std::env::var("ABSURD_WORKER_ID").ok(), "absurd_worker_1");
        Ok(Self::connect(&ConnectOptions::from_env())?.with_queue(queue).with_worker_id(worker_id))
    }

    /// A client with its own options. It connects on first use, and needs the Tokio runtime in which it was made;
    /// outside of one this is an error. The queue is `ABSURD_DEFAULT_QUEUE`, else `default`, the queue of Absurd's
    /// SDKs. The worker id is `ABSURD_WORKER_ID`, else `HOST:PID` of this process. An empty variable counts as none.
    pub fn connect(options: &ConnectOptions) -> Result<Self, Error> {
        if tokio::runtime::Handle::try_current().is_err() {
            let problem = "an AbsurdClient is made inside a Tokio runtime; absurd_client::blocking needs none";
            return Err(Error::new(Reason::Other, Code::FailedPrecondition, problem));
        }
        let replicas = options.replicas()?;
        let from_env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let queue = from_env("ABSURD_DEFAULT_QUEUE").unwrap_or_else(|| DEFAULT_QUEUE.into());
        let worker_id = from_env("ABSURD_WORKER_ID")
            .unwrap_or_else(|| format!("{}:{}", gethostname::gethostname().to_string_lossy(), std::process::id()));
        Ok(Self {
            queue: queue.into(),
            worker_id: worker_id.into(),
            shared: Arc::new(Shared {
                settler: Settler::new(replicas.clone()),
                replicas,
                registry: Registry::default(),
                next_stream: AtomicU64::new(1),
                deadline: options.deadline,
            }),
        })
    }

    /// The same client on another queue.
    #[must_use]
    pub fn with_queue(&self, queue: impl Into<Arc<str>>) -> Self {
        Self { queue: queue.into(), ..self.clone() }
    }

    /// The same client with another worker id.
    #[must_use]
    pub fn with_worker_id(&self, worker_id: impl Into<Arc<str>>) -> Self {
        Self { worker_id: worker_id.into(), ..self.clone() }
    }

    /// Name of the queue that the calls are about.
    pub fn queue_name(&self) -> &str {
        &self.queue
    }

    /// Worker id that claims of this client carry.
    pub fn worker_id(&self) -> &str {
        &self.worker_id
    }

    pub(crate) fn queue(&self) -> String {
        self.queue.as_ref().to_owned()
    }

    /// Longest duration of a call, repetitions included.
    pub(crate) fn limit(&self) -> Duration {
        self.shared.deadline
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.shared.deadline
    }

    /// Repeats a call until it is answered for good or the deadline passes. The budget limits repetitions, so that an
    /// outage does not multiply the calls.
    pub(crate) async fn call<Q, R, F>(
        &self,
        request: Q,
        limit: Duration,
        send: impl Fn(Grpc, Request<Q>) -> F,
    ) -> Result<R, Error>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = Instant::now() + limit;
        let budget = self.shared.replicas.budget();
        let (mut backoff, mut turn) = (Backoff::call(), None);
        loop {
            let mut attempt = Request::new(request.clone());
            let left = deadline.saturating_duration_since(Instant::now());
            attempt.set_timeout(left.max(Duration::from_millis(1)));
            let asked = self.shared.replicas.ask();
            let error = match send(asked.grpc(), attempt).await {
                Ok(response) => {
                    asked.worked();
                    budget.worked(turn);
                    return Ok(response.into_inner());
                }
                Err(status) => Error::from(status),
            };
            let another = asked.failed(&error);
            drop(asked);
            if another {
                continue;
            }
            if !error.is_passing() {
                if error.reason() != Reason::DeadlineExceeded {
                    budget.worked(turn);
                }
                return Err(error);
            }
            // Ends this call's probe before its pause, so that another call can probe meanwhile.
            drop(turn.take());
            let wait = backoff.after(&error);
            if Instant::now() + wait >= deadline {
                return Err(error);
            }
            let again = async {
                tokio::time::sleep(wait).await;
                budget.repeat().await
            };
            match tokio::time::timeout_at(deadline, again).await {
                Ok(next) => turn = Some(next),
                Err(_) => return Err(error),
            }
        }
    }
}

/// The client shared by this process. The first call makes it, in the Tokio runtime of that call; later calls ignore
/// their arguments.
pub fn get_absurd_client(queue_name: Option<&str>, worker_id: Option<&str>) -> Result<&'static AbsurdClient, Error> {
    static SHARED: OnceLock<AbsurdClient> = OnceLock::new();
    if let Some(client) = SHARED.get() {
        return Ok(client);
    }
    let client = AbsurdClient::new(queue_name, worker_id)?;
    Ok(SHARED.get_or_init(|| client))
}

/// The argument unless it is empty, else the variable even if empty, else the default.
fn choose(argument: Option<&str>, variable: Option<String>, default: &str) -> String {
    let argument = argument.filter(|argument| !argument.is_empty()).map(str::to_owned);
    argument.or(variable).unwrap_or_else(|| default.to_owned())
}

/// The original client's rule for queue names, which is stricter than the storage contract's.
fn check_identifier(field: &str, name: &str) -> Result<(), Error> {
    let mut bytes = name.bytes();
    let begins = bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_');
    if !begins || !bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        let rule = "must be a letter or an underscore, then letters, digits, underscores";
        return Err(Error::argument(field, format!("{name:?} {rule}")));
    }
    if name.len() > IDENTIFIER_BYTES_MAX {
        return Err(Error::argument(field, format!("{name:?} must have at most {IDENTIFIER_BYTES_MAX} bytes")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_original_rule_for_names() {
        for name in ["q", "_", "My_Queue_2", &"x".repeat(57)] {
            check_identifier("queue_name", name).expect(name);
        }
        for name in ["", "2nd", "a-b", "a b", "q\n", "\u{e9}", "a'b", &"x".repeat(58)] {
            let error = check_identifier("queue_name", name).expect_err(name);
            assert_eq!((error.reason(), error.field()), (Reason::InvalidArgument, Some("queue_name")));
            assert!(error.message().contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn an_argument_comes_before_the_variable_and_that_before_the_default() {
        let variable = || Some("from_env".to_owned());
        assert_eq!(choose(Some("mine"), variable(), "default"), "mine");
        assert_eq!(choose(Some(""), variable(), "default"), "from_env");
        assert_eq!(choose(None, None, "default"), "default");
        assert_eq!(choose(None, Some(String::new()), "default"), "", "taken as it is");
    }

    #[tokio::test]
    async fn the_process_shares_the_client_of_the_first_call() {
        let first = get_absurd_client(Some("shared_queue"), Some("me")).expect("a client");
        let second = get_absurd_client(Some("another"), None).expect("a client");
        assert!(std::ptr::eq(first, second));
        assert_eq!((second.queue_name(), second.worker_id()), ("shared_queue", "me"));
    }

    #[test]
    fn without_a_runtime_there_is_an_error_and_no_panic() {
        let error = AbsurdClient::connect(&ConnectOptions::default()).expect_err("no runtime");
        assert!(error.message().contains("blocking"), "{error}");
    }
}
