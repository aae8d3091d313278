//! `proxmox ct ...`: containers of Proxmox by hand; what they have in common with VMs is in `guest`.

use anyhow::{Result, bail};
use clap::ArgMatches;

use super::guest::Make;
use super::{Call, exec, guest, text, texts, vmid};
use crate::integrations::proxmox_api::{CtSpec, Features, GuestId, GuestKind, Vmid};

pub(super) async fn run(call: &Call, matches: &ArgMatches) -> Result<u8> {
    let Some((verb, matches)) = matches.subcommand() else { bail!("no command") };
    if let Some(code) = guest::run(call, GuestKind::Ct, verb, matches).await? {
        return Ok(code);
    }
    let id = || vmid(matches, "VMID");
    match verb {
        "create" => guest::create(call, matches, GuestKind::Ct, Make::Ct(&spec(matches)?)).await?,
        "info" => info(call, id()?).await?,
        "exec" => exec::run(call, id()?, &texts(matches, "CMD")).await?,
        "config" => guest::show(call, &call.api.ct_config(&call.node, id()?).await?.keys()?)?,
        verb => bail!("proxmox ct {verb}: no such verb"),
    }
    Ok(0)
}

fn spec(matches: &ArgMatches) -> Result<CtSpec> {
    Ok(CtSpec {
        ostemplate: text(matches, "TEMPLATE").unwrap_or_default(),
        rootfs: text(matches, "rootfs").map(|r| r.parse()).transpose()?,
        hostname: text(matches, "hostname"),
        swap: matches.get_one::<u64>("swap").copied(),
        mounts: guest::parsed(matches, "mp")?,
        features: Features { nesting: matches.get_flag("nesting"), ..Features::default() },
        ostype: text(matches, "ostype"),
        privileged: matches.get_flag("privileged"),
        guest: guest::new(matches)?,
    })
}

async fn info(call: &Call, id: Vmid) -> Result<()> {
    let (api, node) = (&call.api, call.node.as_str());
    let status = api.guest_status(GuestId::ct(node, id)).await?;
    let config = api.ct_config(node, id).await?;
    guest::info(call, &status, &config.keys()?, &api.ct_interfaces(node, id).await?)
}
