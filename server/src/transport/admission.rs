//! Admission of calls: a call beyond a bound on calls or streams is refused at once, with a reason and a retry delay.
//! Also records a metric of every call but claim streams, and answers a call that panics.

use std::collections::HashSet;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use prost::Message as _;
use tonic::body::Body;
use tonic::transport::server::TlsConnectInfo;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::status::status;
use crate::domain::Error;
use crate::gate::{Answer, Connection, Io};
use crate::metrics;
use crate::tally::{Counted, Tally};

/// Bounds on calls.
#[derive(Debug, Clone, Copy)]
pub struct AdmissionOptions {
    /// Maximum number of calls in flight on this replica, without claim streams.
    pub requests_max: usize,
    /// Maximum number of claim streams on one connection.
    pub connection_streams_max: usize,
    /// Maximum number of claim streams from one IP address.
    pub caller_streams_max: usize,
}

impl Default for AdmissionOptions {
    fn default() -> Self {
        Self { requests_max: 20_000, connection_streams_max: 10_000, caller_streams_max: usize::MAX }
    }
}

const CLAIM_STREAM: &str = "ClaimStream";

/// The method name of a path, as a metric label; `other` for a path that is no RPC of ours.
fn method(path: &str) -> &'static str {
    static KNOWN: OnceLock<HashSet<&'static str>> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let files = prost_types::FileDescriptorSet::decode(absurd_proto::FILE_DESCRIPTOR_SET).unwrap_or_default();
        let services = files.file.into_iter().flat_map(|file| file.service);
        let methods = services.flat_map(|service| service.method);
        methods.filter_map(|method| method.name).map(|name| &*name.leak()).collect()
    });
    path.rsplit('/').next().and_then(|name| known.get(name)).copied().unwrap_or("other")
}

#[derive(Debug)]
struct Shared {
    options: AdmissionOptions,
    requests: Tally,
    streams: Tally,
}

/// Adds admission to a service; all services of a layer share its counts.
#[derive(Debug, Clone)]
pub struct AdmissionLayer {
    shared: Arc<Shared>,
}

impl AdmissionLayer {
    /// A layer with counts of its own, from zero.
    pub fn new(options: AdmissionOptions) -> Self {
        Self { shared: Arc::new(Shared { options, requests: Tally::default(), streams: Tally::default() }) }
    }

    /// Number of calls in flight, including claim streams.
    pub fn calls(&self) -> usize {
        self.shared.requests.now() + self.shared.streams.now()
    }
}

impl<S> Layer<S> for AdmissionLayer {
    type Service = Admission<S>;

    fn layer(&self, inner: S) -> Admission<S> {
        Admission { inner, shared: Arc::clone(&self.shared) }
    }
}

/// A service with admission.
#[derive(Debug, Clone)]
pub struct Admission<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S> Service<Request<Body>> for Admission<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: Send,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let connection = connection(&request);
        if let Some(connection) = &connection {
            connection.asked();
        }
        let call = match Call::begin(&self.shared, connection.clone(), method(request.uri().path())) {
            Ok(call) => call,
            Err(error) => {
                let refusal = status(&error).into_http();
                return Box::pin(async move { Ok(refusal) });
            }
        };
        let request = match connection {
            Some(connection) => request.map(|body| Body::new(Heard { body, connection })),
            None => request,
        };
        // A panic ends only its own call, which gets an internal error.
        let answer = AssertUnwindSafe(self.inner.call(request)).catch_unwind();
        Box::pin(async move {
            let response = match answer.await {
                Ok(answered) => answered?,
                Err(_) => status(&Error::Internal(format!("{} panicked", call.method))).into_http(),
            };
            Ok(call.watch(response))
        })
    }
}

fn connection(request: &Request<Body>) -> Option<Arc<Connection>> {
    let plain = request.extensions().get::<Arc<Connection>>();
    let tls = || request.extensions().get::<TlsConnectInfo<<Io as tonic::transport::server::Connected>::ConnectInfo>>();
    plain.cloned().or_else(|| tls().map(|info| Arc::clone(info.get_ref())))
}

