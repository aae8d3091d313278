//! Runs plugins: their environment, their input, what they answer. One plugin after another, in chain order or back.
//!
//! Called by `cni` alone. Every run has a deadline and is killed with its process group after it. Fails with
//! [`CniError`] naming network, plugin and verb; what a half-run chain made is the caller's to take back.

use camino::Utf8PathBuf;
use serde_json::{Map, Value};

use super::cache::Attachment;
use super::conf::{NetworkConf, Version};
use super::error::CniError;
use super::result::{self, PluginError};
use crate::core::ports::NetworkRequest;
use crate::utils::process::{Output, Spawn};

/// Plugins call iptables, nft, ip and the like by name.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a plugin is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Check,
    Del,
    Gc,
    Status,
}

impl Verb {
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
            Self::Gc => "GC",
            Self::Status => "STATUS",
        }
    }
}

/// Where plugins are and how long one may take.
#[derive(Debug, Clone)]
pub(super) struct Runner {
    pub folders: Vec<Utf8PathBuf>,
    pub deadline: std::time::Duration,
}

impl Runner {
    fn folders(&self, separator: &str) -> String {
        self.folders.iter().map(|f| f.as_str()).collect::<Vec<_>>().join(separator)
    }

    /// The plugin's program: the first folder that has it. Blocks shortly.
    pub fn find(&self, network: &str, plugin: &str) -> Result<Utf8PathBuf, CniError> {
        let found = self.folders.iter().map(|f| f.join(plugin)).find(|p| p.is_file());
        found.ok_or_else(|| CniError::NoPlugin {
            network: network.to_owned(),
            plugin: plugin.to_owned(),
            folders: self.folders(", "),
        })
    }

    /// The whole chain of ADD; gives the last plugin's result.
    pub async fn add(&self, attachment: &Attachment) -> Result<Value, CniError> {
        let conf = &attachment.conf;
        let mut previous = None;
        for plugin in 0..conf.plugins.len() {
            let input = conf.input(plugin, Some(&attachment.request), previous.as_ref());
            let netns = attachment.request.netns.as_str();
            let output = self.run(Verb::Add, conf, plugin, input, Some((attachment, netns))).await?;
            let result = result::convert(&output.stdout, conf.version).map_err(|why| CniError::Result {
                network: conf.name.clone(),
                plugin: conf.program(plugin).to_owned(),
                why,
            })?;
            previous = Some(result);
        }
        previous.ok_or_else(|| CniError::NoAddress { network: conf.name.clone() })
    }

    /// The whole chain of CHECK.
    pub async fn check(&self, attachment: &Attachment) -> Result<(), CniError> {
        let conf = &attachment.conf;
        for plugin in 0..conf.plugins.len() {
            let input = conf.input(plugin, Some(&attachment.request), attachment.result.as_ref());
            let netns = attachment.request.netns.as_str();
            self.run(Verb::Check, conf, plugin, input, Some((attachment, netns))).await?;
        }
        Ok(())
    }

    /// The whole chain of DEL, backwards. With `all`, a plugin that fails does not save the others from being asked,
    /// and the first failure is told at the end; else it ends there: what a later plugin of the chain still holds
    /// (a port mapping to the address) must not outlive what it points to. `netns` is "" when it is gone.
    pub async fn del(&self, attachment: &Attachment, netns: &str, all: bool) -> Result<(), CniError> {
        let conf = &attachment.conf;
        // Before 0.4.0 DEL has no prevResult.
        let previous = attachment.result.as_ref().filter(|_| conf.version >= Version(0, 4, 0));
        let mut first = Ok(());
        for plugin in (0..conf.plugins.len()).rev() {
            let input = conf.input(plugin, Some(&attachment.request), previous);
            if let Err(e) = self.run(Verb::Del, conf, plugin, input, Some((attachment, netns))).await {
                if !all {
                    return Err(e);
                }
                first = first.and(Err(e));
            }
        }
        first
    }

    /// One plugin, with what the specification's section 2 says.
    pub async fn run(
        &self,
        verb: Verb,
        conf: &NetworkConf,
        plugin: usize,
        input: Map<String, Value>,
        attachment: Option<(&Attachment, &str)>,
    ) -> Result<Output, CniError> {
        let program = conf.program(plugin);
        let path = self.find(&conf.name, program)?;
        let mut spawn = Spawn::new(path, [""; 0])
            .env("PATH", PATH)
            .env("CNI_COMMAND", verb.name())
            .env("CNI_PATH", self.folders(":"))
            .stdin(Value::Object(input).to_string())
            .deadline(self.deadline);
        if let Some((attachment, netns)) = attachment {
            spawn = spawn
                .env("CNI_CONTAINERID", attachment.request.pod.as_str())
                .env("CNI_NETNS", netns)
                .env("CNI_IFNAME", &attachment.ifname)
                .env("CNI_ARGS", arguments(&attachment.request));
        }
        let output = spawn.run().await.map_err(|source| CniError::Run {
            network: conf.name.clone(),
            plugin: program.to_owned(),
            verb: verb.name(),
            source: Box::new(source),
        })?;
        if output.success() {
            return Ok(output);
        }
        let (code, text) = match PluginError::parse(&output.stdout) {
            Some(e) => (e.code, e.text()),
            None => (0, format!("{}, and no error message in its output: {}", output.status, output.stderr)),
        };
        Err(CniError::Plugin { network: conf.name.clone(), plugin: program.to_owned(), verb: verb.name(), code, text })
    }
}

/// CNI_ARGS as Kubernetes plugins expect them. Semicolons separate, so a value can't hold one.
fn arguments(request: &NetworkRequest) -> String {
    let clean = |text: &str| text.replace([';', '\0'], "");
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        clean(&request.namespace),
        clean(&request.name),
        request.pod,
        clean(&request.uid)
    )
}
