//! Pod networks by CNI: the plugins that every Kubernetes network ships, run from the configuration that it installs.
//!
//! Implements [`PodNetwork`] for the engine. Configuration is looked at on each use (a few stats) and read again when
//! it has changed. An attachment is on disk before the first plugin runs and again, with its result, before success is
//! told: DEL uses the configuration of its ADD even when the file has changed, and a crash leaves an attachment that
//! the next DEL or [`PodNetwork::gc`] takes back, leases included. Calls for one pod wait for each other; different
//! pods run side by side. Fails with [`CniError`].

mod cache;
mod conf;
mod embedded;
mod error;
mod exec;
mod result;
mod template;

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::Utf8PathBuf;
use serde_json::{Map, Value, json};

pub use conf::Version;
pub use embedded::{BRIDGE, DEFAULT_SUBNET, embedded_conflist};
pub use error::CniError;

use self::cache::{Attachment, Cache, NetnsId};
use self::conf::{Fingerprint, NetworkConf};
use self::exec::{Runner, Verb};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::PodId;
use crate::core::ports::{NetworkNotReady, NetworkRequest, NetworkResult, PodNetwork};
use crate::integrations::netns;

/// The pod's interface, the name that the kubelet and its tools look for.
const IFNAME: &str = "eth0";
/// How long an answer of STATUS counts. Kubelets ask every few seconds.
const STATUS_FRESH: Duration = Duration::from_secs(15);
/// How long pods wait for a GC of the plugins; then it is broken off.
const GC_PATIENCE: Duration = Duration::from_secs(3);
/// How often GC looks for a moment without an ADD.
const GC_LOOK: Duration = Duration::from_millis(50);
/// Deadline of a STATUS run: the caller's own status waits for it.
const STATUS_DEADLINE: Duration = Duration::from_secs(5);

/// Where configuration, plugins and attachments are.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// Folders of configuration files, first one first (a node: `/etc/cni/net.d`).
    pub conf_dirs: Vec<Utf8PathBuf>,
    /// Folders of plugins, first one first (a node: `/opt/cni/bin`, `/usr/lib/cni`).
    pub plugin_dirs: Vec<Utf8PathBuf>,
    /// Attachments (`<state>/cni`); survives reboots.
    pub cache_dir: Utf8PathBuf,
    /// Longest run of one plugin.
    pub plugin_timeout: Duration,
    /// A conflist for when no configuration file is there at all, see [`embedded_conflist`].
    pub embedded: Option<String>,
    /// A configuration's template, written into the first folder when the pod networks are known and nothing else is there.
    pub template: Option<Utf8PathBuf>,
}

impl CniConfig {
    /// A node's usual folders, 60 s per plugin, nothing embedded.
    pub fn new(cache_dir: impl Into<Utf8PathBuf>) -> Self {
        Self {
            conf_dirs: vec!["/etc/cni/net.d".into()],
            plugin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: cache_dir.into(),
            plugin_timeout: Duration::from_secs(60),
            embedded: None,
            template: None,
        }
    }
}

/// What there is to connect pods with.
#[derive(Debug)]
pub struct Examined {
    /// Name of the network that counts, and the plugins of it that are not there; None: no file can be used.
    pub network: Option<(String, Vec<String>)>,
    /// Files that can't be used, each with its reason.
    pub refused: Vec<String>,
}

/// Looks at configuration and plugins as a pod's ADD would; runs none. Blocks shortly.
pub fn examine(conf_dirs: &[Utf8PathBuf], plugin_dirs: &[Utf8PathBuf]) -> std::io::Result<Examined> {
    let (conf, refused) = Fingerprint::take(conf_dirs)?.first_usable();
    let network = conf.map(|conf| {
        let is_there = |name: &&str| plugin_dirs.iter().any(|dir| dir.join(name).is_file());
        let missing: BTreeSet<String> = conf.programs().filter(|p| !is_there(p)).map(str::to_owned).collect();
        (conf.name.clone(), missing.into_iter().collect())
    });
    Ok(Examined { network, refused })
}

/// The configuration in use and what it was read from.
#[derive(Debug)]
struct Loaded {
    fingerprint: Fingerprint,
    conf: Option<Arc<NetworkConf>>,
    refused: Vec<String>,
}

