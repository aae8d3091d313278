//! Destroys what was removed: in the background, one dataset after the other, as often as it takes.
//!
//! Run by the store as one task. Containers go first, then layers from the top down, as their clones allow. What is busy
//! or has dependents is tried again, ever more seldom; while the pool is away nothing is. A crash loses the list, not
//! the work: half layers are found by the next start, clones by the engine, unused layers by the image store.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Inner;
use super::state::{self, CUT, Doomed, FORK, READY, State};
use crate::core::ids::Digest;
use crate::fail_point;
use crate::integrations::zfs::{Dataset, Reason, ZfsError};

/// First pause before a dataset is tried again; doubled each time.
const PAUSE: Duration = Duration::from_millis(200);
/// Longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Tries after which it is said that something does not go.
pub(super) const PATIENCE: u32 = 6;

/// Never ends.
pub(super) async fn run(store: Arc<Inner>) {
    loop {
        let next = store.state().doomed.values().map(|d| d.after).min();
        match next {
            None => store.doom.notified().await,
            Some(Some(at)) if at > Instant::now() => {
                let _ = tokio::time::timeout_at(at.into(), store.doom.notified()).await;
            }
            Some(_) => {}
        }
        if store.usable().is_err() {
            // Whoever finds the pool well again says so by `doom`.
            store.doom.notified().await;
            continue;
        }
        round(&store).await;
    }
}

/// Ends when there is nothing to destroy but what has forks.
pub(super) async fn settled(store: &Inner) {
    loop {
        let mut reaped = std::pin::pin!(store.reaped.notified());
        reaped.as_mut().enable();
        {
            let state = store.state();
            if state.doomed.keys().all(|d| state.has_forks(d)) {
                return;
            }
        }
        reaped.await;
    }
}

/// Tries everything whose time has come; again from the start as long as something went, which may free something else.
async fn round(store: &Arc<Inner>) {
    loop {
        let due: Vec<Dataset> = {
            let mut state = store.state();
            let now = Instant::now();
            // What has forks need not be tried; the end of the last of them sets its time anew.
            let waiting: Vec<Dataset> = state.doomed.keys().filter(|d| state.has_forks(d)).cloned().collect();
            for dataset in waiting {
                if let Some(doomed) = state.doomed.get_mut(&dataset) {
                    doomed.after = Some(now + MAX_PAUSE);
                }
            }
            let mut due: Vec<_> = state.doomed.iter().filter(|(_, d)| d.after.is_none_or(|at| at <= now)).collect();
            // What is no layer first, then the uppermost layers: a try too early costs a look at every dataset of the pool.
            let parents = parents(&state);
            due.sort_by_cached_key(|(_, d)| Reverse(height(&parents, d)));
            due.into_iter().map(|(name, _)| name.clone()).collect()
        };
        let mut went = false;
        for dataset in due {
            let Some(doomed) = claim(store, &dataset) else { continue };
            let done = destroy(store, &dataset, &doomed).await;
            went |= settle(store, &dataset, done);
            store.reaped.notify_waiters();
        }
        if !went {
            return;
        }
        // Layers whose clones have gone need not wait.
        for doomed in store.state().doomed.values_mut().filter(|d| d.layer.is_some()) {
            doomed.after = None;
        }
    }
}

/// Layers that are to be destroyed, with their parents.
fn parents(state: &State) -> HashMap<&Digest, Option<&Digest>> {
    state.doomed.values().filter_map(|d| d.layer.as_ref()).map(|(chain, l)| (chain, l.parent.as_ref())).collect()
}

/// How many layers below a layer are to be destroyed with it; what is no layer is above all.
fn height(parents: &HashMap<&Digest, Option<&Digest>>, doomed: &Doomed) -> usize {
    let Some((_, layer)) = &doomed.layer else { return usize::MAX };
    let mut below = 0;
    let mut next = layer.parent.as_ref();
    while let Some(parent) = next.and_then(|p| parents.get(p)) {
        below += 1;
        next = *parent;
    }
    below
}

fn claim(store: &Inner, dataset: &Dataset) -> Option<Doomed> {
    let mut state = store.state();
    let doomed = state.doomed.get_mut(dataset)?;
    doomed.busy = true;
    Some(doomed.clone())
}

async fn destroy(store: &Inner, dataset: &Dataset, doomed: &Doomed) -> Result<(), ZfsError> {
    fail_point!("zfs.destroy.before");
    store.let_go(dataset).await?;
    match state::received(dataset.leaf()).is_some() {
        // Whatever the stream has put there is nobody else's.
        true => gone(store.zfs.destroy_with_snapshots(dataset).await)?,
        false => destroy_own(store, dataset, doomed).await?,
    }
    fail_point!("zfs.destroy.after");
    if let Some(of) = doomed.fork_of.as_ref().filter(|s| s.name().starts_with(FORK))
        && let Err(e) = store.drop_snapshot(of).await
    {
        // It is in nobody's way but of space; the next start tries again.
        tracing::warn!(snapshot = %of, error = e.chain(), "a fork's snapshot stays for now");
    }
    Ok(())
}

