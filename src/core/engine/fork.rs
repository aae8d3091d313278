//! `pod fork`: a new local pod whose containers begin with the files that another pod's have at one moment.
//!
//! Called by `cri` for our own command line. The new sandbox is made first, so that the old pod's containers are frozen for
//! no longer than the driver takes for a cut. What is taken over: the containers' configuration with the environment, and
//! the pod's, but for its name and uid, addresses, host ports, cgroup and limits of the pod as a whole. Volumes are the same
//! folders as before: a cut is of root file systems. Processes begin anew. Goes on when the caller goes away; on failure
//! nothing is left. A crash leaves a local pod with some of the containers, for the user to remove, and a cut that the
//! driver takes away at the next start.

use std::collections::BTreeMap;
use std::sync::Arc;

use camino::Utf8PathBuf;
use tokio::sync::oneshot;

use super::pod::{Base, Command};
use super::{Engine, Scope};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::{ContainerId, PodId};
use crate::core::records::{ContainerRecord, PodRecord};
use crate::core::spec::{ContainerConfig, NamespaceMode, Owner, PodMetadata, Resources, SandboxConfig};
use crate::core::state::ContainerPhase;

/// Says in the new pod's annotations which pod it is a fork of.
const FORK_OF: &str = "proxmox-lxcri/fork-of";
/// Longest hostname, and longest name that may be asked for.
const HOSTNAME_MAX: usize = 63;

/// What is wanted.
#[derive(Debug, Clone, Default)]
pub struct Fork {
    /// A cut of the pod; None: as it is now.
    pub cut: Option<String>,
    /// Name of the new pod; None: made from the old one's.
    pub name: Option<String>,
    /// Folder for the new containers' logs; None: no logs.
    pub log_directory: Option<Utf8PathBuf>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forked {
    /// The new pod.
    pub pod: PodId,
    /// Its containers, in the order of the old ones.
    pub containers: Vec<ContainerId>,
}

impl Engine {
    /// Makes a fork of a pod: of its containers that run or, if none does, of all (the last one of each name). Those are
    /// started. InvalidArgument for a name that is no DNS label,
    /// FailedPrecondition when an image is gone or an environment is not known any more, NotFound for an unknown
    /// cut, Unimplemented where the driver has no forks.
    pub async fn fork_pod(&self, scope: Scope, pod: &str, fork: Fork) -> Result<Forked> {
        if let Some(name) = &fork.name {
            fitting(name)?;
        }
        let record = self.pod(scope, pod)?;
        let (engine, told) = (self.clone(), format!("fork of pod {}", record.id.short()));
        let (answer, answered) = oneshot::channel();
        self.shared.tasks.spawn(told.clone(), async move {
            let done = engine.fork(scope, &record, fork).await.map_err(|e| e.context(told));
            if let Err(unclaimed) = answer.send(done) {
                tracing::info!(forked = unclaimed.is_ok(), "nobody waited for a pod's fork");
            }
        });
        answered.await.unwrap_or_else(|_| Err(Error::new(Kind::Aborted, "the daemon ends")))
    }

    async fn fork(&self, scope: Scope, pod: &Arc<PodRecord>, fork: Fork) -> Result<Forked> {
        let mut sources = chosen(self.cut_of(scope, pod.id.as_str())?);
        let layers = &self.shared.ports.layers;
        if let Some(cut) = &fork.cut {
            // A container that is newer than the cut is not of it.
            let mut of_cut = Vec::new();
            for c in sources {
                if layers.rootfs_snapshots(&c.id).await?.contains(cut) {
                    of_cut.push(c);
                }
            }
            sources = of_cut;
            if sources.is_empty() {
                return Err(Error::not_found(format!("it has no snapshot {cut:?}")));
            }
        }
        let mut configs = Vec::new();
        for c in &sources {
            configs
                .push(self.config_again(pod, c).await.map_err(|e| e.context(format!("container {}", c.id.short())))?);
        }
        let ids: Vec<ContainerId> = sources.iter().map(|c| c.id.clone()).collect();
        // Of no container: a driver without forks says so before a sandbox is made for nothing.
        layers.fork_point(&[], None).await?;
        let new = self.run_sandbox(Owner::Local, sandbox(pod, &fork), &pod.handler).await?;
        let point = match &fork.cut {
            Some(cut) => layers.fork_point(&ids, Some(cut)).await,
            None => self.frozen(scope, pod.id.as_str(), &sources, layers.fork_point(&ids, None)).await,
        };
        let done = match &point {
            Ok(point) => self.make_forks(&new, &sources, configs, point).await,
            Err(_) => Ok(Vec::new()),
        };
        match (point, done) {
            (Ok(_), Ok(containers)) => Ok(Forked { pod: new, containers }),
            (point, done) => {
                if let Err(e) = self.remove_sandbox(Scope::Local, new.as_str()).await {
                    tracing::error!(pod = new.as_str(), error = e.chain(), "a failed fork left a pod behind");
                }
                if let Ok(point) = &point
                    && let Err(e) = layers.drop_fork_point(&ids, point).await
                {
                    tracing::warn!(error = e.chain(), "a failed fork's cut stays until the next start");
                }
                Err(point.err().or(done.err()).unwrap_or_else(|| Error::internal("no reason")))
            }
        }
    }

