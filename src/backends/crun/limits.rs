//! New limits of a container: one call of the OCI runtime. A crash after it leaves the limits changed.

use camino::Utf8Path;

use super::{CrunBackend, PATH};
use crate::backends::oci::linux;
use crate::core::backend::UpdateContext;
use crate::core::error::{Error, Kind, Result};
use crate::utils::atomic::{self, Durability};
use crate::utils::process::Spawn;

impl CrunBackend {
    pub(super) async fn change_limits(&self, update: UpdateContext<'_>) -> Result<()> {
        let UpdateContext { pod, container, run_dir, asked, merged } = update;
        let id = container.id.as_str();
        let limits = linux::update(asked, merged, &self.pods.host_now(merged))?;
        let text = serde_json::to_vec(&limits).map_err(|e| Error::because(Kind::Internal, "encode limits", e))?;
        let (file, log) = (run_dir.join("update.json"), run_dir.join("crun.log"));
        atomic::write(file.as_std_path(), &text, 0o600, Durability::Process)
            .map_err(|e| Error::io(format!("write {file}"), e))?;
        let parent = self.pods.parent(pod)?;
        self.pods.narrow_execs(&parent, container, asked).await?;
        let call = self.call(&log, 0, &["update", "--resources", file.as_str(), id]);
        let done = Spawn::new(&call.path, &call.args).env("PATH", PATH).deadline(self.config.timeout).run_ok().await;
        let _ = std::fs::remove_file(&file);
        done.map_err(|e| with_log(e.into(), &log))?;
        self.pods.change_oom_score(&parent, container, asked).await
    }
}

/// The runtime writes its reason into its log; what it says on stderr may be nothing.
fn with_log(e: Error, log: &Utf8Path) -> Error {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    match text.lines().last() {
        Some(line) => e.context(format!("the OCI runtime says {:?}", line.chars().take(500).collect::<String>())),
        None => e,
    }
}
