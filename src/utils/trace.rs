//! Spans for traces (`[tracing]`), apart from those of the log: their names vary, and no line of the log shows them.
//!
//! Whoever does a step of some length puts its future into one of these. Costs nothing where no traces are collected.

use tracing::Span;
use tracing::field::Empty;

/// Their target: the log's filter leaves it out, the collector's takes nothing else.
pub const TARGET: &str = "lxcri_trace";

/// A step of the work that the current span is about.
pub fn step(name: &str) -> Span {
    tracing::info_span!(target: TARGET, "step", otel.name = name, otel.status_code = Empty)
}

/// The same of the work that `parent` is about.
pub fn step_of(parent: &Span, name: &str) -> Span {
    tracing::info_span!(target: TARGET, parent: parent, "step", otel.name = name, otel.status_code = Empty)
}

/// Notes that the step has failed.
pub fn failed(step: &Span) {
    step.record("otel.status_code", "ERROR");
}
