//! Bearer tokens that are still good, for all pulls of the daemon: an image of many names, or a kubelet that pulls ten images
//! of one repository, asks a token server once.
//!
//! Kept in memory alone, under a digest of what they were asked with: who has other credentials has other tokens. No Debug:
//! these are secrets.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::auth::Credentials;

/// What a token is good for when its server does not say, as its specification has it.
pub(super) const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// So long before its end a token is not used any more.
const MARGIN: Duration = Duration::from_secs(5);
/// No token is believed to live longer.
const MAX_LIFE: Duration = Duration::from_secs(3600);
/// Most tokens that are kept.
const MAX_TOKENS: usize = 1000;

/// What a token was asked with.
pub(super) type Key = [u8; 32];

/// See the module's words.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<Key, (String, Instant)>>);

/// The key of a question to a token server.
pub(super) fn key(realm: &str, service: Option<&str>, scope: &str, credentials: &Credentials) -> Key {
    let (user, password) = credentials.basic.as_ref().map_or(("", ""), |(u, p)| (u.as_str(), p.as_str()));
    let identity = credentials.identity.as_deref().unwrap_or("");
    let mut sum = Sha256::new();
    for part in [realm, service.unwrap_or(""), scope, user, password, identity] {
        sum.update((part.len() as u64).to_be_bytes());
        sum.update(part);
    }
    sum.finalize().into()
}

impl Tokens {
    pub(super) fn get(&self, key: &Key) -> Option<String> {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(key).filter(|(_, end)| *end > Instant::now()).map(|(token, _)| token.clone())
    }

    pub(super) fn put(&self, key: Key, token: &str, life: Duration) {
        let Some(life) = life.min(MAX_LIFE).checked_sub(MARGIN) else { return };
        let now = Instant::now();
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|_, (_, end)| *end > now);
        if tokens.len() < MAX_TOKENS {
            tokens.insert(key, (token.to_owned(), now + life));
        }
    }

    /// The registry did not take it.
    pub(super) fn forget(&self, key: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_credentials_are_other_tokens() {
        let who = |user: &str, password: &str| Credentials {
            basic: Some((user.into(), password.into())),
            ..Credentials::default()
        };
        let all = [
            key("r", Some("s"), "x", &Credentials::default()),
            key("r", None, "x", &Credentials::default()),
            key("r", Some("s"), "x", &who("ab", "c")),
            key("r", Some("s"), "x", &who("a", "bc")),
        ];
        assert!(all.iter().enumerate().all(|(n, k)| !all[..n].contains(k)));
        let tokens = Tokens::default();
        tokens.put(all[0], "short", Duration::from_secs(3));
        assert_eq!(tokens.get(&all[0]), None);
        tokens.put(all[0], "long", DEFAULT_LIFE);
        assert_eq!((tokens.get(&all[0]).as_deref(), tokens.get(&all[1])), (Some("long"), None));
        tokens.forget(&all[0]);
        assert_eq!(tokens.get(&all[0]), None);
    }
}
