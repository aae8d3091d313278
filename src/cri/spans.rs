//! Spans around each call of the CRI. One for the log, below which everything that the call causes is logged: its method, and the
//! pod and container that it turns out to be about. One for traces, which goes on with the caller's (`traceparent`).
//!
//! Called by `server` around every service. Costs nothing where nobody listens; nothing can fail.

use std::future::Future;

use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tracing::field::Empty;
use tracing::{Instrument, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::around::Around;
use super::measure::code;
use crate::utils::trace;

/// What a call is logged and traced by.
pub struct Spans;

impl Around for Spans {
    /// The log's and the traces'.
    type Seen = (Span, Span);

    fn see<B>(request: &Request<B>) -> Self::Seen {
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
        (logged, traced)
    }

    fn around<E: Send>(
        (logged, traced): Self::Seen,
        answer: impl Future<Output = Result<Response<Body>, E>> + Send,
    ) -> impl Future<Output = Result<Response<Body>, E>> + Send {
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
        traced_answer.instrument(traced).instrument(logged)
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
