//! Answers DEADLINE_EXCEEDED when a call's `grpc-timeout` is up.
//!
//! Called by `server` around every service. tonic has such a timer of its own, but its answer is CANCELLED, which
//! callers that see it before their own timer take for something else. This one ends a millisecond earlier. The call's
//! future is dropped, as when the caller goes.

use std::future::Future;
use std::time::Duration;

use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};

use super::around::Around;

/// Calls end at their deadline.
pub struct Deadline;

impl Around for Deadline {
    /// The time that the caller gave it.
    type Seen = Option<Duration>;

    fn see<B>(request: &Request<B>) -> Option<Duration> {
        limit(request.headers())
    }

    async fn around<E: Send>(
        limit: Option<Duration>,
        answer: impl Future<Output = Result<Response<Body>, E>> + Send,
    ) -> Result<Response<Body>, E> {
        let Some(limit) = limit else { return answer.await };
        match tokio::time::timeout(limit.saturating_sub(Duration::from_millis(1)), answer).await {
            Ok(answer) => answer,
            Err(_) => {
                let text = format!("the call's time ({} ms) is up", limit.as_millis());
                Ok(tonic::Status::deadline_exceeded(text).into_http())
            }
        }
    }
}

/// The header's value: at most eight digits and a unit. What does not parse is no limit, as in other servers.
/// Source: gRPC over HTTP/2, "Timeout".
fn limit(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use tower::{Layer, Service};

    use super::*;
    use crate::cri::around::layer;

    #[test]
    fn timeouts_are_read_as_the_protocol_writes_them() {
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", value.parse().expect("a header"));
            limit(&headers)
        };
        assert_eq!(read("2S"), Some(Duration::from_secs(2)));
        assert_eq!(read("999978u"), Some(Duration::from_micros(999_978)));
        assert_eq!(read("3H"), Some(Duration::from_secs(10_800)));
        for bad in ["", "S", "12", "123456789S", "-1S", "1x", "1.5S"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
        assert_eq!(limit(&HeaderMap::new()), None);
    }

    #[tokio::test]
    async fn a_call_that_takes_too_long_is_answered_in_time() {
        let slow = tower::service_fn(|_: Request<()>| async {
            std::future::pending::<()>().await;
            Ok::<_, std::convert::Infallible>(Response::new(Body::empty()))
        });
        let mut service = layer::<Deadline>().layer(slow);
        let request = Request::builder().header("grpc-timeout", "20m").body(()).expect("a request");
        let answer = service.call(request).await.expect("an answer");
        assert_eq!(answer.headers()["grpc-status"], "4");
    }
}
