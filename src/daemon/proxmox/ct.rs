//! `proxmox ct ...`: containers of Proxmox by hand; what they have in common with VMs is in `guest`.

use anyhow::{Result, bail};
use clap::ArgMatches;

use super::guest::Make;
use super::{Call, exec, guest, settings, text, texts, vmid};
use crate::cli::output::say;
use crate::integrations::proxmox_api::{CtSpec, Features, GuestId, GuestKind, Net, PropertyError, Vmid, Volume};

pub(super) async fn run(call: &Call, matches: &ArgMatches) -> Result<u8> {
    let Some((verb, matches)) = matches.subcommand() else { bail!("no command") };
    if let Some(code) = guest::run(call, GuestKind::Ct, verb, matches).await? {
        return Ok(code);
    }
    let id = || vmid(matches, "VMID");
    match verb {
        "create" => create(call, matches).await?,
        "info" => info(call, id()?).await?,
        "exec" => exec::run(call, id()?, &texts(matches, "CMD")).await?,
        "config" => guest::show(call, &call.api.ct_config(&call.node, id()?).await?.keys()?)?,
        verb => bail!("proxmox ct {verb}: no such verb"),
    }
    Ok(0)
}

fn spec(matches: &ArgMatches) -> Result<CtSpec> {
    let nets = texts(matches, "net").iter().map(|n| n.parse::<Net>()).collect::<Result<Vec<_>, PropertyError>>()?;
    let mounts = texts(matches, "mp").iter().map(|m| m.parse::<Volume>()).collect::<Result<Vec<_>, PropertyError>>()?;
    let number = |name: &str| matches.get_one::<u64>(name).copied();
    Ok(CtSpec {
        ostemplate: text(matches, "TEMPLATE").unwrap_or_default(),
        rootfs: text(matches, "rootfs").map(|r| r.parse()).transpose()?,
        hostname: text(matches, "hostname"),
        memory: number("memory"),
        swap: number("swap"),
        cores: number("cores").map(u32::try_from).transpose()?,
        cpulimit: matches.get_one::<f64>("cpulimit").copied(),
        nets,
        mounts,
        tags: text(matches, "tags").unwrap_or_default().parse()?,
        description: text(matches, "description"),
        pool: text(matches, "pool"),
        features: Features { nesting: matches.get_flag("nesting"), ..Features::default() },
        ostype: text(matches, "ostype"),
        privileged: matches.get_flag("privileged"),
        extra: settings(&texts(matches, "set"))?,
    })
}

async fn create(call: &Call, matches: &ArgMatches) -> Result<()> {
    let (spec, node) = (spec(matches)?, call.node.as_str());
    let id = guest::numbered(call, matches, "vmid", Make::Ct(&spec)).await?;
    say!("{id}")?;
    if matches.get_flag("start") {
        call.api.guest_start(GuestId::ct(node, id)).await?;
    }
    Ok(())
}

async fn info(call: &Call, id: Vmid) -> Result<()> {
    let (api, node) = (&call.api, call.node.as_str());
    let status = api.guest_status(GuestId::ct(node, id)).await?;
    let config = api.ct_config(node, id).await?;
    guest::info(call, &status, &config.keys()?, &api.ct_interfaces(node, id).await?)
}
