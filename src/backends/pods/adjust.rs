//! What the node's plugins (NRI) make of a container that is being made.
//!
//! Called by the backends whose containers plugins take part in, once for a container, when its specification is whole. Nothing was made
//! yet: an error refuses the container.

use super::launch::Prepared;
use super::{NodePods, destinations, devices};
use crate::backends::oci::{adjust, linux};
use crate::core::backend::LaunchContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Result};
use crate::core::limits;
use crate::core::plugins::Adjusted;
use crate::core::spec::Resources;
use crate::integrations::cdi;
use crate::integrations::nri::New;
use crate::utils::beneath;

impl NodePods {
    /// Asks them and changes the specification. None: there are no plugins.
    pub async fn adjust(&self, context: &LaunchContext<'_>, prepared: &mut Prepared) -> Result<Option<Adjusted>> {
        let Some(plugins) = &self.plugins else { return Ok(None) };
        let LaunchContext { pod, id, config, image, rootfs, .. } = *context;
        let (user, spec) = (&prepared.user, &prepared.spec);
        let made = plugins.create(&New { pod, id, config, image: image.id.to_string(), user, spec }).await?;
        let resources = made.limits.over(&config.resources);
        limits::check(&made.limits, &resources)?;
        let changed = made.limits != Resources::default();
        let all = || linux::resources(&resources, &self.host_now(&resources), self.config.pids_limit);
        let all = changed.then(all).transpose()?;
        let wanted: Vec<String> = made.adjust.cdi_devices.iter().map(|d| d.name.clone()).collect();
        let names = cdi::wanted(&wanted, &Default::default())?;
        let folders = self.config.cdi_spec_dirs.clone();
        let edits = match names.is_empty() {
            true => Vec::new(),
            false => blocking(move || devices::cdi(&folders, &names)).await?,
        };
        let privileged = config.security.privileged;
        adjust::apply(&mut prepared.spec, &made.adjust, all, &edits, privileged)?;
        if let Some(linux) = &made.adjust.linux {
            self.adjust_classes(linux, &mut prepared.spec).await.map_err(|e| e.context("what plugins set"))?;
        }
        if let Some(process) = prepared.spec.process() {
            let args = process.args().clone().unwrap_or_default();
            if args.is_empty() {
                return Err(Error::invalid("plugins have left no command"));
            }
            prepared.oom_score_adj = process.oom_score_adj().unwrap_or(0);
        }
        let root = rootfs.try_clone_to_owned();
        let root = root.map_err(|e| Error::io("duplicate the root file system's descriptor", e))?;
        let spec = prepared.spec.clone();
        prepared.spec = blocking(move || Ok(destinations::resolve_all(&beneath::Root::from_fd(root), spec))).await?;
        Ok(Some(Adjusted { resources, updates: made.updates }))
    }
}
