//! What the store knows of its datasets, and how it is read back from the pool.
//!
//! Called by the store. Everything that is needed is in the pool itself: names, origins, the `@ready` snapshots and two
//! user properties. [`read`] is pure; whatever does not carry our tag is counted as foreign and never touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use crate::core::ids::{ContainerId, Digest};
use crate::core::ports::Usage;
use crate::core::spec::{IdMapping, UserNamespace};
use crate::integrations::zfs::{Dataset, Properties, RESUME_TOKEN, Snapshot, Source, Value};

/// Carried by everything of ours, set on it itself: the installation's id.
pub const OWNER: &str = "lxcri:owner";
/// On a layer's `@ready`: "bytes,inodes" of its own files.
pub(super) const USAGE: &str = "lxcri:usage";
/// On a container of a pod with a user namespace: its maps, as [`idmap_text`] writes them.
pub(super) const IDMAP: &str = "lxcri:idmap";
/// On a container with image volumes: hex of the layers that they need, commas between.
pub(super) const VOLUMES: &str = "lxcri:volumes";
/// The snapshot that makes a layer count.
pub(super) const READY: &str = "ready";
/// Begins the names of layers that are being received, or were in part: `recv-<chain>-<number>`.
pub(super) const RECEIVED: &str = "recv-";
/// Digits of a chain's name.
const CHAIN_LEN: usize = 64;
/// Digits that tell streams of the same layer apart.
pub(super) const NUMBER_LEN: usize = 8;
/// Begins the names of snapshots that users made of a container.
pub(super) const CUT: &str = "lxcri-";
/// Begins the names of snapshots that were made for a fork alone. A user's cut can't have one.
pub(super) const FORK: &str = "lxcri:fork-";
/// When a snapshot was made: a number that grows with the pool's transactions.
pub(super) const MADE: &str = "createtxg";
/// What a listing asks for, beside [`RESUME_TOKEN`] where there is one.
pub(super) const LISTED: &[&str] =
    &["type", "used", "referenced", "origin", "guid", MADE, OWNER, USAGE, IDMAP, VOLUMES];

/// A committed layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    pub parent: Option<Digest>,
    pub usage: Usage,
    /// Bytes that a clone of it refers to from the start.
    pub referenced: u64,
    /// Guid of its `@ready`: the same on every node that has it from the same source.
    pub guid: String,
}

/// A container's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rootfs {
    /// The layer that it is a clone of.
    pub top: Digest,
    /// Names of its snapshots, oldest first: cuts and those of forks.
    pub cuts: Vec<String>,
    /// The snapshot of another container that it is a fork of.
    pub fork_of: Option<Snapshot>,
    /// Maps that its mounts have.
    pub user: Option<UserNamespace>,
    /// Layers of its image volumes, without their parents.
    pub volumes: Vec<Digest>,
}

impl Rootfs {
    /// Notes a snapshot that was made; the pool may have told of it already.
    pub fn add_cut(&mut self, name: String) {
        if !self.cuts.contains(&name) {
            self.cuts.push(name);
        }
    }
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
    /// Why the last of them failed.
    pub why: String,
    /// The snapshot of another container that it is a fork of.
    pub fork_of: Option<Snapshot>,
}

impl Doomed {
    pub fn new(snapshots: Vec<String>) -> Self {
        Self { layer: None, snapshots, busy: false, after: None, tries: 0, why: String::new(), fork_of: None }
    }
}

/// A layer whose stream was cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// What came so far.
    pub dataset: Dataset,
    /// Where it was cut.
    pub token: String,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct State {
    pub layers: HashMap<Digest, Layer>,
    /// Nobody receives them now.
    pub parts: BTreeMap<Digest, Part>,
    pub rootfs: HashMap<ContainerId, Rootfs>,
    /// Root file systems that are being made.
    pub making: HashMap<ContainerId, Rootfs>,
    /// Clones for a comparison, which somebody is at.
    pub temporary: BTreeSet<Dataset>,
    pub doomed: BTreeMap<Dataset, Doomed>,
    /// Tagged datasets whose place or name tells nothing: reported, never removed.
    pub odd: BTreeSet<String>,
    /// Not ours.
    pub foreign: BTreeSet<String>,
    /// Objects that a container's clone began with.
    pub objects: HashMap<ContainerId, u64>,
    /// Snapshots for forks that nothing is a fork of.
    pub idle: Vec<Snapshot>,
}

