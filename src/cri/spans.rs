//! Spans around each call of the CRI. One for the log, below which everything that the call causes is logged: its method, and the
//! pod and container that it turns out to be about. One for traces, which goes on with the caller's (`traceparent`).
//!
//! Called by `server` around every service. Costs nothing where nobody listens; nothing can fail.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};
use tracing::field::Empty;
use tracing::{Instrument, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::measure::code;
use crate::utils::trace;

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

impl<S, B> Service<Request<B>> for Spans<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let path = request.uri().path().trim_start_matches('/');
        let (service, method) = path.rsplit_once('/').unwrap_or_default();
        // Of the highest level, so that it is there for every line that is.
        let logged = tracing::error_span!("call", method, pod = Empty, container = Empty);
        let traced = logged.in_scope(|| {
            tracing::info_span!(
                target: trace::TARGET, "call", otel.name = path, otel.kind = "server", otel.status_code = Empty,
                rpc.system = "grpc", rpc.service = service, rpc.method = method, rpc.grpc.status_code = Empty
            )
        });
        if !traced.is_disabled() {
            // Fails only where no traces are collected.
            let _ = traced.set_parent(TraceContextPropagator::new().extract(&Headers(request.headers())));
        }
        let answer = logged.in_scope(|| traced.in_scope(|| self.inner.call(request)));
        let traced_answer = async move {
            let answer = answer.await;
            let code = answer.as_ref().map_or(Code::Unknown, |a| code(a.headers()));
            let span = Span::current();
            span.record("rpc.grpc.status_code", i64::from(i32::from(code)));
            if code != Code::Ok {
                trace::failed(&span);
            }
            answer
        };
        Box::pin(traced_answer.instrument(traced).instrument(logged))
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}
