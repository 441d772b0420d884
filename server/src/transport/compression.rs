//! Compression of answers: only a client that compresses its request gets a compressed answer. Most clients accept
//! gzip, but within one network compression costs far more processor time than it saves.

use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

/// Header with the encoding of a request.
const ENCODING: &str = "grpc-encoding";
/// Header with the encodings that the caller accepts.
const ACCEPTED: &str = "grpc-accept-encoding";

/// Adds [`Compression`] to a service.
#[derive(Debug, Clone, Copy)]
pub struct CompressionLayer;

impl<S> Layer<S> for CompressionLayer {
    type Service = Compression<S>;

    fn layer(&self, inner: S) -> Compression<S> {
        Compression { inner }
    }
}

/// A service that sees accepted encodings only of callers that compress their requests.
#[derive(Debug, Clone)]
pub struct Compression<S> {
    inner: S,
}

impl<S: Service<Request<Body>, Response = Response<Body>>> Service<Request<Body>> for Compression<S> {
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> S::Future {
        if !is_compressed(request.headers()) {
            request.headers_mut().remove(ACCEPTED);
        }
        self.inner.call(request)
    }
}

fn is_compressed(headers: &HeaderMap) -> bool {
    headers.get(ENCODING).is_some_and(|encoding| encoding != "identity")
}
