//! What the node says of itself: Version, Status, RuntimeConfig.

use serde_json::json;

use crate::api::v1;
use crate::core::config::CgroupDriver;
use crate::cri::Front;

/// Version of the runtime API that is spoken.
const API_VERSION: &str = "v1";

pub(super) fn version() -> v1::VersionResponse {
    v1::VersionResponse {
        version: "0.1.0".into(),
        runtime_name: "proxmox-lxcri".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: API_VERSION.into(),
    }
}

fn condition(name: &str, failure: Option<(String, String)>) -> v1::RuntimeCondition {
    let status = failure.is_none();
    let (reason, message) = failure.unwrap_or_default();
    v1::RuntimeCondition { r#type: name.into(), status, reason, message }
}

impl Front {
    pub(super) async fn node_status(&self, verbose: bool) -> v1::StatusResponse {
        let backends = self.engine.backends();
        let (mut runtime, mut network) = (None, None);
        if let Some(default) = backends.first() {
            runtime = default.probe().await.err().map(|e| ("RuntimeNotReady".to_string(), e.chain()));
            network = default.network_status().await.err().map(|e| (e.reason, e.message));
        }
        // A store that can't work leaves nothing to run; one that is nearly full is the kubelet's to relieve.
        let trouble = self.engine.layers().trouble();
        if let Some(t) = trouble.as_ref().filter(|t| t.blocks) {
            runtime = runtime.or_else(|| Some((t.reason.clone(), t.message.clone())));
        }
        let storage = trouble.map(|t| (t.reason, t.message));
        let weakness = self.engine.layers().weakness().map(|w| (w.reason, w.message));
        let handler = |name: &str, c: crate::core::backend::Capabilities| v1::RuntimeHandler {
            name: name.into(),
            features: Some(v1::RuntimeHandlerFeatures {
                recursive_read_only_mounts: c.recursive_read_only_mounts,
                user_namespaces: c.user_namespaces,
            }),
        };
        // The handler of pods that name none is listed under its own name and under "".
        let unnamed = backends.first().map(|b| handler("", b.capabilities()));
        let handlers = unnamed.into_iter().chain(backends.iter().map(|b| handler(b.handler(), b.capabilities())));
        let mut answer = v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![
                    condition("RuntimeReady", runtime),
                    condition("NetworkReady", network),
                    condition("StorageReady", storage),
                    condition("UnpackingConfined", weakness),
                ],
            }),
            runtime_handlers: handlers.collect(),
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: true,
                mount_options: true,
                ..Default::default()
            }),
            ..Default::default()
        };
        if verbose {
            let config = serde_json::to_string(&*self.config).unwrap_or_default();
            answer.info.insert("config".into(), config);
            let counts = json!({
                "pods": self.engine.pods(self.scope).len(),
                "containers": self.engine.containers(self.scope).len(),
                "images": self.engine.images().list().len(),
                "layerDriver": self.engine.layers().driver(),
            });
            answer.info.insert("counts".into(), counts.to_string());
            for (name, value) in self.info.iter() {
                answer.info.insert(name.clone(), value.to_string());
            }
        }
        answer
    }

    pub(super) fn node_runtime_config(&self) -> v1::RuntimeConfigResponse {
        let driver = match self.cgroup_driver {
            CgroupDriver::Systemd => v1::CgroupDriver::Systemd,
            CgroupDriver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
        };
        v1::RuntimeConfigResponse { linux: Some(v1::LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) }
    }
}