/// What operations change of a [`State`].
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Known {
    layers: HashMap<Digest, Layer>,
    parts: BTreeMap<Digest, Part>,
    rootfs: HashMap<ContainerId, Rootfs>,
    doomed: BTreeSet<Dataset>,
}

impl State {
    pub fn known(&self) -> Known {
        Known {
            layers: self.layers.clone(),
            parts: self.parts.clone(),
            rootfs: self.rootfs.clone(),
            doomed: self.doomed.keys().cloned().collect(),
        }
    }

    /// Whether a container's dataset has to stay for the forks of it, those included that are to be destroyed themselves.
    pub fn has_forks(&self, dataset: &Dataset) -> bool {
        let live = self.all_rootfs().filter_map(|r| r.fork_of.as_ref());
        live.chain(self.doomed.values().filter_map(|d| d.fork_of.as_ref())).any(|of| of.dataset() == dataset)
    }

    fn all_rootfs(&self) -> impl Iterator<Item = &Rootfs> {
        self.rootfs.values().chain(self.making.values())
    }

    /// Those of `chains` that are no other's parents: they keep the rest.
    pub fn uppermost(&self, chains: &[Digest]) -> Vec<Digest> {
        let parents: BTreeSet<&Digest> =
            chains.iter().filter_map(|c| self.layers.get(c).and_then(|l| l.parent.as_ref())).collect();
        chains.iter().filter(|c| !parents.contains(c)).cloned().collect()
    }