/// A call in flight. Its drop frees its place and records its metric.
#[derive(Debug)]
struct Call {
    /// None until the call has been admitted.
    _counted: Option<Counted>,
    connection: Option<Arc<Connection>>,
    method: &'static str,
    began: Instant,
    code: Code,
}

impl Call {
    fn begin(shared: &Shared, connection: Option<Arc<Connection>>, method: &'static str) -> Result<Self, Error> {
        let code = Code::ResourceExhausted;
        let mut call = Self { _counted: None, connection, method, began: Instant::now(), code };
        if method == CLAIM_STREAM {
            if let Some(connection) = &call.connection {
                count_stream(&shared.options, connection)?;
            }
            call._counted = Some(shared.streams.begin());
        } else {
            let busy = || Error::TooManyRequests { after: std::time::Duration::from_millis(500) };
            call._counted = Some(shared.requests.begin_within(shared.options.requests_max).ok_or_else(busy)?);
        }
        call.code = Code::Cancelled;
        Ok(call)
    }

    fn watch(mut self, response: Response<Body>) -> Response<Body> {
        // Otherwise the code comes in the trailers, unless the caller goes away before.
        if let Some(status) = Status::from_header_map(response.headers()) {
            self.code = status.code();
        }
        let answer = self.connection.as_ref().map(|connection| connection.answer());
        response.map(|body| Body::new(Watched { body, answer, call: self }))
    }
}

/// Counts a claim stream, if its connection and its address may have one more. The drop of the call takes it off again.
fn count_stream(options: &AdmissionOptions, connection: &Connection) -> Result<(), Error> {
    let streams = connection.streams().fetch_add(1, Ordering::Relaxed);
    if streams >= options.connection_streams_max {
        let (whose, flag) = ("this connection has", "--max-streams-per-connection");
        return Err(Error::StreamLimit { whose, limit: streams, flag });
    }
    let most = options.caller_streams_max;
    if most < usize::MAX && connection.gate().streams_of(connection.caller()) > most {
        return Err(Error::StreamLimit { whose: "this address has", limit: most, flag: "--max-streams-per-caller" });
    }
    Ok(())
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.method == CLAIM_STREAM {
            if let Some(connection) = &self.connection {
                connection.streams().fetch_sub(1, Ordering::Relaxed);
            }
        } else {
            metrics::rpc(self.method, name(self.code), self.began.elapsed());
        }
    }
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A request's body; credits its bytes to the connection, as bytes that ask for something.
struct Heard {
    body: Body,
    connection: Arc<Connection>,
}

impl http_body::Body for Heard {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.connection.asked_with(data.len() as u64);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body; records for the gate whether the peer takes it.
struct Watched {
    body: Body,
    answer: Option<(u64, Arc<Answer>)>,
    call: Call,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let (Some((_, answer)), Some(connection)) = (&self.answer, &self.call.connection) {
            answer.asked(connection.gate().now(), polled.is_pending());
        }
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(trailers) = frame.trailers_ref()
            && let Some(status) = Status::from_header_map(trailers)
        {
            self.call.code = status.code();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let (Some((id, _)), Some(connection)) = (&self.answer, &self.call.connection) {
            connection.answered(*id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[tokio::test]
    async fn a_call_that_panics_is_answered() {
        let bug = tower::service_fn(async |request: Request<Body>| {
            assert!(request.uri().path() != "/absurd.v1.AbsurdService/SpawnTask", "a bug");
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let mut service = AdmissionLayer::new(AdmissionOptions { requests_max: 1, ..Default::default() }).layer(bug);
        let ask = |path: &str| Request::builder().uri(path).body(Body::empty()).unwrap();
        for _ in 0..2 {
            let answer = service.call(ask("/absurd.v1.AbsurdService/SpawnTask")).await.unwrap();
            assert_eq!(Status::from_header_map(answer.headers()).unwrap().code(), Code::Internal);
        }
        assert_eq!(service.call(ask("/other")).await.unwrap().headers().len(), 0);
    }
}
