//! What the store knows of its datasets, and how it is read back from the pool.
//!
//! Called by the store. Everything that is needed is in the pool itself: names, origins, the `@ready` snapshots and two
//! user properties. [`read`] is pure; whatever does not carry our tag is counted as foreign and never touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::Usage;
use crate::integrations::zfs::{Dataset, Properties, Source};

/// Carried by everything of ours, set on it itself: the installation's id.
pub(super) const OWNER: &str = "lxcri:owner";
/// On a layer's `@ready`: "bytes,inodes" of its own files.
pub(super) const USAGE: &str = "lxcri:usage";
/// The snapshot that makes a layer count.
pub(super) const READY: &str = "ready";
/// Begins the names of snapshots that users made of a container.
pub(super) const CUT: &str = "lxcri-";
/// What a listing asks for.
pub(super) const LISTED: &[&str] = &["type", "used", "referenced", "origin", OWNER, USAGE];

/// A committed layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    pub parent: Option<Digest>,
    pub usage: Usage,
    /// Bytes that a clone of it refers to from the start.
    pub referenced: u64,
}

/// A container's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rootfs {
    /// The layer that it is a clone of.
    pub top: Digest,
    /// Names of its snapshots, oldest first.
    pub cuts: Vec<String>,
}

/// A dataset that is to be destroyed.
#[derive(Debug, Clone)]
pub(super) struct Doomed {
    /// Its layer, which can be had back until the destruction begins.
    pub layer: Option<(Digest, Layer)>,
    /// Snapshots to be destroyed with it.
    pub snapshots: Vec<String>,
    /// It is being destroyed now.
    pub busy: bool,
    /// Not before.
    pub after: Option<Instant>,
    /// Tries so far.
    pub tries: u32,
}

