//! Makes a manifest into an image: config checked, layers downloaded and unpacked side by side, then the record.
//!
//! Called by pulls and loads, once per manifest however many ask. Layers that are there are not read again. On failure
//! nothing new is listed; layers that were completed stay until the next collection, so that a retry goes on from there.
//! A crash leaves the same.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Inner;
use super::manifest::{self, Descriptor, LayerEntry};
use super::record::{LayerRecord, Record};
use super::source::Source;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::Usage;
use crate::core::progress::PullProgress;
use crate::fail_point;
use crate::integrations::layers::pipeline::{self, Expected, digest_of};
use crate::integrations::registry::MAX_CONFIG;

/// An image that is to be made.
pub(super) struct Plan {
    pub source: Arc<dyn Source>,
    /// Config, and its content if it is known.
    pub config: Descriptor,
    pub config_bytes: Option<Bytes>,
    pub layers: Vec<LayerEntry>,
    /// Manifests and indexes to keep.
    pub manifests: Vec<(Digest, Bytes)>,
    /// What the image is called.
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// Ends the downloads.
    pub cancel: CancellationToken,
    /// Tells how far they are.
    pub progress: Arc<PullProgress>,
}

struct LayerJob {
    source: Arc<dyn Source>,
    entry: LayerEntry,
    diff_id: Digest,
    chain: Digest,
    parent: Option<(Digest, watch::Receiver<bool>)>,
    progress: Arc<PullProgress>,
}

fn parent_failed(chain: &Digest) -> Error {
    Error::new(Kind::Aborted, format!("layer {chain}: its parent layer failed"))
}

impl Inner {
    /// See the module's words. Answers with the image's id.
    pub(super) async fn assemble(self: &Arc<Self>, plan: Plan) -> Result<Digest> {
        let config_bytes = match &plan.config_bytes {
            Some(bytes) => bytes.clone(),
            None => plan.source.blob(&plan.config, MAX_CONFIG).await?,
        };
        let (config, diff_ids) = manifest::parse_config(&config_bytes, plan.layers.len(), &self.platform)?;
        let chains = manifest::chain_ids(&diff_ids);
        let lease = self.lease(&chains).await;
        let usages = match self.fetch_layers(&plan, &diff_ids, &chains).await {
            Ok(usages) => usages,
            Err(error) => {
                // Whole layers serve the next try; but not where they are what fills the disk.
                drop(lease);
                if error.kind() == Kind::ResourceExhausted
                    && let Err(left) = self.collect_layers().await
                {
                    tracing::warn!(error = left.chain(), "layers of a pull that filled the disk stay for now");
                }
                return Err(error);
            }
        };
        let id = digest_of(&config_bytes);
        let layers = usages
            .into_iter()
            .zip(chains.iter().zip(&diff_ids))
            .map(|(usage, (chain, diff_id))| LayerRecord { chain: chain.clone(), diff_id: diff_id.clone(), usage })
            .collect();
        let now = super::now_ns();
        let record = Record {
            id: id.clone(),
            repo_tags: plan.repo_tags,
            repo_digests: plan.repo_digests,
            manifests: plan.manifests.iter().map(|(digest, _)| digest.clone()).collect(),
            layers,
            config,
            pinned: false,
            pulled_at: now,
            changed_at: now,
        };
        let mut blobs = plan.manifests;
        blobs.push((id.clone(), config_bytes));
        fail_point!("image.layers");
        self.commit(record, blobs).await?;
        Ok(id)
    }