/// An answer of STATUS, for the configuration that it was asked with.
#[derive(Debug)]
struct Asked {
    conf: Arc<NetworkConf>,
    at: Instant,
    answer: Result<(), String>,
}

/// Pod networks by CNI plugins.
#[derive(Debug)]
pub struct Cni {
    config: CniConfig,
    cache: Cache,
    loaded: Mutex<Option<Arc<Loaded>>>,
    asked: tokio::sync::Mutex<Option<Asked>>,
    /// One lock per pod that something runs for.
    pods: Mutex<HashMap<PodId, Weak<tokio::sync::Mutex<()>>>>,
    /// Pods connected by this process: alive, even if a list for garbage collection was made before them.
    attached: Mutex<BTreeSet<PodId>>,
    /// Held shared by ADD and alone by the plugins' GC, which frees what it is not told of. GC never waits in its queue,
    /// where the next ADD would wait behind it.
    gc: tokio::sync::RwLock<()>,
    /// How many ADDs wait for a GC.
    held_up: tokio::sync::watch::Sender<usize>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section is one assignment or lookup: a panic in it can't leave half a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs what touches the disk beside the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(format!("disk work of the network: {e}")))
}

impl Cni {
    /// Nothing is read or run yet.
    pub fn new(config: CniConfig) -> Arc<Self> {
        Arc::new(Self {
            cache: Cache(config.cache_dir.clone()),
            config,
            loaded: Mutex::default(),
            asked: tokio::sync::Mutex::default(),
            pods: Mutex::default(),
            attached: Mutex::default(),
            gc: tokio::sync::RwLock::default(),
            held_up: tokio::sync::watch::Sender::new(0),
        })
    }

    fn runner(&self) -> Runner {
        Runner { folders: self.config.plugin_dirs.clone(), deadline: self.config.plugin_timeout }
    }

    async fn lock(&self, pod: &PodId) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut pods = locked(&self.pods);
            pods.retain(|_, lock| lock.strong_count() > 0);
            match pods.get(pod).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    pods.insert(pod.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }

    fn is_busy(&self, pod: &PodId) -> bool {
        locked(&self.pods).get(pod).is_some_and(|lock| lock.strong_count() > 0)
    }

    /// The configuration as it is now; NotConfigured says which folders and files were looked at.
    async fn conf(&self) -> Result<Arc<NetworkConf>, CniError> {
        let folders = self.config.conf_dirs.clone();
        let known = locked(&self.loaded).clone();
        let fallback = self.config.embedded.clone();
        let names = || self.config.conf_dirs.iter().map(|f| f.as_str()).collect::<Vec<_>>().join(", ");
        let read = move || {
            let fingerprint = Fingerprint::take(&folders)?;
            if let Some(known) = known
                && known.fingerprint == fingerprint
            {
                return Ok((known, false));
            }
            let (mut conf, mut refused) = fingerprint.first_usable();
            if fingerprint == Fingerprint::default()
                && let Some(text) = fallback
            {
                match NetworkConf::parse(text.as_bytes(), true, "the embedded configuration") {
                    Ok(own) => conf = Some(own),
                    Err(why) => refused.push(format!("the embedded configuration: {why}")),
                }
            }
            Ok((Arc::new(Loaded { fingerprint, conf: conf.map(Arc::new), refused }), true))
        };
        let (loaded, fresh) = match blocking(read).await {
            Ok(read) => read.map_err(|source| CniError::Folders { folders: names(), source })?,
            Err(e) => return Err(CniError::NotConfigured(e.to_string())),
        };
        if fresh {
            for why in &loaded.refused {
                tracing::warn!(why, "CNI configuration file skipped");
            }
            if let Some(conf) = &loaded.conf {
                tracing::info!(network = conf.name, version = %conf.version, source = conf.source, "CNI network");
            }
            *locked(&self.loaded) = Some(Arc::clone(&loaded));
        }
        loaded.conf.clone().ok_or_else(|| {
            let mut message = format!("no CNI configuration in {}", names());
            if !loaded.refused.is_empty() {
                message = format!("no usable CNI configuration in {}: {}", names(), loaded.refused.join("; "));
            }
            CniError::NotConfigured(message)
        })
    }

