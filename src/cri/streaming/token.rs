//! Tokens: what a URL of the streaming server stands for. Random, good for one request and one minute, in memory only.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use tokio::time::Instant;

use crate::core::engine::{Scope, Wanted};
use crate::core::error::{Error, Kind, Result};

/// How long a token is good.
pub const LIFE: Duration = Duration::from_secs(60);
/// Most tokens that nobody has used yet.
const MAX: usize = 1000;

/// What a token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Run a command in a container.
    Exec {
        /// Whose pods are seen.
        scope: Scope,
        /// The container.
        container: String,
        /// Program and arguments.
        command: Vec<String>,
        /// Its streams.
        wanted: Wanted,
    },
    /// Be connected with a container.
    Attach {
        /// Whose pods are seen.
        scope: Scope,
        /// The container.
        container: String,
        /// Streams.
        wanted: Wanted,
    },
    /// Be connected with ports of a pod.
    PortForward {
        /// Whose pods are seen.
        scope: Scope,
        /// The pod.
        pod: String,
        /// Ports, for the legacy WebSocket protocol; others name them themselves.
        ports: Vec<u16>,
    },
}

impl Request {
    /// First part of the URL's path.
    pub fn path(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }
}

/// Those that are out.
#[derive(Debug, Default)]
pub struct Tokens {
    out: Mutex<HashMap<String, (Instant, Request)>>,
}

impl Tokens {
    fn living(&self) -> MutexGuard<'_, HashMap<String, (Instant, Request)>> {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        out.retain(|_, (since, _)| since.elapsed() < LIFE);
        out
    }

    /// A new token: 256 random bits as 43 characters that fit a URL.
    pub fn issue(&self, request: Request) -> Result<String> {
        let mut bits = [0u8; 32];
        let failed = |e: rustix::io::Errno| Error::io("make a random token", e.into());
        let n = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty()).map_err(failed)?;
        if n < bits.len() {
            return Err(Error::internal("make a random token: too few random bytes"));
        }
        let mut out = self.living();
        if out.len() >= MAX {
            return Err(Error::new(
                Kind::ResourceExhausted,
                format!("{MAX} streaming requests wait for their clients already"),
            ));
        }
        let token = BASE64_URL_SAFE_NO_PAD.encode(bits);
        out.insert(token.clone(), (Instant::now(), request));
        Ok(token)
    }

    /// Whether a token is good at this path.
    pub fn has(&self, path: &str, token: &str) -> bool {
        self.living().get(token).is_some_and(|(_, request)| request.path() == path)
    }

    /// What a token stands for, once. `path` must be that of its URL.
    pub fn take(&self, path: &str, token: &str) -> Option<Request> {
        let (_, request) = self.living().remove(token)?;
        (request.path() == path).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::PortForward { scope: Scope::Cri, pod: "p".into(), ports: vec![] }
    }

    #[tokio::test(start_paused = true)]
    async fn once_and_for_a_minute() {
        let tokens = Tokens::default();
        let token = tokens.issue(request()).expect("issue");
        assert_eq!(token.len(), 43);
        assert_eq!((tokens.has("portforward", &token), tokens.has("exec", &token)), (true, false));
        assert_eq!(tokens.take("portforward", &token), Some(request()));
        assert_eq!((tokens.take("portforward", &token), tokens.has("portforward", &token)), (None, false));
        // Used up at the wrong place, too.
        let token = tokens.issue(request()).expect("issue");
        assert_eq!(tokens.take("exec", &token), None);
        assert_eq!(tokens.take("portforward", &token), None);
        let token = tokens.issue(request()).expect("issue");
        tokio::time::advance(LIFE).await;
        assert_eq!(tokens.take("portforward", &token), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_bounded_number() {
        let tokens = Tokens::default();
        for _ in 0..MAX {
            tokens.issue(request()).expect("issue");
        }
        assert_eq!(tokens.issue(request()).map_err(|e| e.kind()), Err(Kind::ResourceExhausted));
        tokio::time::advance(LIFE).await;
        tokens.issue(request()).expect("the old ones are forgotten");
    }
}