    async fn fetch_layers(self: &Arc<Self>, plan: &Plan, diff_ids: &[Digest], chains: &[Digest]) -> Result<Vec<Usage>> {
        plan.progress.begin(plan.layers.iter().map(|l| (l.descriptor.digest.clone(), l.descriptor.size)));
        let permits = Arc::new(Semaphore::new(self.config.max_concurrent_downloads.max(1)));
        let mut jobs: JoinSet<(usize, Result<Usage>)> = JoinSet::new();
        let mut usages = vec![Usage::default(); chains.len()];
        let mut first_error: Option<Error> = None;
        let mut note = |done: Option<Result<(usize, Result<Usage>), tokio::task::JoinError>>,
                        first: &mut Option<Error>| {
            let error = match done {
                Some(Ok((n, Ok(usage)))) => {
                    usages[n] = usage;
                    return;
                }
                Some(Ok((_, Err(e)))) => e,
                Some(Err(e)) => Error::because(Kind::Internal, "a layer's task ended", e),
                None => return,
            };
            plan.cancel.cancel();
            // What failed because something else failed says less.
            if first.as_ref().is_none_or(|f| f.kind() == Kind::Aborted) {
                *first = Some(error);
            }
        };
        let mut parent: Option<(Digest, watch::Receiver<bool>)> = None;
        for (n, ((entry, diff_id), chain)) in plan.layers.iter().zip(diff_ids).zip(chains).enumerate() {
            // Permits are given in order, so a layer's parent always has one before it: no layer waits for ever.
            let permit = loop {
                tokio::select! {
                    permit = permits.clone().acquire_owned() => break permit,
                    done = jobs.join_next(), if !jobs.is_empty() => note(done, &mut first_error),
                }
            };
            if first_error.is_some() {
                break;
            }
            let (done, ready) = watch::channel(false);
            let job = LayerJob {
                source: plan.source.clone(),
                entry: entry.clone(),
                diff_id: diff_id.clone(),
                chain: chain.clone(),
                parent: parent.replace((chain.clone(), ready)),
                progress: plan.progress.clone(),
            };
            let store = self.clone();
            jobs.spawn(async move {
                let (progress, digest) = (job.progress.clone(), job.entry.descriptor.digest.clone());
                let result = store.fetch_layer(job).await;
                if result.is_ok() {
                    progress.finish(&digest);
                    done.send_replace(true);
                }
                drop(permit);
                (n, result)
            });
        }
        while !jobs.is_empty() {
            note(jobs.join_next().await, &mut first_error);
        }
        match first_error {
            Some(e) => Err(e),
            None => Ok(usages),
        }
    }

    async fn fetch_layer(&self, job: LayerJob) -> Result<Usage> {
        let _turn = self.turns.take(&job.chain).await;
        if self.layers.has(&job.chain).await? {
            return Ok(self.layers.layer_usage(&job.chain).unwrap_or_default());
        }
        if !self.layers.parallel_unpack()
            && let Some((_, ready)) = &job.parent
        {
            ready.clone().wait_for(|done| *done).await.map_err(|_| parent_failed(&job.chain))?;
        }
        let (mut after, mut last) = (None, None);
        loop {
            let descriptor = &job.entry.descriptor;
            let Some(bytes) = job.source.layer(descriptor, after).await? else {
                let none = || Error::not_found(format!("layer {}: no place has it", descriptor.digest));
                return Err(last.unwrap_or_else(none));
            };
            let blob = job.source.has_blob_digests().then(|| (descriptor.digest.clone(), descriptor.size));
            let expected = Expected { blob, diff_id: job.diff_id.clone() };
            let (reader, verifier) =
                pipeline::open(bytes.reader, job.entry.compression, expected, &self.config.unpacker);
            let verifier = Arc::new(verifier);
            let verify = {
                let (verifier, parent, chain) = (verifier.clone(), job.parent.clone(), job.chain.clone());
                let runtime = tokio::runtime::Handle::current();
                move || {
                    verifier.verify()?;
                    if let Some((_, mut ready)) = parent {
                        runtime.block_on(ready.wait_for(|done| *done)).map_err(|_| parent_failed(&chain))?;
                    }
                    Ok(())
                }
            };
            let parent = job.parent.as_ref().map(|(chain, _)| chain);
            let error = match self.layers.apply(parent, &job.chain, Box::new(reader), Box::new(verify)).await {
                Ok(usage) => return Ok(usage),
                Err(error) => error,
            };
            let cause = match bytes.failure.take() {
                Some(cause) => Some(cause),
                // Content that makes no sense may be a damaged download.
                None if matches!(error.kind(), Kind::InvalidArgument | Kind::Internal) => {
                    let check = tokio::task::spawn_blocking(move || verifier.verify_blob());
                    let damaged = check.await.ok().and_then(Result::err);
                    damaged.map(|mismatch| bytes.failure.take().unwrap_or_else(|| mismatch.into()))
                }
                None => None,
            };
            let Some(cause) = cause else { return Err(error.context(format!("layer {}", descriptor.digest))) };
            if cause.kind() == Kind::Aborted {
                return Err(cause);
            }
            tracing::warn!(layer = %descriptor.digest, from = bytes.from, error = cause.chain(), "layer failed");
            let cause = cause.context(format!("layer {} from {}", descriptor.digest, bytes.from));
            (after, last) = (Some(bytes.place), Some(cause));
        }
    }
}