    /// Layers that neither `keep` nor a container needs, themselves or as parents.
    pub fn unwanted(&self, keep: &[Digest]) -> Vec<Digest> {
        let mut wanted: BTreeSet<&Digest> = keep.iter().collect();
        wanted.extend(self.all_rootfs().flat_map(|r| r.volumes.iter().chain([&r.top])));
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

/// The value of [`IDMAP`]: "u:CONTAINER:HOST:LENGTH", as many as there are, and "g:..." for groups, commas between.
pub(super) fn idmap_text(user: &UserNamespace) -> String {
    let all = user.uids.iter().map(|m| ('u', m)).chain(user.gids.iter().map(|m| ('g', m)));
    let parts = all.map(|(kind, m)| format!("{kind}:{}:{}:{}", m.container_id, m.host_id, m.length));
    parts.collect::<Vec<_>>().join(",")
}

fn idmap(text: &str) -> Option<UserNamespace> {
    let mut user = UserNamespace { uids: Vec::new(), gids: Vec::new() };
    for part in text.split(',') {
        let mut fields = part.split(':');
        let (kind, mut number) = (fields.next()?, || fields.next()?.parse().ok());
        let map = IdMapping { container_id: number()?, host_id: number()?, length: number()? };
        match (kind, fields.next()) {
            ("u", None) => user.uids.push(map),
            ("g", None) => user.gids.push(map),
            _ => return None,
        }
    }
    (!user.uids.is_empty() && !user.gids.is_empty()).then_some(user)
}

/// The value of [`VOLUMES`].
pub(super) fn volumes_text(volumes: &[Digest]) -> String {
    volumes.iter().map(Digest::hex).collect::<Vec<_>>().join(",")
}

/// A property that need not be there: None if it is there and makes no sense.
fn optional<T>(
    properties: &BTreeMap<String, Value>,
    name: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Option<Option<T>> {
    match properties.get(name).filter(|v| v.source != Source::Elsewhere) {
        None => Some(None),
        Some(value) => read(&value.text).map(Some),
    }
}

fn chain(leaf: &str) -> Option<Digest> {
    format!("sha256:{leaf}").parse().ok()
}

/// Which layer a dataset with a name of [`RECEIVED`] is to become. None: it is none of ours, whatever it begins with.
pub(super) fn received(leaf: &str) -> Option<Digest> {
    let (layer, number) = leaf.strip_prefix(RECEIVED)?.split_at_checked(CHAIN_LEN)?;
    let number = number.strip_prefix('-')?;
    let fits = number.len() == NUMBER_LEN && number.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    chain(layer).filter(|_| fits)
}

/// The layer that a dataset is a clone of, also by way of containers that it is a fork of.
fn layer_below(root: &Dataset, all: &Properties, name: &str) -> Option<Digest> {
    let mut name = name.to_owned();
    // Forks of forks: no chain is longer than there are datasets.
    for _ in 0..all.len() {
        let (dataset, snapshot) = all.get(&name)?.get("origin")?.text.split_once('@')?;
        let origin = dataset.parse::<Dataset>().ok()?;
        match origin.below(root)?.split_once('/')? {
            ("layers", leaf) if snapshot == READY => return chain(leaf),
            ("containers", _) => name = dataset.to_owned(),
            _ => return None,
        }
    }
    None
}

/// Names of a dataset's snapshots, oldest first.
pub(super) fn snapshots_of(dataset: &str, all: &Properties) -> Vec<String> {
    let mut found: Vec<(u64, String)> = all
        .iter()
        .filter_map(|(name, properties)| {
            let snapshot = name.strip_prefix(dataset)?.strip_prefix('@')?;
            let made = properties.get(MADE).and_then(|v| v.text.parse().ok()).unwrap_or_default();
            Some((made, snapshot.to_owned()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, name)| name).collect()
}

/// Makes a state of what `zfs get -r` of `root` told. `owner` is our tag.
pub(super) fn read(root: &Dataset, owner: &str, all: &Properties) -> State {
    let mut state = State::default();
    let mut snapshots: BTreeMap<&str, Vec<(u64, &str)>> = BTreeMap::new();
    for (name, properties) in all {
        if let Some((dataset, snapshot)) = name.split_once('@') {
            let made = properties.get(MADE).and_then(|v| v.text.parse().ok()).unwrap_or_default();
            snapshots.entry(dataset).or_default().push((made, snapshot));
        }
    }
    snapshots.values_mut().for_each(|own| own.sort_unstable());
    for (name, properties) in all.iter().filter(|(name, _)| !name.contains('@')) {
        let Ok(dataset) = name.parse::<Dataset>() else {
            state.foreign.insert(name.clone());
            continue;
        };
        let Some(place) = dataset.below(root) else { continue };
        if matches!(place, "layers" | "containers") {
            continue;
        }
        // What is received has no properties of its own yet. Its name and the place are ours alone.
        let is_received = place.strip_prefix("layers/").is_some_and(|leaf| received(leaf).is_some());
        let tag = properties.get(OWNER).filter(|v| is_received || v.source != Source::Elsewhere);
        if tag.is_none_or(|v| v.text != owner) {
            state.foreign.insert(name.clone());
            continue;
        }
        let own: Vec<&str> =
            snapshots.get(name.as_str()).into_iter().flatten().map(|(_, snapshot)| *snapshot).collect();
        let origin = layer_below(root, all, name);
        match place.split_once('/') {
            Some(("layers", leaf)) if chain(leaf).is_some() => {
                let Some(chain) = chain(leaf) else { continue };
                let ready = all.get(&format!("{name}@{READY}")).filter(|_| own.contains(&READY));
                let told = ready.and_then(|r| {
                    let guid = r.get("guid").map(|v| v.text.clone()).unwrap_or_default();
                    Some((usage(&r.get(USAGE)?.text)?, r.get("referenced")?.text.parse().ok()?, guid))
                });
                match told {
                    Some((usage, referenced, guid)) => {
                        state.layers.insert(chain, Layer { parent: origin, usage, referenced, guid });
                    }
                    // Half made, or half destroyed.
                    None => {
                        let doomed = Doomed::new(own.iter().map(|s| (*s).to_owned()).filter(|s| s == READY).collect());
                        state.doomed.insert(dataset, doomed);
                    }
                }
            }
            Some(("containers", leaf)) if leaf.parse::<ContainerId>().is_ok() => {
                let volumes = |text: &str| text.split(',').map(chain).collect::<Option<Vec<_>>>();
                let (Ok(id), Some(top), Some(user), Some(volumes)) = (
                    leaf.parse::<ContainerId>(),
                    origin,
                    optional(properties, IDMAP, idmap),
                    optional(properties, VOLUMES, volumes),
                ) else {
                    state.odd.insert(name.clone());
                    continue;
                };
                let ours = |s: &&&str| s.starts_with(CUT) || s.starts_with(FORK);
                let cuts: Vec<String> = own.iter().filter(ours).map(|s| (*s).to_owned()).collect();
                let fork_of = properties.get("origin").and_then(|v| v.text.parse::<Snapshot>().ok());
                let fork_of = fork_of.filter(|s| s.name() != READY);
                let forks = cuts.iter().filter(|c| c.starts_with(FORK)).filter_map(|c| dataset.snapshot(c).ok());
                state.idle.extend(forks);
                let volumes = volumes.unwrap_or_default();
                state.rootfs.insert(id, Rootfs { top, cuts, fork_of, user, volumes });
            }
            Some(("layers", leaf)) if is_received => {
                let token = properties.get(RESUME_TOKEN).map(|v| v.text.clone());
                if let (Some(chain), Some(token)) = (received(leaf), token) {
                    // One more of the same layer is what a crash left before it was given up.
                    if let Some(other) = state.parts.insert(chain, Part { dataset, token }) {
                        state.doomed.insert(other.dataset, Doomed::new(Vec::new()));
                    }
                    continue;
                }
                let ready = own.iter().filter(|s| **s == READY).map(|s| (*s).to_owned()).collect();
                state.doomed.insert(dataset, Doomed::new(ready));
            }
            None if place.starts_with("tmp-") => {
                state.doomed.insert(dataset, Doomed::new(Vec::new()));
            }
            _ => {
                state.odd.insert(name.clone());
            }
        }
    }
    let used: BTreeSet<&Snapshot> = state.rootfs.values().filter_map(|r| r.fork_of.as_ref()).collect();
    state.idle.retain(|s| !used.contains(s));
    // A layer whose parent is missing can't be (ZFS would not let it go), so it is not looked for.
    state
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let box_bad = name(&format!("containers/{c}"));
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
            (&box_a, &[(OWNER, "me"), ("origin", &br), (IDMAP, "u:0:100000:65536,g:0:200000:10"), (VOLUMES, &c)]),
            (&box_bad, &[(OWNER, "me"), ("origin", &br), (IDMAP, "u:0:1")]),
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
        let user = rootfs.user.clone().expect("maps");
        assert_eq!((user.uids[0].host_id, user.gids[0].length), (100_000, 10));
        assert_eq!(idmap_text(&user), "u:0:100000:65536,g:0:200000:10");
        assert_eq!(rootfs.volumes, [digest(&c)]);
        assert_eq!(volumes_text(&rootfs.volumes), c);
        assert_eq!(state.uppermost(&[digest(&a), digest(&b)]), [digest(&b)]);
        for bad in ["", "u", "u:0:1:2", "x:0:1:2,g:0:1:2", "u:0:1:2:3,g:0:1:2", "u:0:-1:2,g:0:1:2"] {
            assert!(idmap(bad).is_none(), "{bad}");
        }
        // Maps that can't be read are nothing to guess at.
        assert_eq!(state.odd.iter().collect::<Vec<_>>(), [box_bad.as_str(), "tank/l/other"]);
        assert_eq!(state.unwanted(&[]), Vec::<Digest>::new());
        let mut state = state;
        state.rootfs.clear();
        assert_eq!(state.unwanted(&[digest(&a)]), [digest(&b)]);
        assert_eq!(state.unwanted(&[]).len(), 2);
    }

    #[test]
    fn snapshots_are_in_the_order_they_were_made_in() {
        let id = "a".repeat(64);
        let dataset = format!("tank/l/containers/{id}");
        let (layer, ready) = (format!("tank/l/layers/{id}"), format!("tank/l/layers/{id}@ready"));
        let names = ["lxcri-z", "lxcri-a", "daily", "lxcri-m"].map(|n| format!("{dataset}@{n}"));
        let made: Vec<_> = ["9", "10", "11", "100"].into_iter().map(|n| [(MADE, n)]).collect();
        let mut rows: Vec<(&str, &[(&str, &str)])> =
            names.iter().zip(&made).map(|(name, made)| (name.as_str(), made.as_slice())).collect();
        let of_layer: &[_] = &[("referenced", "1"), (USAGE, "7,8")];
        rows.extend([(ready.as_str(), of_layer), (layer.as_str(), &[(OWNER, "me")])]);
        let own = [(OWNER, "me"), ("origin", ready.as_str())];
        rows.push((&dataset, &own));
        let all = listing(&rows);
        assert_eq!(snapshots_of(&dataset, &all), ["lxcri-z", "lxcri-a", "daily", "lxcri-m"]);
        let state = read(&"tank/l".parse().expect("name"), "me", &all);
        assert_eq!(state.rootfs.values().next().expect("one").cuts, ["lxcri-z", "lxcri-a", "lxcri-m"]);
    }

    #[test]
    fn forks_have_their_sources_layer_and_what_was_half_received_goes() {
        let (a, b, c, d) = ("a".repeat(64), "b".repeat(64), "c".repeat(64), "d".repeat(64));
        let (layer, ready) = (format!("tank/l/layers/{a}"), format!("tank/l/layers/{a}@ready"));
        let place = |id: &str| format!("tank/l/containers/{id}");
        let (source, fork, again) = (place(&b), place(&c), place(&d));
        let (cut, idle) = (format!("{source}@lxcri:fork-1"), format!("{source}@lxcri:fork-2"));
        let second = format!("{fork}@lxcri-x");
        let place_of = |id: &str, n: u8| format!("tank/l/layers/recv-{id}-{n:08x}");
        let received = place_of(&a, 1);
        let half = format!("{received}@ready");
        // Somebody else's, whatever it begins with: it has our tag only from above.
        let others = ["tank/l/layers/recv-1".to_owned(), format!("tank/l/layers/recv-{a}-1/x"), format!("{received}0")];
        let (older, part, ended) = (place_of(&d, 1), place_of(&d, 2), place_of(&c, 3));
        let elsewhere = Value { text: "me".into(), source: Source::Elsewhere };
        let mut all = listing(&[
            (&layer, &[(OWNER, "me")]),
            (&ready, &[("referenced", "100"), (USAGE, "7,8"), ("guid", "5")]),
            (&source, &[(OWNER, "me"), ("origin", &ready)]),
            (&cut, &[]),
            (&idle, &[]),
            (&fork, &[(OWNER, "me"), ("origin", &cut)]),
            (&second, &[]),
            (&again, &[(OWNER, "me"), ("origin", &second)]),
            (&received, &[]),
            (&half, &[]),
            (&others[0], &[]),
            (&others[1], &[]),
            (&others[2], &[]),
            (&older, &[(RESUME_TOKEN, "1-a")]),
            (&part, &[(RESUME_TOKEN, "1-b")]),
            // Its end came, its name did not.
            (&ended, &[]),
        ]);
        for name in [&older, &part, &ended, &received].into_iter().chain(&others) {
            all.get_mut(name).expect("there").insert(OWNER.into(), elsewhere.clone());
        }
        let mut state = read(&"tank/l".parse().expect("name"), "me", &all);
        let id = |text: &str| text.parse::<ContainerId>().expect("id");
        for container in [&b, &c, &d] {
            assert_eq!(state.rootfs[&id(container)].top, chain(&a).expect("digest"), "{container}");
        }
        assert_eq!(state.rootfs[&id(&d)].fork_of.as_ref().map(ToString::to_string), Some(second));
        assert_eq!(state.idle.iter().map(ToString::to_string).collect::<Vec<_>>(), [idle]);
        assert_eq!(state.layers[&chain(&a).expect("digest")].guid, "5");
        assert_eq!(state.foreign, others.into_iter().collect());
        let doomed = [received.as_str(), ended.as_str(), older.as_str()];
        assert_eq!(state.doomed.keys().map(Dataset::as_str).collect::<Vec<_>>(), doomed);
        let kept = Part { dataset: part.parse().expect("name"), token: "1-b".into() };
        assert_eq!(state.parts, BTreeMap::from([(chain(&d).expect("digest"), kept)]));
        let source = source.parse().expect("name");
        assert!(state.has_forks(&source));
        let gone = state.rootfs.remove(&id(&c)).expect("the fork");
        assert!(!state.has_forks(&source));
        let doomed = Doomed { fork_of: gone.fork_of, ..Doomed::new(gone.cuts) };
        state.doomed.insert(fork.parse().expect("name"), doomed);
        assert!(state.has_forks(&source), "one that is to be destroyed counts, too");
    }
}
