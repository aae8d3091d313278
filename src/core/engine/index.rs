//! What is known of all pods, in memory: the source of every list and status. Written only by the pods' tasks.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::pod::PodHandle;
use crate::core::error::{Error, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::ports::{Claims, Monitor};
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::{Owner, PodMetadata};
use crate::core::state::{ContainerPhase, PodPhase};

/// Whose pods a caller sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those made through the CRI socket.
    Cri,
    /// All.
    Local,
}

impl Scope {
    pub(super) fn sees(self, owner: Owner) -> bool {
        self == Self::Local || owner == Owner::Cri
    }
}

struct Entry {
    handle: PodHandle,
    record: Arc<PodRecord>,
    containers: BTreeMap<ContainerId, Arc<ContainerRecord>>,
    monitor: Option<Arc<dyn Monitor>>,
    unclaimed: bool,
    /// How often its task has panicked.
    panics: u32,
}

/// The index.
#[derive(Default)]
pub(super) struct Index {
    pods: BTreeMap<PodId, Entry>,
    owners: BTreeMap<ContainerId, PodId>,
    names: HashMap<(bool, PodMetadata), PodId>,
    /// Root file systems that are no container's, for as long as something is made of them.
    copies: BTreeSet<ContainerId>,
}

fn name_key(owner: Owner, metadata: &PodMetadata) -> (bool, PodMetadata) {
    (owner == Owner::Local, metadata.clone())
}

impl Index {
    pub(super) fn insert(&mut self, record: &PodRecord, containers: &[Arc<ContainerRecord>], handle: PodHandle) {
        // A task that panicked has left an entry.
        let panics = self.pods.get(&record.id).map_or(0, |e| e.panics);
        self.remove(&record.id);
        // What is left of a failed create holds no name, also when an earlier daemon left it.
        if record.phase == PodPhase::Creating || record.facts.is_some() {
            self.names.insert(name_key(record.owner, &record.config.metadata), record.id.clone());
        }
        for c in containers {
            self.owners.insert(c.id.clone(), record.id.clone());
        }
        let entry = Entry {
            handle,
            record: Arc::new(record.clone()),
            containers: containers.iter().map(|c| (c.id.clone(), c.clone())).collect(),
            monitor: None,
            unclaimed: false,
            panics,
        };
        self.pods.insert(record.id.clone(), entry);
    }

    pub(super) fn remove(&mut self, id: &PodId) {
        if let Some(entry) = self.pods.remove(id) {
            self.release_name(&entry.record);
            for c in entry.containers.keys() {
                self.owners.remove(c);
            }
        }
    }

    /// Frees the pod's name for the next sandbox of that name.
    pub(super) fn release_name(&mut self, record: &PodRecord) {
        let key = name_key(record.owner, &record.config.metadata);
        if self.names.get(&key) == Some(&record.id) {
            self.names.remove(&key);
        }
    }

    pub(super) fn publish_pod(&mut self, record: &PodRecord) {
        if let Some(entry) = self.pods.get_mut(&record.id) {
            entry.record = Arc::new(record.clone());
        }
    }

    pub(super) fn publish_container(&mut self, record: &Arc<ContainerRecord>) {
        if let Some(entry) = self.pods.get_mut(&record.pod) {
            entry.containers.insert(record.id.clone(), record.clone());
            self.owners.insert(record.id.clone(), record.pod.clone());
        }
    }

    pub(super) fn forget_container(&mut self, pod: &PodId, id: &ContainerId) {
        if let Some(entry) = self.pods.get_mut(pod) {
            entry.containers.remove(id);
        }
        self.owners.remove(id);
    }

    pub(super) fn set_monitor(&mut self, pod: &PodId, monitor: Option<Arc<dyn Monitor>>) {
        if let Some(entry) = self.pods.get_mut(pod) {
            entry.monitor = monitor;
        }
    }

    /// The pod was made, but nobody waited for it.
    pub(super) fn set_unclaimed(&mut self, pod: &PodId) {
        if let Some(entry) = self.pods.get_mut(pod) {
            entry.unclaimed = true;
        }
    }

    /// Whether the pod was unclaimed; from now on it is not.
    pub(super) fn claim(&mut self, pod: &PodId) -> bool {
        self.pods.get_mut(pod).is_some_and(|e| std::mem::take(&mut e.unclaimed))
    }

    pub(super) fn by_name(&self, owner: Owner, metadata: &PodMetadata) -> Option<&PodId> {
        self.names.get(&name_key(owner, metadata))
    }

    pub(super) fn phase_and_handle(&self, id: &PodId) -> Option<(PodPhase, PodHandle)> {
        self.pods.get(id).map(|e| (e.record.phase, e.handle.clone()))
    }

    /// Marks the pod as one whose task panicked; how often it did.
    pub(super) fn count_panic(&mut self, id: &PodId) -> u32 {
        self.pods.get_mut(id).map_or(0, |e| {
            e.panics += 1;
            e.panics
        })
    }

    pub(super) fn panics(&self, id: &PodId) -> u32 {
        self.pods.get(id).map_or(0, |e| e.panics)
    }

    /// The local pod of that name, whatever its uid: people call it by its name.
    pub(super) fn local_by_name(&self, metadata: &PodMetadata) -> Option<&PodId> {
        let same = |m: &PodMetadata| m.name == metadata.name && m.namespace == metadata.namespace;
        self.names.iter().find(|((local, m), _)| *local && same(m)).map(|(_, id)| id)
    }