    /// What plugins say themselves, from 1.1.0 on.
    async fn ask_status(&self, conf: &Arc<NetworkConf>) -> Result<(), String> {
        if conf.version < Version(1, 1, 0) {
            return Ok(());
        }
        let mut asked = self.asked.lock().await;
        if let Some(last) = asked.as_ref()
            && Arc::ptr_eq(&last.conf, conf)
            && last.at.elapsed() < STATUS_FRESH
        {
            return last.answer.clone();
        }
        let runner = Runner { deadline: STATUS_DEADLINE.min(self.config.plugin_timeout), ..self.runner() };
        let mut answer = Ok(());
        for plugin in 0..conf.plugins.len() {
            if let Err(e) = runner.run(Verb::Status, conf, plugin, conf.input(plugin, None, None), None).await {
                answer = Err(Error::from(e).chain());
                break;
            }
        }
        // A failure is asked about again at once: nodes become ready by it.
        *asked = answer.is_ok().then(|| Asked { conf: Arc::clone(conf), at: Instant::now(), answer: answer.clone() });
        answer
    }

    async fn try_status(&self) -> Result<(), String> {
        let conf = self.conf().await.map_err(|e| Error::from(e).chain())?;
        let (runner, named) = (self.runner(), Arc::clone(&conf));
        let found = blocking(move || named.programs().try_for_each(|p| runner.find(&named.name, p).map(|_| ()))).await;
        found.map_err(|e| e.chain())?.map_err(|e| e.to_string())?;
        self.ask_status(&conf).await
    }

    async fn load(&self, pod: &PodId) -> Result<Option<Attachment>> {
        let (cache, pod) = (self.cache.clone(), pod.clone());
        Ok(blocking(move || cache.read(&pod)).await??)
    }

    async fn store(&self, attachment: &Attachment) -> Result<()> {
        let (cache, attachment) = (self.cache.clone(), attachment.clone());
        Ok(blocking(move || cache.write(&attachment)).await??)
    }

    async fn store_result(&self, pod: &PodId, result: &Value) -> Result<()> {
        let (cache, pod, result) = (self.cache.clone(), pod.clone(), result.clone());
        Ok(blocking(move || cache.write_result(&pod, &result)).await??)
    }

    async fn forget(&self, pod: &PodId) -> Result<()> {
        let (cache, pod) = (self.cache.clone(), pod.clone());
        Ok(blocking(move || cache.remove(&pod)).await??)
    }

    async fn netns_id(&self, request: &NetworkRequest) -> Result<Option<NetnsId>> {
        let path = request.netns.clone();
        blocking(move || cache::netns_id(&path)).await
    }

    async fn try_add(&self, request: &NetworkRequest) -> Result<NetworkResult> {
        let here = self.netns_id(request).await?;
        if here.is_none() {
            return Err(Error::precondition(format!("no network namespace is pinned at {}", request.netns)));
        }
        let lo = netns::lo_up(&request.netns).await;
        lo.map_err(|source| CniError::Loopback { netns: request.netns.clone(), source })?;
        if let Some(known) = self.load(&request.pod).await? {
            if let Some(result) = &known.result
                && known.netns == here
                && known.request == *request
            {
                return Ok(NetworkResult { ips: self.addresses(&known, result)? });
            }
            // The work of an ADD that did not end, or of a namespace that is gone: taken back before a new one.
            self.disconnect(&known, true).await?;
        }
        let conf = self.conf().await?;
        let mut attachment = Attachment::new(request, IFNAME, here, &conf);
        self.store(&attachment).await?;
        let added = match self.runner().add(&attachment).await {
            Ok(result) => {
                let ips = self.addresses(&attachment, &result);
                let kept = match ips {
                    Ok(ips) => self.store_result(&request.pod, &result).await.map(|()| NetworkResult { ips }),
                    Err(e) => Err(e.into()),
                };
                attachment.result = Some(result);
                kept
            }
            Err(e) => Err(e.into()),
        };
        if added.is_err()
            && let Err(e) = self.disconnect(&attachment, true).await
        {
            // The attachment stays on disk: the next DEL or garbage collection tries again.
            tracing::warn!(pod = %request.pod, error = e.chain(), "a failed network ADD could not be taken back");
        }
        added
    }