impl Doomed {
    pub fn new(snapshots: Vec<String>) -> Self {
        Self { layer: None, snapshots, busy: false, after: None, tries: 0 }
    }
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct State {
    pub layers: HashMap<Digest, Layer>,
    pub rootfs: HashMap<ContainerId, Rootfs>,
    pub doomed: BTreeMap<Dataset, Doomed>,
    /// Tagged datasets whose place or name tells nothing: reported, never removed.
    pub odd: BTreeSet<String>,
    /// Not ours.
    pub foreign: BTreeSet<String>,
    /// zfs-fuse alone: it can't mount a dataset again while it is mounted somewhere.
    pub mounts: HashMap<ContainerId, OwnedFd>,
    /// Objects that a container's clone began with.
    pub objects: HashMap<ContainerId, u64>,
}

impl State {
    /// Whether a container or layer is made of this layer.
    pub fn unwanted(&self, keep: &[Digest]) -> Vec<Digest> {
        let mut wanted: BTreeSet<&Digest> = keep.iter().collect();
        wanted.extend(self.rootfs.values().map(|r| &r.top));
        let mut pending: Vec<&Digest> = wanted.iter().copied().collect();
        while let Some(chain) = pending.pop() {
            if let Some(parent) = self.layers.get(chain).and_then(|l| l.parent.as_ref())
                && wanted.insert(parent)
            {
                pending.push(parent);
            }
        }
        self.layers.keys().filter(|c| !wanted.contains(c)).cloned().collect()
    }
}

fn usage(text: &str) -> Option<Usage> {
    let (bytes, inodes) = text.split_once(',')?;
    Some(Usage { bytes: bytes.parse().ok()?, inodes: inodes.parse().ok()? })
}

/// The value of [`USAGE`].
pub(super) fn usage_text(usage: Usage) -> String {
    format!("{},{}", usage.bytes, usage.inodes)
}

fn chain(leaf: &str) -> Option<Digest> {
    format!("sha256:{leaf}").parse().ok()
}

/// Makes a state of what `zfs get -r` of `root` told. `owner` is our tag.
pub(super) fn read(root: &Dataset, owner: &str, all: &Properties) -> State {
    let mut state = State::default();
    let mut snapshots: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in all.keys() {
        if let Some((dataset, snapshot)) = name.split_once('@') {
            snapshots.entry(dataset).or_default().push(snapshot);
        }
    }
    for (name, properties) in all.iter().filter(|(name, _)| !name.contains('@')) {
        let Ok(dataset) = name.parse::<Dataset>() else {
            state.foreign.insert(name.clone());
            continue;
        };
        let Some(place) = dataset.below(root) else { continue };
        if matches!(place, "layers" | "containers") {
            continue;
        }
        let tag = properties.get(OWNER).filter(|v| v.source != Source::Elsewhere);
        if tag.is_none_or(|v| v.text != owner) {
            state.foreign.insert(name.clone());
            continue;
        }
        let own = snapshots.get(name.as_str()).cloned().unwrap_or_default();
        let origin = properties.get("origin").and_then(|v| v.text.strip_suffix(&format!("@{READY}")));
        let origin = origin.and_then(|o| o.parse::<Dataset>().ok());
        let origin = origin.filter(|o| o.below(root).is_some_and(|p| p.starts_with("layers/")));
        let origin = origin.and_then(|o| chain(o.leaf()));
        match place.split_once('/') {
            Some(("layers", leaf)) if chain(leaf).is_some() => {
                let Some(chain) = chain(leaf) else { continue };
                let ready = all.get(&format!("{name}@{READY}")).filter(|_| own.contains(&READY));
                let told =
                    ready.and_then(|r| Some((usage(&r.get(USAGE)?.text)?, r.get("referenced")?.text.parse().ok()?)));
                match told {
                    Some((usage, referenced)) => {
                        state.layers.insert(chain, Layer { parent: origin, usage, referenced });
                    }
                    // Half made, or half destroyed.
                    None => {
                        let doomed = Doomed::new(own.iter().map(|s| (*s).to_owned()).filter(|s| s == READY).collect());
                        state.doomed.insert(dataset, doomed);
                    }
                }
            }
            Some(("containers", leaf)) if leaf.parse::<ContainerId>().is_ok() => {
                let (Ok(id), Some(top)) = (leaf.parse::<ContainerId>(), origin) else {
                    state.odd.insert(name.clone());
                    continue;
                };
                let cuts = own.iter().filter(|s| s.starts_with(CUT)).map(|s| (*s).to_owned()).collect();
                state.rootfs.insert(id, Rootfs { top, cuts });
            }
            None if place.starts_with("tmp-") => {
                state.doomed.insert(dataset, Doomed::new(Vec::new()));
            }
            _ => {
                state.odd.insert(name.clone());
            }
        }
    }
    // A layer whose parent is missing can't be (ZFS would not let it go), so it is not looked for.
    state
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::integrations::zfs::Value;

    fn listing(rows: &[(&str, &[(&str, &str)])]) -> Properties {
        let value = |text: &str| Value { text: text.into(), source: Source::Local };
        let row = |(name, values): &(&str, &[(&str, &str)])| {
            ((*name).to_owned(), values.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect())
        };
        rows.iter().map(row).collect()
    }

    #[test]
    fn what_counts_what_goes_and_what_is_not_ours() {
        let (a, b, c) = ("a".repeat(64), "b".repeat(64), "c".repeat(64));
        let name = |place: &str| format!("tank/l/{place}");
        let (la, lb, lc) = (name(&format!("layers/{a}")), name(&format!("layers/{b}")), name(&format!("layers/{c}")));
        let (ar, br) = (format!("{la}@ready"), format!("{lb}@ready"));
        let (box_a, box_x) = (name(&format!("containers/{a}")), name(&format!("containers/{b}")));
        let (cut, auto) = (format!("{box_a}@lxcri-one"), format!("{box_a}@autosnap_x"));
        let ready: &[(&str, &str)] = &[("referenced", "100"), (USAGE, "7,8")];
        let own: &[(&str, &str)] = &[(OWNER, "me")];
        let all = listing(&[
            ("tank/l", own),
            ("tank/l/layers", own),
            (&la, own),
            (&ar, ready),
            (&lb, &[(OWNER, "me"), ("origin", &ar)]),
            (&br, ready),
            (&lc, own),
            (&box_a, &[(OWNER, "me"), ("origin", &br)]),
            (&cut, &[]),
            (&auto, &[]),
            (&box_x, &[(OWNER, "you"), ("origin", &br)]),
            ("tank/l/subvol-100-disk-0", &[]),
            ("tank/l/layers/x y", &[]),
            ("tank/l/tmp-x", own),
            ("tank/l/other", own),
        ]);
        let state = read(&"tank/l".parse().expect("name"), "me", &all);
        let digest = |s: &str| chain(s).expect("digest");
        assert_eq!(state.layers.len(), 2);
        assert_eq!(state.layers[&digest(&b)].parent, Some(digest(&a)));
        assert_eq!(state.layers[&digest(&a)].usage, Usage { bytes: 7, inodes: 8 });
        assert_eq!(state.doomed.keys().map(Dataset::as_str).collect::<Vec<_>>(), [lc.as_str(), "tank/l/tmp-x"]);
        let rootfs = state.rootfs.values().next().expect("one");
        assert_eq!((state.rootfs.len(), rootfs.cuts.as_slice()), (1, ["lxcri-one".to_owned()].as_slice()));
        assert_eq!(state.foreign.len(), 3, "{:?}", state.foreign);
        assert_eq!(state.odd.iter().collect::<Vec<_>>(), ["tank/l/other"]);
        assert_eq!(state.unwanted(&[]), Vec::<Digest>::new());
        let mut state = state;
        state.rootfs.clear();
        assert_eq!(state.unwanted(&[digest(&a)]), [digest(&b)]);
        assert_eq!(state.unwanted(&[]).len(), 2);
    }
}