/// What was gone before is success.
fn gone(done: Result<(), ZfsError>) -> Result<(), ZfsError> {
    match done {
        Err(e) if e.reason() != Reason::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The snapshots that are ours, then the dataset. One with a snapshot of somebody else's stays, and a layer stays whole then.
async fn destroy_own(store: &Inner, dataset: &Dataset, doomed: &Doomed) -> Result<(), ZfsError> {
    if doomed.layer.is_some() {
        let others = others(store.snapshots(dataset).await, |s| s == READY)?;
        others.map_or(Ok(()), Err)?;
        let done = gone(store.zfs.destroy_snapshot(&dataset.snapshot(READY)?).await);
        // Somebody's clone of it, or hold on it: it is whole, and can be had back. Whatever else fails may have been done.
        if !done.as_ref().is_err_and(|e| matches!(e.reason(), Reason::Busy | Reason::HasDependents))
            && let Some(doomed) = store.state().doomed.get_mut(dataset)
        {
            doomed.layer = None;
        }
        done?;
        fail_point!("zfs.destroy.snapshot_gone");
    }
    for snapshot in doomed.snapshots.iter().filter(|s| doomed.layer.is_none() || *s != READY) {
        gone(store.zfs.destroy_snapshot(&dataset.snapshot(snapshot)?).await)?;
        fail_point!("zfs.destroy.snapshot_gone");
    }
    match store.zfs.destroy(dataset).await {
        Err(e) if e.reason() == Reason::HasDependents => {
            // One that was made later than we waited for, or that another program has made.
            let ours = |s: &str| s == READY || s.starts_with(CUT) || s.starts_with(FORK);
            let there = store.snapshots(dataset).await?;
            for snapshot in there.iter().filter(|s| ours(s)) {
                gone(store.zfs.destroy_snapshot(&dataset.snapshot(snapshot)?).await)?;
            }
            others(Ok(there), ours)?.map_or(Ok(()), Err)?;
            gone(store.zfs.destroy(dataset).await)
        }
        done => gone(done),
    }
}

/// Why a dataset can't go: snapshots that are not ours.
fn others(there: Result<Vec<String>, ZfsError>, ours: impl Fn(&str) -> bool) -> Result<Option<ZfsError>, ZfsError> {
    let there = match there {
        Err(e) if e.reason() == Reason::NotFound => return Ok(None),
        there => there?,
    };
    let others: Vec<String> = there.into_iter().filter(|s| !ours(s)).map(|s| format!("@{s}")).collect();
    Ok((!others.is_empty()).then(|| ZfsError::Failed {
        what: "destroy".into(),
        reason: Reason::HasDependents,
        message: format!("it has snapshots of somebody else's: {}", others.join(", ")),
    }))
}

/// Whether it is gone; else when it is tried again.
fn settle(store: &Inner, dataset: &Dataset, done: Result<(), ZfsError>) -> bool {
    let mut state = store.state();
    let Err(e) = done else {
        if let Some(of) = state.doomed.remove(dataset).and_then(|d| d.fork_of)
            && let Some(source) = state.doomed.get_mut(of.dataset())
        {
            source.after = None;
        }
        fail_point!("zfs.destroy.settled");
        return true;
    };
    let Some(doomed) = state.doomed.get_mut(dataset) else { return false };
    doomed.busy = false;
    doomed.tries += 1;
    let pause = PAUSE.saturating_mul(1 << doomed.tries.min(10)).min(MAX_PAUSE);
    doomed.after = Some(Instant::now() + pause);
    doomed.why = e.to_string();
    let tries = doomed.tries;
    drop(state);
    match e.reason() {
        Reason::Busy | Reason::HasDependents if tries != PATIENCE => {
            tracing::debug!(%dataset, tries, error = %e, "not destroyed yet");
        }
        Reason::NoPool | Reason::Suspended => store.look.notify_one(),
        _ => tracing::warn!(%dataset, tries, error = %e, "can't be destroyed; tried again"),
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::state::Layer;
    use super::*;
    use crate::core::ports::Usage;

    #[test]
    fn layers_go_from_the_top_down() {
        let chain = |n: u8| Digest::from_sha256(&[n; 32]);
        let mut state = State::default();
        let layer = |n: u8, parent: Option<u8>| {
            let usage = Usage { bytes: 0, inodes: 0 };
            let layer = Layer { parent: parent.map(chain), usage, referenced: 0, guid: String::new() };
            Doomed { layer: Some((chain(n), layer)), ..Doomed::new(Vec::new()) }
        };
        // The parent of 4 stays.
        for (n, parent) in [(1, None), (2, Some(1)), (3, Some(2)), (4, Some(9))] {
            state.doomed.insert(format!("t/l/{n}").parse().expect("name"), layer(n, parent));
        }
        let parents = parents(&state);
        let of = |n: u8| height(&parents, &state.doomed[&format!("t/l/{n}").parse().expect("name")]);
        assert_eq!([1, 2, 3, 4].map(of), [0, 1, 2, 0]);
        assert_eq!(height(&parents, &Doomed::new(Vec::new())), usize::MAX);
    }
}
