//! How far a pull is: written by who fetches, read by who shows it, at any time and without waiting.
//!
//! One for each pull under way, shared by all who asked for it. Numbers may be a moment old.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::ids::Digest;

/// A layer of a pull.
#[derive(Debug)]
pub struct LayerProgress {
    /// Digest of its blob.
    pub digest: Digest,
    /// Its bytes, as the manifest has it.
    pub total: u64,
    fetched: AtomicU64,
    done: AtomicBool,
}

impl LayerProgress {
    /// Bytes that came so far.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// It is in the store, fetched or not.
    pub fn done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }
}

/// A pull; without layers until its manifest is known.
#[derive(Debug, Default)]
pub struct PullProgress(OnceLock<Vec<LayerProgress>>);

impl PullProgress {
    /// The layers, base first.
    pub fn layers(&self) -> &[LayerProgress] {
        self.0.get().map_or(&[], Vec::as_slice)
    }

    /// Says which layers there are, once.
    pub fn begin(&self, layers: impl Iterator<Item = (Digest, u64)>) {
        let new = |(digest, total)| LayerProgress { digest, total, fetched: 0.into(), done: false.into() };
        // A second time changes nothing.
        let _ = self.0.set(layers.map(new).collect());
    }

    fn layer(&self, digest: &Digest) -> Option<&LayerProgress> {
        self.layers().iter().find(|l| l.digest == *digest)
    }

    /// The layer begins, anew if it had begun.
    pub fn start(&self, digest: &Digest) {
        if let Some(layer) = self.layer(digest) {
            layer.fetched.store(0, Ordering::Relaxed);
        }
    }

    /// More bytes of it came.
    pub fn add(&self, digest: &Digest, bytes: u64) {
        if let Some(layer) = self.layer(digest) {
            layer.fetched.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// It is in the store.
    pub fn finish(&self, digest: &Digest) {
        for layer in self.layers().iter().filter(|l| l.digest == *digest) {
            layer.done.store(true, Ordering::Relaxed);
        }
    }
}

/// Where one who asked for a pull finds how far it is, once it is known which pull that is.
#[derive(Debug, Default)]
pub struct PullView(OnceLock<std::sync::Arc<PullProgress>>);

impl PullView {
    /// The pull; None: not yet, or nothing had to be fetched.
    pub fn get(&self) -> Option<&PullProgress> {
        self.0.get().map(std::sync::Arc::as_ref)
    }

    /// Shows `pull`.
    pub fn show(&self, pull: &std::sync::Arc<PullProgress>) {
        let _ = self.0.set(pull.clone());
    }
}
