//! Compares the pool with what the store and the engine know.
//!
//! Called by `storage check`. Changes nothing. Fails only when the pool can't be listed.

use std::collections::BTreeSet;

use super::Inner;
use super::reaper::PATIENCE;
use super::state::FORK;
use crate::core::error::Result;
use crate::core::ports::{Claims, StorageReport};
use crate::integrations::zfs::Dataset;

/// `claims`: the containers that there are.
pub(super) async fn check(store: &Inner, claims: &(dyn Fn() -> Claims + Send + Sync)) -> Result<StorageReport> {
    // Containers come and go while the pool is read: what is to be there is what was before and is still.
    let before = claims();
    // What goes while the pool is read is in the list, and known no more.
    let going: BTreeSet<Dataset> = store.state().doomed.keys().cloned().collect();
    let found = store.read_pool().await?;
    let now = claims();
    let mut report = StorageReport::default();
    let known = store.state();
    report.notes.push(format!("{} layers, {} root file systems", known.layers.len(), known.rootfs.len()));
    for (dataset, doomed) in &known.doomed {
        match doomed.tries {
            _ if known.has_forks(dataset) => {
                report.notes.push(format!("{dataset}: removed, but stays as long as the forks of it"));
            }
            // What is busy goes a moment later.
            n if n < PATIENCE => report.notes.push(format!("{dataset}: is being destroyed")),
            n => report.problems.push(format!("{dataset}: can't be destroyed, {n} tries so far")),
        }
    }
    // What lies below goes with it.
    let going_with =
        |d: &Dataset| known.doomed.keys().chain(&going).any(|above| d == above || d.below(above).is_some());
    for dataset in found.doomed.keys().filter(|d| !going_with(d) && !known.temporary.contains(d)) {
        // A layer that is being unpacked looks the same.
        if !store.at_work(dataset) {
            report.problems.push(format!("{dataset}: half a layer"));
        }
    }
    for part in found
        .parts
        .values()
        .filter(|p| !known.doomed.contains_key(&p.dataset) && !going.contains(&p.dataset) && !store.at_work(&p.dataset))
    {
        match known.parts.values().any(|k| k.dataset == part.dataset) {
            true => report.notes.push(format!(
                "{}: the beginning of a layer, for a stream that goes on with it; else it goes when layers are collected",
                part.dataset
            )),
            false => report.problems.push(format!("{}: the beginning of a layer, not known", part.dataset)),
        }
    }
    let gone = |what: &str, name: &str| format!("{what} {name}: known, but not in the pool as it was made");
    let missing = known.layers.iter().filter(|(c, l)| found.layers.get(c) != Some(l));
    report.problems.extend(missing.map(|(c, _)| gone("layer", &c.to_string())));
    let made = known.rootfs.iter().filter(|(c, _)| before.whole.contains(*c) || !now.has(c));
    let missing = made.filter(|(c, r)| found.rootfs.get(c).map(|f| &f.top) != Some(&r.top));
    report.problems.extend(missing.map(|(c, _)| gone("container", c.as_str())));
    let cuts =
        |cuts: &[String]| -> BTreeSet<String> { cuts.iter().filter(|c| !c.starts_with(FORK)).cloned().collect() };
    let other =
        known.rootfs.iter().filter(|(c, r)| found.rootfs.get(c).is_some_and(|f| cuts(&f.cuts) != cuts(&r.cuts)));
    report.problems.extend(other.map(|(c, _)| format!("container {c}: the pool has other snapshots than are known")));
    let doomed = |leaf: &str| known.doomed.keys().chain(&going).any(|d| d.leaf() == leaf);
    let more = found.layers.keys().filter(|c| !known.layers.contains_key(c) && !doomed(c.hex()));
    report.problems.extend(more.map(|c| format!("layer {c}: in the pool, but not known")));
    let orphans = found.rootfs.keys().filter(|c| !before.has(c) && !now.has(c) && !doomed(c.as_str()));
    report.problems.extend(orphans.map(|c| format!("container {c}: a root file system that no container has")));
    let lost = before.whole.intersection(&now.whole).filter(|c| !found.rootfs.contains_key(*c));
    report.problems.extend(lost.map(|c| format!("container {c}: it has no root file system")));
    report.problems.extend(found.odd.iter().map(|d| format!("{d}: ours, but of no use")));
    report.notes.extend(found.foreign.iter().map(|d| format!("{d}: not ours, left alone")));
    Ok(report)
}
