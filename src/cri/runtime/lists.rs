//! Lists and statuses, with the CRI's filters; all from memory.

use std::collections::BTreeMap;

use crate::api::v1;
use crate::core::error::Result;
use crate::core::records::ContainerRecord;
use crate::cri::{Front, to_wire};

pub(super) fn labels_match(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// A filter's id may be shortened, as everywhere.
pub(super) fn id_matches(wanted: &str, id: &str) -> bool {
    wanted.is_empty() || id.starts_with(wanted)
}

impl Front {
    pub(super) fn list_pods(&self, filter: Option<v1::PodSandboxFilter>) -> Vec<v1::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let state = filter.state.map(|s| s.state);
        self.engine
            .pods(self.scope)
            .iter()
            .filter(|p| id_matches(&filter.id, p.id.as_str()))
            .filter(|p| state.is_none_or(|s| s == i32::from(to_wire::pod_state(p.phase))))
            .filter(|p| labels_match(&filter.label_selector, &p.config.labels))
            .map(|p| to_wire::pod(p))
            .collect()
    }

    pub(super) fn list_cris(&self, filter: Option<v1::ContainerFilter>) -> Vec<v1::Container> {
        let filter = filter.unwrap_or_default();
        let state = filter.state.map(|s| s.state);
        self.engine
            .containers(self.scope)
            .iter()
            .filter(|c| id_matches(&filter.id, c.id.as_str()))
            .filter(|c| id_matches(&filter.pod_sandbox_id, c.pod.as_str()))
            .filter(|c| state.is_none_or(|s| s == i32::from(to_wire::container_state(c.phase))))
            .filter(|c| labels_match(&filter.label_selector, &c.config.labels))
            .map(|c| to_wire::container(c))
            .collect()
    }

    pub(super) fn pod_status(&self, id: &str, verbose: bool) -> Result<v1::PodSandboxStatusResponse> {
        // Taken first: a kubelet that listens to events keeps the state with the later time, so that a state may be
        // newer than its time and never older.
        let timestamp = self.engine.clock().now_ns();
        let pod = self.engine.pod(self.scope, id)?;
        let containers = self.engine.containers(self.scope);
        let mut answer = v1::PodSandboxStatusResponse {
            status: Some(to_wire::pod_status(&pod)),
            // Newest first: the kubelet takes the first of a name for the present one (with EventedPLEG it does not sort).
            containers_statuses: containers
                .iter()
                .rev()
                .filter(|c| c.pod == pod.id)
                .map(|c| to_wire::container_status(c))
                .collect(),
            timestamp,
            ..Default::default()
        };
        if verbose {
            let info = serde_json::json!({
                "monitorPid": self.engine.monitor_pid(&pod.id),
                "netns": pod.facts.as_ref().and_then(|f| f.netns.as_ref()),
                "cgroupParent": pod.facts.as_ref().map(|f| &f.cgroup_parent),
                "owner": pod.owner,
                "handler": pod.handler,
                "phase": pod.phase,
                "panics": self.engine.pod_panics(&pod.id),
                "resources": pod.config.resources,
                "overhead": pod.config.overhead,
            });
            answer.info.insert("info".into(), info.to_string());
        }
        Ok(answer)
    }

    pub(super) fn container_info(&self, container: &ContainerRecord) -> String {
        let run_dir = self.engine.container_run_dir(container);
        serde_json::json!({
            "sandboxID": container.pod,
            "pid": container.pid,
            "phase": container.phase,
            "runDir": run_dir,
            "user": container.user,
            "quota": container.quota,
        })
        .to_string()
    }
}
