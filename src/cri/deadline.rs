//! Answers DEADLINE_EXCEEDED when a call's `grpc-timeout` is up.
//!
//! Called by `server` around every service. tonic has such a timer of its own, but its answer is CANCELLED, which
//! callers that see it before their own timer take for something else. This one ends a millisecond earlier. The call's
//! future is dropped, as when the caller goes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

/// The layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeadlineLayer;

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Deadline { inner }
    }
}

/// A service whose calls end at their deadline.
#[derive(Debug, Clone)]
pub struct Deadline<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Deadline<S>
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
        let limit = limit(request.headers());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let Some(limit) = limit else { return answer.await };
            match tokio::time::timeout(limit.saturating_sub(Duration::from_millis(1)), answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    let text = format!("the call's time ({} ms) is up", limit.as_millis());
                    Ok(tonic::Status::deadline_exceeded(text).into_http())
                }
            }
        })
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
    use super::*;

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
        let mut service = DeadlineLayer.layer(slow);
        let request = Request::builder().header("grpc-timeout", "20m").body(()).expect("a request");
        let answer = service.call(request).await.expect("an answer");
        assert_eq!(answer.headers()["grpc-status"], "4");
    }
}
