//! `proxmox orphans`: containers that carry this installation's identity and belong to no pod that it knows.
//!
//! Only the identity in the notes counts, tags are for people. A container without it is never touched. When records are in
//! quarantine nobody can say what is unclaimed: then nothing is removed. One that can't be read, or not be deleted, hinders no other.

use anyhow::{Context as _, Result, bail};
use camino::Utf8Path;
use clap::ArgMatches;
use serde::Serialize;

use super::super::storage::known_installation;
use super::Call;
use crate::integrations::proxmox_api::{ErrorKind, GuestId, GuestKind, Identity, Vmid};

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
    let (mut found, mut failed) = (Vec::new(), false);
    for ct in call.api.guest_list(GuestKind::Ct, &call.node).await? {
        let pod = match unclaimed(call, root, &installation, ct.vmid).await {
            Ok(Some(pod)) => pod,
            Ok(None) => continue,
            Err(e) => {
                eprintln!("CT {}: whose it is can't be told: {e:#}", ct.vmid);
                failed = true;
                continue;
            }
        };
        found.push(Orphan { vmid: ct.vmid, name: ct.name, status: ct.status, pod });
    }
    call.table(&found, &["VMID", "STATUS", "NAME", "POD"], |o| {
        vec![o.vmid.to_string(), o.status.clone(), o.name.clone(), o.pod.clone()]
    })?;
    if !matches.get_flag("remove") || found.is_empty() {
        return Ok(u8::from(failed));
    }
    let quarantine = root.join("quarantine");
    if holds_pods(&quarantine).with_context(|| quarantine.to_string())? {
        bail!("{quarantine} holds records that can't be read: what belongs to nobody is not known, nothing is removed");
    }
    for orphan in found {
        // Once more: it may have got an owner, or other notes, since it was listed.
        match remove(call, root, &installation, &orphan).await {
            Ok(true) => eprintln!("CT {} is deleted", orphan.vmid),
            Ok(false) => {}
            Err(e) => {
                eprintln!("CT {} can't be deleted: {e:#}", orphan.vmid);
                failed = true;
            }
        }
    }
    Ok(u8::from(failed))
}

/// Whether there are records of pods in it.
fn holds_pods(quarantine: &Utf8Path) -> std::io::Result<bool> {
    match quarantine.read_dir_utf8() {
        Ok(mut list) => list.try_fold(false, |any, entry| Ok(any || entry?.file_name().starts_with("pod-"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// Deletes one that is nobody's still; whether it was.
async fn remove(call: &Call, root: &Utf8Path, installation: &str, orphan: &Orphan) -> Result<bool> {
    if unclaimed(call, root, installation, orphan.vmid).await?.is_none_or(|pod| pod != orphan.pod) {
        return Ok(false);
    }
    call.api.guest_delete(GuestId::ct(&call.node, orphan.vmid), true).await?;
    Ok(true)
}

/// The pod that the container was made for, if it is ours and that pod is gone.
async fn unclaimed(call: &Call, root: &Utf8Path, installation: &str, id: Vmid) -> Result<Option<String>> {
    let config = match call.api.ct_config(&call.node, id).await {
        Ok(config) => config,
        // One that we may not see is not ours.
        Err(e) if e.is_not_found() || matches!(e.kind(), ErrorKind::Permission { .. }) => return Ok(None),
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
