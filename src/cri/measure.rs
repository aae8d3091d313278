//! How long each call of the CRI took and how it ended, for the metrics.
//!
//! Called by `server` around every service, outside of the deadline: what a caller waited for is what counts. A call whose caller
//! went away is counted as Cancelled. Of a stream the beginning is measured.

use std::future::Future;
use std::time::Instant;

use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};

use super::around::Around;
use crate::core::metrics::{Call, metrics};

/// Calls are measured.
pub struct Measure;

/// A call under way; what is dropped without an end was cancelled.
pub struct UnderWay {
    method: String,
    start: Instant,
    code: Code,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // Whoever can connect could ask for methods that nobody knows, without an end.
        let method = match self.code {
            Code::Unimplemented => "unknown".to_owned(),
            _ => std::mem::take(&mut self.method),
        };
        let labels = Call { method, code: name(self.code) };
        metrics().calls.get_or_create(&labels).observe(self.start.elapsed().as_secs_f64());
    }
}

impl Around for Measure {
    type Seen = UnderWay;

    fn see<B>(request: &Request<B>) -> UnderWay {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        UnderWay { method, start: Instant::now(), code: Code::Cancelled }
    }

    async fn around<E: Send>(
        mut call: UnderWay,
        answer: impl Future<Output = Result<Response<Body>, E>> + Send,
    ) -> Result<Response<Body>, E> {
        let answer = answer.await;
        call.code = answer.as_ref().map_or(Code::Unknown, |a| code(a.headers()));
        answer
    }
}

/// A failure is in the headers; a success is in the trailers, after the body.
pub(super) fn code(headers: &HeaderMap) -> Code {
    headers.get("grpc-status").map_or(Code::Ok, |v| Code::from_bytes(v.as_bytes()))
}

/// As the gRPC documents write it.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Cancelled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use tower::{Layer, Service};

    use super::*;
    use crate::cri::around::layer;

    fn count(method: &str, code: &'static str) -> u64 {
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register("calls", "x", metrics().calls.clone());
        let mut text = String::new();
        prometheus_client::encoding::prometheus_text::encode(&mut text, &registry).expect("text");
        let start = format!("calls_count{{method=\"{method}\",code=\"{code}\"}} ");
        text.lines().find_map(|l| l.strip_prefix(&start)?.parse().ok()).unwrap_or(0)
    }

    #[tokio::test]
    async fn calls_are_counted_by_method_and_end() {
        let service = tower::service_fn(|request: Request<()>| async move {
            match request.uri().path().rsplit('/').next() {
                Some("MeasuredHang") => std::future::pending().await,
                Some("MeasuredFailure") => {
                    Ok::<_, std::convert::Infallible>(tonic::Status::not_found("x").into_http::<Body>())
                }
                Some("MeasuredNonsense") => Ok(tonic::Status::unimplemented("x").into_http()),
                _ => Ok(Response::new(Body::empty())),
            }
        });
        let mut service = layer::<Measure>().layer(service);
        let mut call = |method: &str| {
            service.call(
                Request::builder().uri(format!("/runtime.v1.RuntimeService/{method}")).body(()).expect("a request"),
            )
        };
        let unknown = count("unknown", "Unimplemented");
        for method in ["MeasuredSuccess", "MeasuredSuccess", "MeasuredFailure", "MeasuredNonsense"] {
            call(method).await.expect("an answer");
        }
        drop(call("MeasuredHang"));
        assert_eq!((count("MeasuredSuccess", "OK"), count("MeasuredFailure", "NotFound")), (2, 1));
        assert_eq!((count("MeasuredHang", "Cancelled"), count("MeasuredNonsense", "Unimplemented")), (1, 0));
        assert_eq!(count("unknown", "Unimplemented"), unknown + 1);
    }
}