    fn addresses(&self, attachment: &Attachment, result: &Value) -> Result<Vec<std::net::IpAddr>, CniError> {
        let network = attachment.conf.name.clone();
        match result::addresses(result, &attachment.ifname) {
            Ok(ips) if ips.is_empty() => Err(CniError::NoAddress { network }),
            Ok(ips) => Ok(ips),
            Err(why) => {
                let plugin = attachment.conf.program(attachment.conf.plugins.len() - 1).to_owned();
                Err(CniError::Result { network, plugin, why })
            }
        }
    }

    /// DEL of the chain and, when that went well, the end of the attachment.
    async fn disconnect(&self, attachment: &Attachment, all: bool) -> Result<()> {
        let netns = match self.netns_id(&attachment.request).await? {
            // Another namespace at the same path is not the one that was connected.
            Some(id) if attachment.netns.as_ref().is_none_or(|known| *known == id) => attachment.request.netns.as_str(),
            _ => "",
        };
        self.runner().del(attachment, netns, all || netns.is_empty()).await?;
        self.forget(&attachment.request.pod).await
    }

    async fn try_del(&self, request: &NetworkRequest) -> Result<()> {
        let Some(attachment) = self.load(&request.pod).await? else {
            // ADD writes its attachment first, so there was none, or its file is lost: then the present
            // configuration is the best there is, and no reason to keep a pod from ending.
            let Ok(conf) = self.conf().await else { return Ok(()) };
            let here = self.netns_id(request).await?;
            let netns = if here.is_some() { request.netns.as_str() } else { "" };
            let attachment = Attachment::new(request, IFNAME, here.clone(), &conf);
            if let Err(e) = self.runner().del(&attachment, netns, true).await {
                tracing::warn!(pod = %request.pod, error = Error::from(e).chain(), "network DEL without an attachment");
            }
            return Ok(());
        };
        match self.disconnect(&attachment, false).await {
            // Nothing of it can be reached any more; what a plugin still holds is left to garbage collection.
            Err(e) if self.netns_id(&attachment.request).await?.is_none() => {
                tracing::warn!(pod = %request.pod, error = e.chain(), "network DEL failed after the namespace was gone");
                Ok(())
            }
            other => other,
        }
    }

    /// Attachments of pods that are gone.
    async fn collect(&self, live: &BTreeSet<PodId>) -> Result<()> {
        let cache = self.cache.clone();
        let mut first = Ok(());
        for pod in blocking(move || cache.pods()).await?? {
            if live.contains(&pod) || self.is_busy(&pod) || locked(&self.attached).contains(&pod) {
                continue;
            }
            let _lock = self.lock(&pod).await;
            if locked(&self.attached).contains(&pod) {
                continue; // connected while we waited
            }
            let done = match self.load(&pod).await {
                Ok(Some(attachment)) => self.disconnect(&attachment, true).await,
                Ok(None) => Ok(()),
                Err(e) => Err(e),
            };
            match done {
                Ok(()) => tracing::info!(%pod, "network attachment of a pod that is gone taken back"),
                Err(e) => {
                    first = first.and(Err(e.context(format!("take back the network of pod {pod}, which is gone"))))
                }
            }
        }
        first
    }

    /// GC of the plugins, from 1.1.0 on: everything that no living pod has may go.
    async fn ask_gc(&self, live: &mut BTreeSet<PodId>) -> Result<()> {
        // Without a configuration there is nobody to ask.
        let Ok(conf) = self.conf().await else { return Ok(()) };
        if conf.version < Version(1, 1, 0) || conf.disable_gc {
            return Ok(());
        }
        let _no_add = self.no_add().await?;
        live.extend(locked(&self.attached).iter().cloned());
        let valid: Vec<Value> = live.iter().map(|pod| json!({"containerID": pod, "ifname": IFNAME})).collect();
        let work = async {
            let mut first = Ok(());
            for plugin in 0..conf.plugins.len() {
                let mut input: Map<String, Value> = conf.input(plugin, None, None);
                input.insert("cni.dev/valid-attachments".into(), json!(valid));
                if let Err(e) = self.runner().run(Verb::Gc, &conf, plugin, input, None).await {
                    first = first.and(Err(Error::from(e)));
                }
            }
            first
        };
        tokio::select! {
            done = work => done,
            () = self.pressed() => Err(Error::new(
                Kind::Aborted,
                format!("network {:?}: GC took more than {GC_PATIENCE:?} while pods wait to be connected", conf.name),
            )),
        }
    }