    pub(super) fn monitor(&self, pod: &PodId) -> Option<Arc<dyn Monitor>> {
        self.pods.get(pod).and_then(|e| e.monitor.clone())
    }

    pub(super) fn pod(&self, id: &PodId) -> Option<Arc<PodRecord>> {
        self.pods.get(id).map(|e| e.record.clone())
    }

    pub(super) fn container(&self, id: &ContainerId) -> Option<Arc<ContainerRecord>> {
        self.pods.get(self.owners.get(id)?)?.containers.get(id).cloned()
    }

    pub(super) fn handle(&self, pod: &PodId) -> Option<&PodHandle> {
        self.pods.get(pod).map(|e| &e.handle)
    }

    pub(super) fn find_pod(&self, scope: Scope, id: &str) -> Result<Option<(PodId, PodHandle)>> {
        let seen = |id: &PodId| self.pods.get(id).is_some_and(|e| scope.sees(e.record.owner));
        let found = by_prefix(id, "pod sandbox", self.pods.keys().filter(|k| k.as_str().starts_with(id) && seen(k)))?;
        Ok(found.and_then(|k| self.pods.get(&k).map(|e| (k.clone(), e.handle.clone()))))
    }

    pub(super) fn find_container(&self, scope: Scope, id: &str) -> Result<Option<(ContainerId, PodHandle)>> {
        let handle_of = |c: &ContainerId| {
            let entry = self.pods.get(self.owners.get(c)?)?;
            scope.sees(entry.record.owner).then(|| entry.handle.clone())
        };
        let hits = self.owners.keys().filter(|k| k.as_str().starts_with(id) && handle_of(k).is_some());
        Ok(by_prefix(id, "container", hits)?.and_then(|k| handle_of(&k).map(|h| (k, h))))
    }

    /// Every pod, those being created included: what garbage collection must not touch.
    pub(super) fn all_pods(&self) -> Vec<PodRecord> {
        self.pods.values().map(|e| PodRecord::clone(&e.record)).collect()
    }

    pub(super) fn all_container_ids(&self) -> Vec<ContainerId> {
        self.owners.keys().cloned().collect()
    }

    /// Notes a root file system that is to be made beside the containers' own.
    pub(super) fn begin_copy(&mut self, id: &ContainerId) {
        self.copies.insert(id.clone());
    }

    /// It is gone again, or about to.
    pub(super) fn end_copy(&mut self, id: &ContainerId) {
        self.copies.remove(id);
    }

    /// Who has a root file system, and who may have one.
    pub(super) fn claims(&self) -> Claims {
        let mut claims = Claims { half: self.copies.clone(), ..Claims::default() };
        for (id, pod) in &self.owners {
            let phase = self.pods.get(pod).and_then(|e| e.containers.get(id)).map(|c| c.phase);
            match phase {
                Some(ContainerPhase::Created | ContainerPhase::Running | ContainerPhase::Exited) => {
                    claims.whole.insert(id.clone())
                }
                Some(ContainerPhase::Creating | ContainerPhase::Removing) | None => claims.half.insert(id.clone()),
            };
        }
        claims
    }

    pub(super) fn pods(&self, scope: Scope) -> Vec<Arc<PodRecord>> {
        let shown = |e: &&Entry| scope.sees(e.record.owner) && e.record.phase != PodPhase::Creating;
        let mut all: Vec<_> = self.pods.values().filter(shown).map(|e| e.record.clone()).collect();
        all.sort_by_key(|r| r.created_at);
        all
    }

    pub(super) fn containers(&self, scope: Scope) -> Vec<Arc<ContainerRecord>> {
        let entries = self.pods.values().filter(|e| scope.sees(e.record.owner));
        let shown = |c: &&Arc<ContainerRecord>| c.phase != ContainerPhase::Creating;
        let mut all: Vec<_> = entries.flat_map(|e| e.containers.values()).filter(shown).cloned().collect();
        all.sort_by_key(|r| r.created_at);
        all
    }
}

impl Index {
    /// How many pods and containers there are.
    pub(super) fn len(&self) -> usize {
        self.pods.len() + self.owners.len()
    }

    /// A pod's containers, oldest first.
    pub(super) fn containers_of(&self, pod: &PodId) -> Vec<Arc<ContainerRecord>> {
        let Some(entry) = self.pods.get(pod) else { return Vec::new() };
        let shown = |c: &&Arc<ContainerRecord>| c.phase != ContainerPhase::Creating;
        let mut all: Vec<_> = entry.containers.values().filter(shown).cloned().collect();
        all.sort_by_key(|r| r.created_at);
        all
    }
}

/// The one id that starts with `prefix`, as crictl shortens them; two are an error, an exact hit wins.
fn by_prefix<'a, K: Clone + AsRef<str> + 'a>(
    prefix: &str,
    what: &str,
    mut hits: impl Iterator<Item = &'a K>,
) -> Result<Option<K>> {
    if prefix.is_empty() {
        return Err(Error::invalid(format!("the id of a {what} is missing")));
    }
    let first = hits.next();
    match (first, hits.next()) {
        (Some(_), Some(_)) => Err(Error::invalid(format!("more than one {what} begins with {prefix:?}"))),
        (hit, _) => Ok(hit.cloned()),
    }
}