    /// Makes the containers, then starts them.
    async fn make_forks(
        &self,
        pod: &PodId,
        sources: &[Arc<ContainerRecord>],
        configs: Vec<ContainerConfig>,
        point: &str,
    ) -> Result<Vec<ContainerId>> {
        let handle = self.shared.index().find_pod(Scope::Local, pod.as_str())?.map(|(_, handle)| handle);
        let handle = handle.ok_or_else(|| Error::new(Kind::Aborted, "the new pod was removed meanwhile"))?;
        let mut made: BTreeMap<&str, ContainerId> = BTreeMap::new();
        let mut ids = Vec::new();
        for (source, mut config) in sources.iter().zip(configs) {
            let target = &mut config.security.namespaces.target;
            if let Some(old) = target.take() {
                *target = made.get(old.as_str()).map(ToString::to_string);
                if target.is_none() {
                    return Err(Error::precondition(format!(
                        "container {:?} is in the PID namespace of {old}, which the fork has not",
                        config.name
                    )));
                }
            }
            let base = Base::Fork { of: source.id.clone(), point: point.to_owned() };
            // A container has to run before another one joins its PID namespace.
            let id =
                handle.ask(|reply| Command::CreateContainer { config: Box::new(config.clone()), base, reply }).await?;
            self.start_container(Scope::Local, id.as_str()).await?;
            made.insert(source.id.as_str(), id.clone());
            ids.push(id);
        }
        Ok(ids)
    }

    /// How a container was asked for, with what is in no record.
    async fn config_again(&self, pod: &PodRecord, container: &ContainerRecord) -> Result<ContainerConfig> {
        let mut config = container.config.clone();
        let id = container.image_id.to_string();
        if self.shared.ports.images.resolve(&id).is_none() {
            return Err(Error::precondition(format!("its image {id} is not here any more")));
        }
        if config.image.user_specified_image.is_empty() {
            config.image.user_specified_image = std::mem::take(&mut config.image.image);
        }
        // A tag may be another image's by now.
        config.image.image = id;
        config.attempt = 0;
        if !config.envs.is_empty() {
            let run_dir = self.shared.run_dir(&pod.id, &container.id);
            let all = self.shared.backend(&pod.handler)?.environment(pod, &run_dir).await?;
            let values: BTreeMap<&str, &str> = all.iter().filter_map(|line| line.split_once('=')).collect();
            for env in &mut config.envs {
                let value = values.get(env.name.as_str());
                let value = value.ok_or_else(|| Error::internal(format!("variable {:?} has no value", env.name)))?;
                env.value = (*value).to_owned();
            }
        }
        Ok(config)
    }
}

/// Refuses a new pod's name that is no DNS label (RFC 1123), as which it is the pod's hostname and in folders' names.
fn fitting(name: &str) -> Result<()> {
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    let ends = !name.starts_with('-') && !name.ends_with('-');
    if name.is_empty() || name.len() > HOSTNAME_MAX || !ends || !name.bytes().all(inner) {
        let told: String = name.chars().take(HOSTNAME_MAX).collect();
        return Err(Error::invalid(format!(
            "a fork's name {told:?}: it has to be lower case letters, digits and '-', {HOSTNAME_MAX} at most"
        )));
    }
    Ok(())
}

/// Of each name the last one; of these those that run, or all.
fn chosen(containers: Vec<Arc<ContainerRecord>>) -> Vec<Arc<ContainerRecord>> {
    let mut last: Vec<Arc<ContainerRecord>> = Vec::new();
    for c in containers {
        last.retain(|known| known.config.name != c.config.name);
        last.push(c);
    }
    let runs = |c: &Arc<ContainerRecord>| c.phase == ContainerPhase::Running;
    if last.iter().any(runs) {
        last.retain(runs);
    }
    last
}

/// The new pod's configuration.
fn sandbox(pod: &PodRecord, fork: &Fork) -> SandboxConfig {
    let mut config = pod.config.clone();
    let uid = uuid::Uuid::new_v4().simple().to_string();
    let name = fork.name.clone().unwrap_or_else(|| format!("{}-fork-{}", config.metadata.name, &uid[..6]));
    if !config.hostname.is_empty() && config.security.namespaces.network != NamespaceMode::Node {
        config.hostname = name.chars().take(HOSTNAME_MAX).collect();
    }
    config.metadata = PodMetadata { name, uid, namespace: config.metadata.namespace, attempt: 0 };
    config.log_directory = fork.log_directory.clone();
    // The node's ports are the old pod's, as are its cgroup and what a kubelet counts for it.
    config.port_mappings.retain(|p| p.host_port == 0);
    config.cgroup_parent.clear();
    (config.resources, config.overhead) = (Resources::default(), Resources::default());
    config.annotations.insert(FORK_OF.into(), pod.id.to_string());
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forks_name_is_a_dns_label() {
        let longest = "n".repeat(63);
        for good in ["a", "0", "then-2", longest.as_str()] {
            fitting(good).expect(good);
        }
        let long = "n".repeat(64);
        for bad in ["", "-a", "a-", "a b", "A", "a_b", "a.b", "../x", "a/b", "x\ny", "ä", long.as_str()] {
            assert_eq!(fitting(bad).expect_err(bad).kind(), Kind::InvalidArgument, "{bad:?}");
        }
    }
}
