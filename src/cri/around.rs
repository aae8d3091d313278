//! What is done around every call of the CRI, as layers of the server: `spans`, `measure` and `deadline` are each an [`Around`].
//!
//! Used by `server`. Adds nothing of its own, and can't fail.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

/// Something to do around a call.
pub trait Around {
    /// What it has to know of the request.
    type Seen: Send + 'static;

    /// Looks at a request before it is served.
    fn see<B>(request: &Request<B>) -> Self::Seen;

    /// Serves it: `answer` is what comes of it. Dropped before its end when the caller goes.
    fn around<E: Send>(
        seen: Self::Seen,
        answer: impl Future<Output = Result<Response<Body>, E>> + Send,
    ) -> impl Future<Output = Result<Response<Body>, E>> + Send;
}

/// The layer of one.
pub struct AroundLayer<A>(PhantomData<fn() -> A>);

/// The layer of `A`.
pub fn layer<A>() -> AroundLayer<A> {
    AroundLayer(PhantomData)
}

impl<A> Clone for AroundLayer<A> {
    fn clone(&self) -> Self {
        layer()
    }
}

impl<S, A> Layer<S> for AroundLayer<A> {
    type Service = Served<S, A>;

    fn layer(&self, inner: S) -> Self::Service {
        Served { inner, around: PhantomData }
    }
}

/// A service with that around its calls.
pub struct Served<S, A> {
    inner: S,
    around: PhantomData<fn() -> A>,
}

impl<S: Clone, A> Clone for Served<S, A> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), around: PhantomData }
    }
}

impl<S, A, B> Service<Request<B>> for Served<S, A>
where
    A: Around + 'static,
    S: Service<Request<B>, Response = Response<Body>>,
    S::Error: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let seen = A::see(&request);
        Box::pin(A::around(seen, self.inner.call(request)))
    }
}
