//! Refusals that the transport makes before the service sees a request get an error with a reason, like all other
//! errors.

use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::status::status;
use crate::domain::Error;

/// Characters of the method's path that the error repeats.
const PATH_MAX: usize = 200;

/// Adds [`Refusal`] to a service.
#[derive(Debug, Clone, Copy)]
pub struct RefusalLayer {
    /// Maximum size of a request in bytes.
    pub request_bytes_max: usize,
}

impl<S> Layer<S> for RefusalLayer {
    type Service = Refusal<S>;

    fn layer(&self, inner: S) -> Refusal<S> {
        Refusal { inner, request_bytes_max: self.request_bytes_max }
    }
}

/// A service whose transport errors have reasons.
#[derive(Debug, Clone)]
pub struct Refusal<S> {
    inner: S,
    request_bytes_max: usize,
}

impl<S> Service<Request<Body>> for Refusal<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let uri = request.uri().clone();
        let answer = self.inner.call(request);
        let most = self.request_bytes_max;
        Box::pin(async move { answer.await.map(|response| reasoned(&response, uri.path(), most).unwrap_or(response)) })
    }
}

/// The replacement for an answer that the transport made by itself; `None` keeps the answer.
fn reasoned(response: &Response<Body>, path: &str, most: usize) -> Option<Response<Body>> {
    let given = Status::from_header_map(response.headers()).filter(|given| given.details().is_empty())?;
    let error = match given.code() {
        // The statuses of tonic for a message over the limit (before and after unpacking), and for one that is not
        // protobuf.
        Code::ResourceExhausted => Error::TooLarge { field: "request".into(), size: most + 1, limit: most },
        Code::OutOfRange => Error::TooLarge {
            field: "request".into(),
            size: given.message().split(' ').find_map(|word| word.parse().ok()).unwrap_or(most + 1),
            limit: most,
        },
        Code::Internal => Error::invalid("request", format!("is not a message of this RPC: {}", given.message())),
        Code::Unimplemented if given.message().is_empty() => {
            let path: String = path.chars().take(PATH_MAX).collect();
            let message = format!("this server has no method {path}; reflection lists what it has");
            return Some(Status::unimplemented(message).into_http());
        }
        _ => return None,
    };
    Some(status(&error).into_http())
}
