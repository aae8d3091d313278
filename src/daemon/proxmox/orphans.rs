//! `proxmox orphans`: containers that carry this installation's identity and belong to no pod that it knows.
//!
//! Only the identity in the notes counts, tags are for people. A container without it is never touched. When records are in
//! quarantine nobody can say what is unclaimed: then nothing is removed.

use anyhow::{Context as _, Result, bail};
use camino::Utf8Path;
use clap::ArgMatches;
use serde::Serialize;

use super::super::storage::known_installation;
use super::Call;
use crate::integrations::proxmox_api::{GuestId, GuestKind, Identity, Vmid};

#[derive(Serialize)]
struct Orphan {
    vmid: Vmid,
    name: String,
    status: String,
    pod: String,
}

pub(super) async fn run(call: &Call, root: &Utf8Path, matches: &ArgMatches) -> Result<u8> {
    let Some(installation) = known_installation(root).map_err(|e| anyhow::anyhow!(e.chain()))? else {
        eprintln!("{root} has no identity yet: nothing can belong to it");
        return Ok(0);
    };
    let mut found = Vec::new();
    for ct in call.api.guest_list(GuestKind::Ct, &call.node).await? {
        let Some(pod) = unclaimed(call, root, &installation, ct.vmid).await? else { continue };
        found.push(Orphan { vmid: ct.vmid, name: ct.name, status: ct.status, pod });
    }
    call.table(&found, &["VMID", "STATUS", "NAME", "POD"], |o| {
        vec![o.vmid.to_string(), o.status.clone(), o.name.clone(), o.pod.clone()]
    })?;
    if !matches.get_flag("remove") || found.is_empty() {
        return Ok(0);
    }
    let quarantine = root.join("quarantine");
    if quarantine.try_exists().with_context(|| quarantine.to_string())? {
        bail!("{quarantine} holds records that can't be read: what belongs to nobody is not known, nothing is removed");
    }
    for orphan in found {
        // Once more: it may have got an owner, or other notes, since it was listed.
        if unclaimed(call, root, &installation, orphan.vmid).await?.is_some_and(|pod| pod == orphan.pod) {
            call.api.guest_delete(GuestId::ct(&call.node, orphan.vmid), true).await?;
            eprintln!("CT {} is deleted", orphan.vmid);
        }
    }
    Ok(0)
}

/// The pod that the container was made for, if it is ours and that pod is gone.
async fn unclaimed(call: &Call, root: &Utf8Path, installation: &str, id: Vmid) -> Result<Option<String>> {
    let config = match call.api.ct_config(&call.node, id).await {
        Ok(config) => config,
        Err(e) if e.is_not_found() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let Some(identity) = Identity::find(config.description()).filter(|i| i.installation == installation) else {
        return Ok(None);
    };
    // The id comes from notes that anybody can write: it names a folder only if it is a pod's id.
    let known = match identity.pod.parse::<crate::core::ids::PodId>() {
        Ok(pod) => root.join("pods").join(pod.as_str()).try_exists().context("looking for the pod's record")?,
        Err(_) => false,
    };
    Ok((!known).then_some(identity.pod))
}
