//! Classes of block I/O and of Intel RDT of a container that is being made: asked for by annotations, or by the node's plugins.
//!
//! Called by the backends `crun` and `lxc` while they plan it; the others refuse them by name. Nothing was made yet: an error
//! refuses the container, with what named the class.

use oci_spec::runtime::{LinuxBlockIo, Spec};

use super::NodePods;
use crate::backends::oci::classes::{block_io, set_block_io, set_rdt};
use crate::core::blocking::blocking;
use crate::core::classes::{Asked, BLOCKIO, Kind, RDT};
use crate::core::error::{self, Error, Result};
use crate::core::records::PodRecord;
use crate::core::spec::ContainerConfig;
use crate::integrations::nri::wire::LinuxContainerAdjustment;
use crate::integrations::{blockio, rdt};

fn asked(kind: Kind, pod: &PodRecord, config: &ContainerConfig) -> Option<Asked> {
    kind.of(&config.name, &config.annotations, &pod.config.annotations)
}

/// Refuses the classes that a container asks for, where its handler has none.
pub fn refuse(handler: &str, pod: &PodRecord, config: &ContainerConfig) -> Result<()> {
    match [BLOCKIO, RDT].into_iter().find_map(|kind| asked(kind, pod, config)) {
        None => Ok(()),
        Some(Asked { class, annotation }) => {
            let why = format!("annotation {annotation}: class {class:?}: the handler {handler} has no such classes");
            Err(Error::new(error::Kind::Unimplemented, why))
        }
    }
}

impl NodePods {
    /// Adds those that annotations name.
    pub async fn add_classes(&self, pod: &PodRecord, config: &ContainerConfig, spec: &mut Spec) -> Result<()> {
        let named = |asked: &Asked| format!("annotation {}", asked.annotation);
        if let Some(asked) = asked(BLOCKIO, pod, config) {
            let found = self.block_io(&asked.class).await.map_err(|e| e.context(named(&asked)))?;
            set_block_io(spec, Some(found));
        }
        if let Some(asked) = asked(RDT, pod, config) {
            if !self.config.rdt_classes.contains(&asked.class) {
                let why = format!("RDT class {:?} is not one of runtime.rdt_classes", asked.class);
                return Err(Error::precondition(why).context(named(&asked)));
            }
            rdt::check(&asked.class).map_err(|e| e.context(named(&asked)))?;
            set_rdt(spec, Some(asked.class));
        }
        Ok(())
    }

    /// Adds those that plugins name; an empty name takes away.
    pub(super) async fn adjust_classes(&self, asked: &LinuxContainerAdjustment, spec: &mut Spec) -> Result<()> {
        let resources = asked.resources.as_ref();
        if let Some(class) = resources.and_then(|r| r.blockio_class.as_ref()) {
            let found = match class.value.is_empty() {
                true => None,
                false => Some(self.block_io(&class.value).await?),
            };
            set_block_io(spec, found);
        }
        if asked.rdt.as_ref().is_some_and(|r| r.remove) {
            set_rdt(spec, None);
        }
        let groups =
            [resources.and_then(|r| r.rdt_class.as_ref()), asked.rdt.as_ref().and_then(|r| r.clos_id.as_ref())];
        for group in groups.into_iter().flatten() {
            // Plugins are the node's own: what pods may ask for is not their limit.
            if !group.value.is_empty() {
                rdt::check(&group.value)?;
            }
            set_rdt(spec, Some(group.value.clone()).filter(|g| !g.is_empty()));
        }
        Ok(())
    }

    async fn block_io(&self, class: &str) -> Result<LinuxBlockIo> {
        let Some(file) = self.config.blockio_config_file.clone() else {
            let why = format!("block I/O class {class:?}: runtime.blockio_config_file says that there are none");
            return Err(Error::precondition(why));
        };
        let name = class.to_owned();
        let found = blocking(move || blockio::read(&file)?.class(&name)).await?;
        if !found.unmatched.is_empty() {
            let devices = found.unmatched.join(", ");
            tracing::warn!(class, devices, "no block device fits; the class does without");
        }
        block_io(&found)
    }
}
