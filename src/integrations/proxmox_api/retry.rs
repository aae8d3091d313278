//! What may be repeated, and when. Pure.
//!
//! The rule: a change that may have been done is never repeated by us; its caller looks first. Reading may always be
//! repeated, and so may what was not sent, or what failed for the lock file, which Proxmox takes before it does anything.

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use super::error::ErrorKind;

/// Most tries of one call.
const TRIES: u32 = 6;
/// First wait; doubled each time.
const FIRST: Duration = Duration::from_millis(200);
/// Longest wait.
const LONGEST: Duration = Duration::from_secs(5);

/// What comes after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The caller gets it.
    Give,
    /// The next endpoint, at once.
    Endpoint,
    /// Again after a wait, at the next endpoint.
    Later,
}

/// `tries`: how many there were, from 1. `endpoints`: how many there are.
pub(super) fn next(kind: &ErrorKind, reading: bool, tries: u32, endpoints: u32) -> Next {
    // A round through all endpoints is without waits.
    let round = !tries.is_multiple_of(endpoints.max(1));
    let again = if round { Next::Endpoint } else { Next::Later };
    match kind {
        _ if tries >= TRIES.max(endpoints) => Next::Give,
        ErrorKind::Unreachable => again,
        // A wrong certificate stays wrong: the others are asked once.
        ErrorKind::Certificate if tries < endpoints => Next::Endpoint,
        ErrorKind::Busy => Next::Later,
        ErrorKind::NoAnswer if reading => again,
        ErrorKind::Timeout if reading && tries < endpoints.max(2) => again,
        _ => Next::Give,
    }
}

/// The same where no ticket was got, so that nothing was sent: each endpoint is asked once.
pub(super) fn without_login(kind: &ErrorKind, tries: u32, endpoints: u32) -> Next {
    match kind {
        // A password that is wrong is so everywhere, and tried too often locks its user out.
        ErrorKind::Auth => Next::Give,
        ErrorKind::Unreachable => next(kind, true, tries, endpoints),
        _ if tries < endpoints => Next::Endpoint,
        _ => Next::Give,
    }
}

/// How long to wait after `tries`, with jitter: half to one and a half of the step.
pub(super) fn wait(tries: u32) -> Duration {
    let step = FIRST.saturating_mul(1 << tries.min(10)).min(LONGEST);
    // Keyed anew each time: all the randomness that a jitter needs.
    let random = std::collections::hash_map::RandomState::new().build_hasher().finish();
    step.mul_f64(0.5 + (random % 1024) as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = ErrorKind> {
        use ErrorKind as K;
        prop::sample::select(vec![
            K::NotFound,
            K::AlreadyExists,
            K::AlreadyRunning,
            K::NotRunning,
            K::StillRunning,
            K::Paused,
            K::NoAgent,
            K::Locked("backup".into()),
            K::Busy,
            K::Changed,
            K::Invalid,
            K::Unsupported,
            K::Auth,
            K::RootOnly,
            K::NoQuorum,
            K::NoSpace,
            K::UnknownNode,
            K::Unreachable,
            K::Certificate,
            K::NoAnswer,
            K::Timeout,
            K::Overloaded,
            K::TaskFailed,
            K::Protocol,
            K::Failed,
        ])
    }

    proptest! {
        #[test]
        fn a_change_that_may_be_done_is_not_repeated(kind in kinds(), tries in 1u32..20, endpoints in 0u32..5) {
            let done_nothing = matches!(kind, ErrorKind::Unreachable | ErrorKind::Certificate | ErrorKind::Busy);
            if !done_nothing {
                prop_assert_eq!(next(&kind, false, tries, endpoints), Next::Give);
            }
        }

        #[test]
        fn every_call_ends(kind in kinds(), reading: bool, endpoints in 0u32..9) {
            prop_assert!((1..32).any(|tries| next(&kind, reading, tries, endpoints) == Next::Give));
        }

        #[test]
        fn waits_are_jittered_and_bounded(tries in 0u32..100) {
            let t = wait(tries);
            prop_assert!(t >= FIRST / 2 && t <= LONGEST.mul_f64(1.5));
        }
    }

    #[test]
    fn all_endpoints_are_tried_before_a_wait() {
        assert_eq!(next(&ErrorKind::Unreachable, false, 1, 3), Next::Endpoint);
        assert_eq!(next(&ErrorKind::Unreachable, false, 2, 3), Next::Endpoint);
        assert_eq!(next(&ErrorKind::Unreachable, false, 3, 3), Next::Later);
        assert_eq!(next(&ErrorKind::Certificate, true, 1, 1), Next::Give);
        assert_eq!(without_login(&ErrorKind::Timeout, 1, 2), Next::Endpoint);
        assert_eq!(without_login(&ErrorKind::Timeout, 2, 2), Next::Give);
        assert_eq!(without_login(&ErrorKind::Auth, 1, 2), Next::Give);
    }
}
