//! A span around each call of the CRI, below which everything that it causes is logged: its method, and the pod and container
//! that it turns out to be about.
//!
//! Called by `server` around every service. Costs nothing where nobody listens; nothing can fail.

use std::task::{Context, Poll};

use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};
use tracing::Instrument;
use tracing::field::Empty;
use tracing::instrument::Instrumented;

/// The layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct SpanLayer;

impl<S> Layer<S> for SpanLayer {
    type Service = Spans<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Spans { inner }
    }
}

/// A service whose calls have spans.
#[derive(Debug, Clone)]
pub struct Spans<S> {
    inner: S,
}

impl<S, B, A> Service<Request<B>> for Spans<S>
where
    S: Service<Request<B>, Response = Response<A>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        // Of the highest level, so that it is there for every line that is.
        let span = tracing::error_span!("call", method, pod = Empty, container = Empty);
        let answer = span.in_scope(|| self.inner.call(request));
        answer.instrument(span)
    }
}
