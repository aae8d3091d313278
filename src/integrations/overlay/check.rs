//! Whether layers are what was unpacked: each is summed up soon after its commit, in the background, and again by `storage check`.
//!
//! The sum lies beside the layer (`sum`), so that it goes with it. A layer without one (of an older version, or whose daemon ended
//! before) is summed up by the next check. Changes nothing but that.

use std::sync::Arc;

use camino::Utf8Path;

use super::{Inner, blocking, state};
use crate::core::error::{Error, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Claims, StorageReport};
use crate::integrations::layers::sum;
use crate::utils::atomic::{self, Durability};

/// The file beside a layer.
const SUM: &str = "sum";

fn read(path: &Utf8Path) -> Option<Digest> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn write(path: &Utf8Path, sum: &Digest) -> Result<()> {
    atomic::write(path.as_std_path(), format!("{sum}\n").as_bytes(), 0o600, Durability::Process)
        .map_err(|e| Error::io(format!("writing {path}"), e))
}

/// Sums a layer up that was committed just now, while its files are in memory. What fails is done by the next check.
pub(super) fn sum_later(store: &Arc<Inner>, chain: &Digest) {
    let (inner, chain) = (store.clone(), chain.clone());
    store.tasks.spawn(format!("sum of layer {chain}"), async move {
        let _turn = inner.summing.lock().await;
        let (folder, cancelled) = (inner.layer_folder(&chain), inner.tasks.token().clone());
        let done = blocking(move || {
            match sum::of(folder.join("fs").as_std_path(), &|| !cancelled.is_cancelled()) {
                Ok(Some(sum)) => write(&folder.join(SUM), &sum),
                Ok(None) => Ok(()),
                // It is gone again.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(e) => Err(Error::io(format!("reading layer {chain}"), e)),
            }
        });
        if let Err(error) = done.await {
            tracing::debug!(error = error.chain(), "a layer is not summed up yet");
        }
    });
}

pub(super) async fn check(store: &Arc<Inner>, claims: &(dyn Fn() -> Claims + Send + Sync)) -> Result<StorageReport> {
    // Containers come and go meanwhile: what is to be there is what was before and is still.
    let before = claims();
    let layers: Vec<Digest> = store.state().layers.keys().cloned().collect();
    let rootfs: Vec<_> = store.state().rootfs.keys().cloned().collect();
    let mut report = StorageReport::default();
    report.notes.push(format!("{} layers, {} root file systems", layers.len(), rootfs.len()));
    let now = claims();
    for container in rootfs.iter().filter(|c| !before.has(c) && !now.has(c)) {
        report.problems.push(format!("root file system of {container}: there is no such container"));
    }
    for container in before.whole.iter().filter(|c| now.whole.contains(c) && !rootfs.contains(c)) {
        report.problems.push(format!("container {container} has no root file system"));
    }
    let inner = store.clone();
    let (problems, fresh) = blocking(move || inner.sums(&layers)).await?;
    report.problems.extend(problems);
    if fresh > 0 {
        report
            .notes
            .push(format!("{fresh} layers had no sum: they have one now, and are compared from the next check on"));
    }
    let set_aside = state::names(&store.root.join("quarantine"))?.len();
    if set_aside > 0 {
        report.notes.push(format!("{set_aside} set aside in {}/quarantine: they can be deleted", store.root));
    }
    Ok(report)
}

impl Inner {
    /// Compares each layer with its sum: what is wrong, and how many had none.
    fn sums(&self, layers: &[Digest]) -> Result<(Vec<String>, usize)> {
        let (mut problems, mut fresh) = (Vec::new(), 0);
        let cancelled = self.tasks.token().clone();
        for chain in layers {
            let folder = self.layer_folder(chain);
            let got = match sum::of(folder.join("fs").as_std_path(), &|| !cancelled.is_cancelled()) {
                Ok(Some(sum)) => sum,
                Ok(None) => return Err(Error::new(crate::core::error::Kind::Aborted, "the daemon ends")),
                // Removed meanwhile, or by somebody else.
                Err(_) if !self.state().layers.contains_key(chain) => continue,
                Err(e) => {
                    problems.push(format!("layer {chain} can't be read: {e}"));
                    continue;
                }
            };
            match read(&folder.join(SUM)) {
                Some(kept) if kept == got => {}
                Some(_) => problems.push(format!(
                    "layer {chain} is not what was unpacked: remove the images and containers that have it, and pull again"
                )),
                None => {
                    write(&folder.join(SUM), &got)?;
                    fresh += 1;
                }
            }
        }
        Ok((problems, fresh))
    }
}
