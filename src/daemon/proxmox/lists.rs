//! `proxmox nodes|storage|templates|tasks|vmids|check`: what there is, and whether we may.

use anyhow::{Result, bail};
use clap::ArgMatches;

use super::super::doctor::proxmox::configured;
use super::{Call, clean, mib, text, texts};
use crate::cli::output::say;
use crate::core::config::Config;
use crate::integrations::proxmox_api::{Content, Upid, needs};

pub(super) async fn run(call: &Call, config: &Config, verb: &str, matches: &ArgMatches) -> Result<u8> {
    match verb {
        "nodes" => {
            let nodes = call.api.nodes().await?;
            call.table(&nodes, &["NODE", "STATUS", "CPUS", "MEM MIB", "OF MIB", "UPTIME S"], |n| {
                vec![
                    n.node.clone(),
                    n.status.clone(),
                    n.maxcpu.to_string(),
                    mib(n.mem),
                    mib(n.maxmem),
                    n.uptime.to_string(),
                ]
            })?;
        }
        "storage" => {
            let list = call.api.storages(&call.node, text(matches, "content").as_deref()).await?;
            call.table(&list, &["STORAGE", "TYPE", "ACTIVE", "FREE MIB", "OF MIB", "CONTENT"], |s| {
                let active = if s.active { "yes" } else { "no" };
                vec![s.storage.clone(), s.kind.clone(), active.into(), mib(s.avail), mib(s.total), s.content.clone()]
            })?;
        }
        "templates" => templates(call, matches).await?,
        "tasks" => tasks(call, matches).await?,
        "vmids" => {
            let guests = call.api.guests().await?;
            call.table(&guests, &["VMID", "TYPE", "NODE", "STATUS", "POOL", "NAME"], |g| {
                vec![
                    g.vmid.to_string(),
                    g.kind.clone(),
                    g.node.clone(),
                    g.status.clone(),
                    g.pool.clone(),
                    g.name.clone(),
                ]
            })?;
            if !call.json {
                say!("next free: {}", call.api.next_vmid().await?)?;
            }
        }
        "check" => return check(call, config, matches).await,
        verb => bail!("proxmox {verb}: no such verb"),
    }
    Ok(0)
}

async fn templates(call: &Call, matches: &ArgMatches) -> Result<()> {
    let storage = text(matches, "storage");
    if let (Some(storage), Some(file)) = (&storage, text(matches, "upload")) {
        return call.task(call.api.upload_template(&call.node, storage, file.as_str().into()).await).await;
    }
    let storages = match storage {
        Some(one) => vec![one],
        None => call.api.storages(&call.node, Some("vztmpl")).await?.into_iter().map(|s| s.storage).collect(),
    };
    let mut list: Vec<Content> = Vec::new();
    for storage in storages {
        list.extend(call.api.content(&call.node, &storage, Some("vztmpl")).await?);
    }
    call.table(&list, &["TEMPLATE", "MIB"], |c| vec![c.volid.clone(), mib(c.size)])
}

async fn tasks(call: &Call, matches: &ArgMatches) -> Result<()> {
    if let Some(upid) = text(matches, "UPID") {
        let upid: Upid = upid.parse()?;
        let lines = call.api.task_lines(&upid).await?;
        if !call.json(&lines)? {
            for line in lines {
                say!("{}", clean(&line))?;
            }
        }
        return Ok(());
    }
    let list = if matches.get_flag("active") {
        call.api.active_tasks(&call.node, None).await?
    } else {
        let limit = matches.get_one::<u64>("limit").copied().unwrap_or(50);
        call.api.tasks(&call.node, u32::try_from(limit)?).await?
    };
    call.table(&list, &["TYPE", "ID", "STATUS", "USER", "UPID"], |t| {
        let status = match t.endtime {
            Some(_) => t.status.clone().unwrap_or_default(),
            None => "running".into(),
        };
        vec![t.kind.clone(), t.id.clone(), status, t.user.clone(), t.upid.to_string()]
    })
}

async fn check(call: &Call, config: &Config, matches: &ArgMatches) -> Result<u8> {
    let version = call.api.version().await?;
    if version.major().is_none_or(|n| n < 8) {
        bail!("Proxmox VE {} is not supported: 8 or later is needed", version.version);
    }
    if !call.api.nodes().await?.iter().any(|n| n.node == call.node) {
        bail!("the cluster has no node {:?}: set proxmox.node", call.node);
    }
    let (pool, storages, bridges) = (text(matches, "pool"), texts(matches, "storage"), texts(matches, "bridge"));
    // What is said, or what the handlers are configured with.
    let wanted = match pool.is_none() && storages.is_empty() && bridges.is_empty() {
        true => configured(config),
        false => needs(&pool.unwrap_or_default(), &storages, &bridges),
    };
    let lacking = call.api.lacking(&wanted).await?;
    let list: Vec<_> = lacking
        .iter()
        .map(|n| serde_json::json!({ "privilege": n.privilege, "path": n.path, "purpose": n.purpose }))
        .collect();
    if !call.json(serde_json::json!({ "version": version.version, "lacking": list }))? {
        say!("Proxmox VE {}", version.version)?;
        for need in &lacking {
            say!("lacks {} on {}: {}", need.privilege, need.path, need.purpose)?;
        }
        match (lacking.is_empty(), wanted.is_empty()) {
            (true, true) => say!("no handler of Proxmox is enabled: say --pool, --storage and --bridge")?,
            (true, false) => say!("the token has all that is needed")?,
            (false, _) => {}
        }
    }
    Ok(u8::from(!lacking.is_empty()))
}