    /// A moment without ADDs. One that hangs must not make others wait, so this looks again and again.
    async fn no_add(&self) -> Result<tokio::sync::RwLockWriteGuard<'_, ()>> {
        let end = Instant::now() + self.config.plugin_timeout;
        loop {
            match self.gc.try_write() {
                Ok(alone) => return Ok(alone),
                Err(_) if Instant::now() < end => tokio::time::sleep(GC_LOOK).await,
                Err(_) => return Err(Error::new(Kind::Unavailable, "pods are being connected all the time: no GC")),
            }
        }
    }

    /// For an ADD: no GC, or the end of one.
    async fn no_gc(&self) -> tokio::sync::RwLockReadGuard<'_, ()> {
        if let Ok(shared) = self.gc.try_read() {
            return shared;
        }
        let _waiting = HeldUp::new(&self.held_up);
        self.gc.read().await
    }

    /// An ADD has waited for GC for long enough.
    async fn pressed(&self) {
        let mut waiting = self.held_up.subscribe();
        // The sender is ours: it is there.
        let _ = waiting.wait_for(|n| *n > 0).await;
        tokio::time::sleep(GC_PATIENCE).await;
    }
}

/// An ADD that waits for GC.
struct HeldUp<'a>(&'a tokio::sync::watch::Sender<usize>);

impl<'a> HeldUp<'a> {
    fn new(count: &'a tokio::sync::watch::Sender<usize>) -> Self {
        count.send_modify(|n| *n += 1);
        Self(count)
    }
}

impl Drop for HeldUp<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

#[async_trait]
impl PodNetwork for Cni {
    async fn status(&self) -> Result<(), NetworkNotReady> {
        let not_ready = |message| NetworkNotReady { reason: "NetworkPluginNotReady".into(), message };
        self.try_status().await.map_err(not_ready)
    }

    async fn add(&self, request: &NetworkRequest) -> Result<NetworkResult> {
        let _no_gc = self.no_gc().await;
        let _lock = self.lock(&request.pod).await;
        let result = self.try_add(request).await?;
        locked(&self.attached).insert(request.pod.clone());
        Ok(result)
    }

    async fn check(&self, request: &NetworkRequest) -> Result<()> {
        let _lock = self.lock(&request.pod).await;
        let Some(attachment) = self.load(&request.pod).await?.filter(|a| a.result.is_some()) else {
            return Err(CniError::NotAttached(request.pod.to_string()).into());
        };
        if attachment.netns != self.netns_id(&attachment.request).await? {
            return Err(Error::precondition(format!("the network namespace {} is gone", attachment.request.netns)));
        }
        // Before 0.4.0 there is no CHECK.
        if attachment.conf.version < Version(0, 4, 0) || attachment.conf.disable_check {
            return Ok(());
        }
        Ok(self.runner().check(&attachment).await?)
    }

    async fn del(&self, request: &NetworkRequest) -> Result<()> {
        let _lock = self.lock(&request.pod).await;
        // From here on garbage collection may finish what fails now.
        locked(&self.attached).remove(&request.pod);
        self.try_del(request).await
    }

    async fn gc(&self, live: &[PodId]) -> Result<()> {
        let mut live: BTreeSet<PodId> = live.iter().cloned().collect();
        let done = self.collect(&live).await;
        done.and(self.ask_gc(&mut live).await)
    }

    async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<()> {
        let (Some(template), Some(folder)) = (self.config.template.clone(), self.config.conf_dirs.first().cloned())
        else {
            return Ok(());
        };
        let cidrs = cidrs.to_vec();
        let named = folder.clone();
        if !blocking(move || template::write(&template, &folder, &cidrs)).await?? {
            tracing::info!(folder = %named, "a network is configured there already: the template is not used");
        }
        Ok(())
    }
}
