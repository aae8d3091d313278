//! Pulls from registries: one per manifest however many ask, in a task that outlives its callers.
//!
//! Called by the store. What a tag means is asked for by each caller with its own credentials; only then do callers of
//! the same digest share the work. Fails with errors that name reference, host and blob; see `assemble` for what stays.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::assemble::Plan;
use super::manifest::{self, Manifest};
use super::source::RegistrySource;
use super::verify::Subject;
use super::{Inner, MAX_NESTING, lock};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, RegistryAuth};
use crate::core::progress::{PullProgress, PullView};
use crate::core::reference::Reference;
use crate::integrations::registry::{ManifestBytes, Session};

/// How long a pull under way may take to end when the daemon does.
const LAST: Duration = Duration::from_secs(3);

/// How a pull ended, for all who wait.
pub(super) type PullResult = Result<Digest, Arc<Error>>;

impl Inner {
    pub(super) async fn pull_reference(
        self: &Arc<Self>,
        reference: &Reference,
        auth: Option<&RegistryAuth>,
        view: &PullView,
    ) -> Result<Arc<Image>> {
        // With a digest the tag is decoration: it may mean something else by now.
        let tags = if reference.digest().is_some() { Vec::new() } else { reference.tagged().into_iter().collect() };
        // Under this very name the content can't have changed. Under another one the registry has to be asked, or
        // whoever knows a digest could pull from a repository that it may not read.
        let unseen = self.admits_unseen(reference).await?;
        if reference.digest().is_some()
            && unseen
            && let Some(id) = self.find(&reference.to_string())
        {
            return self.by_id(&id);
        }
        let session = Arc::new(self.registry.session(reference, auth)?);
        let top = session.manifest(reference.digest()).await?;
        let size = top.bytes.len() as u64;
        self.admit(&Subject { reference, digest: &top.digest, size, media_type: &top.media_type }, auth).await?;
        let digests = vec![reference.digested(&top.digest)];
        if let Some(id) = self.by_manifest(&top.digest) {
            return self.add_names(&id, tags, digests).await;
        }
        let id = self.join_pull(session, top, tags.clone(), digests.clone(), view).await?;
        self.add_names(&id, tags, digests).await
    }

    /// Waits for the pull of this manifest, which is begun unless it is under way.
    async fn join_pull(
        self: &Arc<Self>,
        session: Arc<Session>,
        top: ManifestBytes,
        tags: Vec<String>,
        digests: Vec<String>,
        view: &PullView,
    ) -> Result<Digest> {
        let digest = top.digest.clone();
        let mut result = {
            let mut pulls = lock(&self.pulls);
            match pulls.get(&digest) {
                Some((running, progress)) => {
                    view.show(progress);
                    running.clone()
                }
                None => {
                    let (sender, receiver) = watch::channel(None);
                    let progress = Arc::<PullProgress>::default();
                    view.show(&progress);
                    pulls.insert(digest.clone(), (receiver.clone(), progress.clone()));
                    let running = Running { store: self.clone(), digest: digest.clone() };
                    self.tasks.spawn(format!("pull {digest}"), async move {
                        // Layers are broken off in order; a registry that does not even answer is not waited for.
                        let done = tokio::select! {
                            done = running.store.pull_manifest(session, top, tags, digests, progress) => done,
                            () = running.store.tasks.overdue(LAST) => {
                                Err(Error::new(Kind::Aborted, "the daemon ends"))
                            }
                        };
                        let done = done.map_err(Arc::new);
                        // First gone, then told: who asks after the answer begins anew.
                        drop(running);
                        sender.send_replace(Some(done));
                    });
                    receiver
                }
            }
        };
        let done = result.wait_for(Option::is_some).await.map(|done| done.clone());
        match done {
            Ok(Some(Ok(id))) => Ok(id),
            Ok(Some(Err(e))) => Err(shared(&e)),
            _ => Err(Error::internal(format!("pull of {digest} ended without a result"))),
        }
    }

    async fn pull_manifest(
        self: &Arc<Self>,
        session: Arc<Session>,
        top: ManifestBytes,
        repo_tags: Vec<String>,
        repo_digests: Vec<String>,
        progress: Arc<PullProgress>,
    ) -> Result<Digest> {
        let mut kept = vec![(top.digest.clone(), top.bytes.clone())];
        let mut document = manifest::parse(&top.bytes, &top.media_type)?;
        let mut nesting = 0;
        let (config, layers) = loop {
            match document {
                Manifest::Image(config, layers) => break (config, layers),
                Manifest::Index(entries) => {
                    nesting += 1;
                    if nesting > MAX_NESTING {
                        return Err(Error::invalid("indexes are nested too deep"));
                    }
                    let entry = manifest::choose(&entries, &self.platform)?;
                    let next = session.manifest(Some(&entry.descriptor.digest)).await?;
                    document = manifest::parse(&next.bytes, &next.media_type)?;
                    kept.push((next.digest, next.bytes));
                }
            }
        };
        let cancel = self.tasks.token().child_token();
        let (tasks, counted) = (self.tasks.clone(), progress.clone());
        let source = Arc::new(RegistrySource { session, tasks, cancel: cancel.clone(), progress: counted });
        let manifests = kept;
        let plan =
            Plan { source, config, config_bytes: None, layers, manifests, repo_tags, repo_digests, cancel, progress };
        self.assemble(plan).await
    }
}

/// One failure for each of several callers.
fn shared(e: &Error) -> Error {
    let message = e.to_string();
    match e.chain().strip_prefix(&message).and_then(|rest| rest.strip_prefix(": ")) {
        Some(causes) => Error::because(e.kind(), message, causes),
        None => Error::new(e.kind(), message),
    }
}

/// A pull under way; dropped when it ends, however it does.
struct Running {
    store: Arc<Inner>,
    digest: Digest,
}

impl Drop for Running {
    fn drop(&mut self) {
        lock(&self.store.pulls).remove(&self.digest);
    }
}
