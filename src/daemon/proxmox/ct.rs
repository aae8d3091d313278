//! `proxmox ct ...`: containers of Proxmox by hand.
//!
//! Each verb is one operation of the client; repeating one that is done already is fine, as with the client.

use anyhow::{Result, bail};
use clap::ArgMatches;

use super::{Call, exec, mib, settings, text, texts, vmid};
use crate::integrations::proxmox_api::{
    ApiError, CloneSpec, CtChange, CtConfig, CtSpec, ErrorKind, Features, Net, PropertyError, Vmid, Volume,
};

/// How often the next free number is taken when somebody else was quicker.
const COLLISIONS: usize = 20;

pub(super) async fn run(call: &Call, matches: &ArgMatches) -> Result<u8> {
    let Some((verb, matches)) = matches.subcommand() else { bail!("no command") };
    let (api, node) = (&call.api, call.node.as_str());
    let id = || vmid(matches, "VMID");
    let name = || text(matches, "NAME").unwrap_or_default();
    match verb {
        "list" => {
            let mut list = api.ct_list(node).await?;
            list.sort_by_key(|c| c.vmid);
            call.table(&list, &["VMID", "STATUS", "LOCK", "MEM MIB", "OF MIB", "NAME", "TAGS"], |c| {
                let dash = |t: &str| if t.is_empty() { "-".to_owned() } else { t.to_owned() };
                let status = if c.template { "template".into() } else { c.status.clone() };
                vec![c.vmid.to_string(), status, dash(&c.lock), mib(c.mem), mib(c.maxmem), dash(&c.name), dash(&c.tags)]
            })?;
        }
        "create" => return create(call, matches).await,
        "start" => api.ct_start(node, id()?).await?,
        "stop" => api.ct_stop(node, id()?).await?,
        "shutdown" => {
            let timeout = matches.get_one::<u64>("timeout").copied().unwrap_or(60);
            api.ct_shutdown(node, id()?, u32::try_from(timeout)?, matches.get_flag("force")).await?;
        }
        "delete" => api.ct_delete(node, id()?, matches.get_flag("force")).await?,
        "info" => info(call, id()?).await?,
        "exists" => {
            let there = api.ct_exists(node, id()?).await?;
            println!("{}", if there { "yes" } else { "no" });
            return Ok(u8::from(!there));
        }
        "exec" => exec::run(call, id()?, &texts(matches, "CMD")).await?,
        "config" => show(call, &api.ct_config(node, id()?).await?)?,
        "update" => {
            let set = settings(&texts(matches, "KEY=VALUE"))?;
            let change = CtChange { set, delete: texts(matches, "delete"), digest: text(matches, "digest") };
            if change.set.is_empty() && change.delete.is_empty() {
                bail!("nothing to change: give KEY=VALUE or --delete KEY");
            }
            for pending in api.ct_update(node, id()?, &change).await? {
                println!("{} takes effect at the next start", pending.key);
            }
        }
        "resize" => {
            let (disk, size) = (text(matches, "DISK").unwrap_or_default(), text(matches, "SIZE").unwrap_or_default());
            call.task(api.ct_resize(node, id()?, &disk, &size).await).await?;
        }
        "snapshot" => {
            let notes = text(matches, "description").unwrap_or_default();
            call.task(api.ct_snapshot(node, id()?, &name(), &notes).await).await?;
        }
        "snapshots" => {
            let list = api.ct_snapshots(node, id()?).await?;
            call.table(&list, &["NAME", "TIME", "PARENT", "NOTES"], |s| {
                vec![s.name.clone(), s.snaptime.to_string(), s.parent.clone(), s.description.trim().to_owned()]
            })?;
        }
        "delsnapshot" => call.task(api.ct_delete_snapshot(node, id()?, &name()).await).await?,
        "rollback" => call.task(api.ct_rollback(node, id()?, &name(), matches.get_flag("start")).await).await?,
        "clone" => {
            let spec = CloneSpec {
                hostname: text(matches, "hostname"),
                description: text(matches, "description"),
                pool: text(matches, "pool"),
                snapshot: text(matches, "snapshot"),
                storage: text(matches, "storage"),
                full: matches.get_flag("full"),
            };
            let from = id()?;
            for tried in 1.. {
                let new = candidate(call, matches, "newid").await?;
                let task = api.ct_clone(node, from, new, &spec).await;
                match call.task(task).await {
                    Ok(()) => {
                        println!("{new}");
                        break;
                    }
                    Err(e) => give_up(matches, "newid", tried, e)?,
                }
            }
        }
        "template" => api.ct_make_template(node, id()?).await?,
        verb => bail!("proxmox ct {verb}: no such verb"),
    }
    Ok(0)
}

/// The number that was asked for, or the next free one.
async fn candidate(call: &Call, matches: &ArgMatches, name: &str) -> Result<Vmid> {
    if matches.get_one::<String>(name).is_some() {
        return vmid(matches, name);
    }
    Ok(call.api.next_vmid().await?)
}

/// The API reserves no number: one that we chose and somebody else was quicker to take is no failure, the next one is tried.
fn give_up(matches: &ArgMatches, name: &str, tried: usize, e: anyhow::Error) -> Result<()> {
    let taken = e.downcast_ref::<ApiError>().is_some_and(|e| *e.kind() == ErrorKind::AlreadyExists);
    if taken && matches.get_one::<String>(name).is_none() && tried < COLLISIONS {
        return Ok(());
    }
    Err(e)
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

async fn create(call: &Call, matches: &ArgMatches) -> Result<u8> {
    let spec = spec(matches)?;
    let mut tried = 0;
    let id = loop {
        let id = candidate(call, matches, "vmid").await?;
        tried += 1;
        match call.task(call.api.ct_create(&call.node, id, &spec).await).await {
            Ok(()) => break id,
            Err(e) => give_up(matches, "vmid", tried, e)?,
        }
    };
    println!("{id}");
    if matches.get_flag("start") {
        call.api.ct_start(&call.node, id).await?;
    }
    Ok(0)
}

fn show(call: &Call, config: &CtConfig) -> Result<()> {
    let keys = config.keys()?;
    if call.json {
        println!("{}", serde_json::to_string_pretty(&keys)?);
        return Ok(());
    }
    for (key, value) in keys {
        println!("{key}: {}", value.trim_end().replace('\n', "\n  "));
    }
    Ok(())
}

async fn info(call: &Call, id: Vmid) -> Result<()> {
    let (api, node) = (&call.api, call.node.as_str());
    let ct = api.ct_status(node, id).await?;
    let config = api.ct_config(node, id).await?;
    let addresses = api.ct_interfaces(node, id).await?;
    if call.json {
        let all = serde_json::json!({ "status": ct, "config": config.keys()?, "interfaces": addresses });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!(
        "vmid: {id}\nstatus: {}\nuptime: {} s\nmemory: {} of {} MiB",
        ct.status,
        ct.uptime,
        mib(ct.mem),
        mib(ct.maxmem)
    );
    for interface in addresses {
        let found: Vec<_> = [interface.inet, interface.inet6].into_iter().flatten().collect();
        println!("interface {}: {}", interface.name, found.join(" "));
    }
    show(call, &config)
}
