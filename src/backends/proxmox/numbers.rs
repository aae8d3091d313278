//! Numbers (VMIDs): which are free, which a pod of this node has or is about to ask for, and of which nobody knows yet.
//!
//! Called by the backends when they make and remove guests. The API reserves nothing: of two who want one number one gets it, and the
//! other takes the next. What no answer came of may be done yet, for as long as Proxmox may take to begin, and would meet the next
//! guest of that number: there is none for as long. A crash forgets this, and leaves the pods' journals: whatever they name is in doubt
//! for as long after the start.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{Guests, locked};
use crate::core::backend::Journal;
use crate::core::error::{Error, Kind, Result};
use crate::core::records::{PodRecord, Resource};
use crate::integrations::proxmox_api::{ApiError, ErrorKind, Vmid};

/// How many numbers are tried that somebody else turns out to have.
const COLLISIONS: usize = 20;

/// A number about whose guest an answer has not come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unsure {
    /// Until when what was asked for may be done yet: so long no other pod gets the number.
    until: Instant,
    /// It was a making, and its guest was not seen yet.
    making: bool,
}

impl Guests {
    /// Numbers that nobody has, in order. Each that is taken out of it is kept from all others of this node.
    pub async fn free(&self) -> Result<impl DoubleEndedIterator<Item = Vmid>> {
        let taken: BTreeSet<Vmid> = self.api.guests().await.map_err(Error::from)?.iter().map(|g| g.vmid).collect();
        let (first, last) = self.vmids;
        let all = (first.get()..=last.get()).filter_map(|n| Vmid::new(n.into()).ok());
        // Others of this node are under way with the same list.
        Ok(all.filter(move |vmid| !taken.contains(vmid) && self.reserve(*vmid)))
    }

    /// No number is free for `what`.
    pub fn none_free(&self, what: &str) -> Error {
        let ((first, last), handler) = (self.vmids, self.unit.handler);
        let what = format!("no number from {first} to {last} is free for {what} (handlers.{handler}.vmids)");
        Error::new(Kind::ResourceExhausted, what)
    }

    /// Has a pod's guest made by `make`, with a number that is in the journal before; the API's error, if it is not for the number.
    pub async fn claim<Made: Future<Output = Result<(), ApiError>>>(
        &self,
        pod: &PodRecord,
        journal: &mut dyn Journal,
        make: impl Fn(Vmid) -> Made,
    ) -> Result<Result<Vmid, ApiError>> {
        let mut said = None;
        for vmid in self.free().await?.take(COLLISIONS) {
            if let Err(e) = journal.note(vec![Resource { kind: self.unit.note.into(), name: vmid.to_string() }]).await {
                self.release(vmid);
                return Err(e);
            }
            locked(&self.asked).insert(vmid.get());
            match make(vmid).await {
                Err(e) if *e.kind() == ErrorKind::AlreadyExists => {
                    tracing::info!(pod = pod.id.as_str(), %vmid, why = %e, "the number is taken: the next one");
                    said = Some(e);
                    journal.note(vec![Resource { kind: self.unit.taken.into(), name: vmid.to_string() }]).await?;
                }
                made => return Ok(made.map(|()| vmid)),
            }
        }
        let word = self.unit.word;
        Err(match said {
            Some(e) => {
                super::failed(e).context(format!("no {word} could be made: the numbers that were tried are taken"))
            }
            None => self.none_free(&format!("a {word}")),
        })
    }

    /// Keeps the number from all others of this node; false: it is taken, or may not be given yet.
    pub fn reserve(&self, vmid: Vmid) -> bool {
        let mut unsure = locked(&self.unsure);
        unsure.retain(|_, u| u.until > Instant::now());
        !unsure.contains_key(&vmid.get()) && locked(&self.given).insert(vmid.get())
    }

    /// The number is given, to a pod of an earlier daemon.
    pub fn keep(&self, vmid: Vmid) {
        locked(&self.given).insert(vmid.get());
    }

    /// It is nobody's any more.
    pub fn release(&self, vmid: Vmid) {
        locked(&self.given).remove(&vmid.get());
        locked(&self.asked).remove(&vmid.get());
    }

    /// Takes note of a change of that number's guest that has failed, `making`: its making. What no answer came of may be done yet.
    pub fn failed(&self, vmid: Vmid, e: &ApiError, making: bool) {
        if e.is_uncertain() {
            self.doubt(vmid, making);
        }
    }

    /// The same of one whose answer nobody has waited for.
    pub fn doubt(&self, vmid: Vmid, making: bool) {
        let now = Instant::now();
        let mut unsure = locked(&self.unsure);
        let before = unsure.get(&vmid.get()).is_some_and(|u| u.making && u.until > now);
        unsure.insert(vmid.get(), Unsure { until: now + self.api.patience(), making: making || before });
    }

    /// How long a pod's guest of that number may come into being yet.
    pub(super) fn in_doubt(&self, pod: &PodRecord, vmid: Vmid) -> Option<Duration> {
        let until = match locked(&self.unsure).get(&vmid.get()) {
            Some(unsure) => Some(unsure.until).filter(|_| unsure.making),
            // An earlier process may have asked for it in its last moment.
            None if pod.facts.is_none() && !locked(&self.asked).contains(&vmid.get()) => {
                Some(self.since + self.api.patience())
            }
            None => None,
        }?;
        Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// The guest is there: it is made no second time.
    pub fn is_made(&self, vmid: Vmid) {
        if let Some(u) = locked(&self.unsure).get_mut(&vmid.get()) {
            u.making = false;
        }
    }
}
