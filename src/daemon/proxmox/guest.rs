//! The verbs that `proxmox ct` and `proxmox vm` have in common.
//!
//! Each is one operation of the client; repeating one that is done already is fine, as with the client.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Result, bail};
use clap::ArgMatches;

use super::{Call, clean, mib, settings, text, texts, vmid};
use crate::cli::output::say;
use crate::integrations::proxmox_api::{
    ApiError, CloneSpec, CtSpec, ErrorKind, GuestChange, GuestId, GuestKind, GuestNet, GuestStatus, Interface,
    NewGuest, PropertyError, Running, VmSpec, Vmid,
};

/// How often the next free number is taken when somebody else was quicker.
const COLLISIONS: usize = 20;

/// Runs the verb; None: it is none of these.
pub(super) async fn run(call: &Call, kind: GuestKind, verb: &str, matches: &ArgMatches) -> Result<Option<u8>> {
    let api = &call.api;
    let guest = || Ok::<_, anyhow::Error>(GuestId { kind, node: &call.node, vmid: vmid(matches, "VMID")? });
    let name = || text(matches, "NAME").unwrap_or_default();
    match verb {
        "list" => list(call, kind).await?,
        "start" => api.guest_start(guest()?).await?,
        "stop" => api.guest_stop(guest()?).await?,
        "shutdown" => {
            let timeout = matches.get_one::<u64>("timeout").copied().unwrap_or(60);
            api.guest_shutdown(guest()?, u32::try_from(timeout)?, matches.get_flag("force")).await?;
        }
        "delete" => api.guest_delete(guest()?, matches.get_flag("force")).await?,
        "exists" => {
            let there = api.guest_exists(guest()?).await?;
            if !call.json(there)? {
                say!("{}", if there { "yes" } else { "no" })?;
            }
            return Ok(Some(u8::from(!there)));
        }
        "update" => update(call, guest()?, matches).await?,
        "resize" => {
            let (disk, size) = (text(matches, "DISK").unwrap_or_default(), text(matches, "SIZE").unwrap_or_default());
            call.task(api.guest_resize(guest()?, &disk, &size).await).await?;
        }
        "snapshot" => {
            let notes = text(matches, "description").unwrap_or_default();
            call.task(api.guest_snapshot(guest()?, &name(), &notes).await).await?;
        }
        "snapshots" => {
            let list = api.guest_snapshots(guest()?).await?;
            call.table(&list, &["NAME", "TIME", "PARENT", "NOTES"], |s| {
                vec![s.name.clone(), s.snaptime.to_string(), s.parent.clone(), s.description.trim().to_owned()]
            })?;
        }
        "delsnapshot" => call.task(api.guest_delete_snapshot(guest()?, &name()).await).await?,
        "rollback" => {
            let started = api.guest_rollback(guest()?, &name(), matches.get_flag("start")).await;
            call.task(started).await?;
        }
        "clone" => clone(call, guest()?, matches).await?,
        "template" => api.guest_make_template(guest()?).await?,
        _ => return Ok(None),
    }
    Ok(Some(0))
}

async fn list(call: &Call, kind: GuestKind) -> Result<()> {
    let mut list = call.api.guest_list(kind, &call.node).await?;
    list.sort_by_key(|c| c.vmid);
    call.table(&list, &["VMID", "STATUS", "LOCK", "MEM MIB", "OF MIB", "NAME", "TAGS"], |c| {
        let dash = |t: &str| if t.is_empty() { "-".to_owned() } else { t.to_owned() };
        let status = if c.template { "template".into() } else { c.status.clone() };
        vec![c.vmid.to_string(), status, dash(&c.lock), mib(c.mem), mib(c.maxmem), dash(&c.name), dash(&c.tags)]
    })
}

async fn update(call: &Call, guest: GuestId<'_>, matches: &ArgMatches) -> Result<()> {
    let set = settings(&texts(matches, "KEY=VALUE"))?;
    let change = GuestChange { set, delete: texts(matches, "delete"), digest: text(matches, "digest") };
    if change.set.is_empty() && change.delete.is_empty() {
        bail!("nothing to change: give KEY=VALUE or --delete KEY");
    }
    let pending: Vec<_> = call.api.guest_update(guest, &change).await?.into_iter().map(|p| p.key).collect();
    if !call.json(serde_json::json!({ "pending": pending }))? {
        for key in pending {
            say!("{key} takes effect at the next start")?;
        }
    }
    Ok(())
}

async fn clone(call: &Call, guest: GuestId<'_>, matches: &ArgMatches) -> Result<()> {
    let spec = CloneSpec {
        name: text(matches, "name"),
        description: text(matches, "description"),
        pool: text(matches, "pool"),
        snapshot: text(matches, "snapshot"),
        storage: text(matches, "storage"),
        full: matches.get_flag("full"),
    };
    let new = numbered(call, matches, "newid", Make::Clone(guest, &spec)).await?;
    tell(call, new)
}

/// Which number it got.
fn tell(call: &Call, vmid: Vmid) -> Result<()> {
    if !call.json(serde_json::json!({ "vmid": vmid.get() }))? {
        say!("{vmid}")?;
    }
    Ok(())
}

/// What is to be made.
pub(super) enum Make<'a> {
    /// A container.
    Ct(&'a CtSpec),
    /// A VM.
    Vm(&'a VmSpec),
    /// One like another.
    Clone(GuestId<'a>, &'a CloneSpec),
}

impl Make<'_> {
    async fn begin(&self, call: &Call, id: Vmid) -> Result<Running, ApiError> {
        match self {
            Self::Ct(spec) => call.api.ct_create(&call.node, id, spec).await,
            Self::Vm(spec) => call.api.vm_create(&call.node, id, spec).await,
            Self::Clone(from, spec) => call.api.guest_clone(*from, id, spec).await,
        }
    }
}

/// Values of an option, in the API's words.
pub(super) fn parsed<T: FromStr<Err = PropertyError>>(matches: &ArgMatches, name: &str) -> Result<Vec<T>> {
    Ok(texts(matches, name).iter().map(|text| text.parse()).collect::<Result<_, _>>()?)
}

/// What every guest has that is made.
pub(super) fn new<N: GuestNet>(matches: &ArgMatches) -> Result<NewGuest<N>> {
    Ok(NewGuest {
        memory: matches.get_one::<u64>("memory").copied(),
        cores: matches.get_one::<u64>("cores").copied().map(u32::try_from).transpose()?,
        cpulimit: matches.get_one::<f64>("cpulimit").copied(),
        nets: parsed(matches, "net")?,
        tags: text(matches, "tags").unwrap_or_default().parse()?,
        description: text(matches, "description"),
        pool: text(matches, "pool"),
        extra: settings(&texts(matches, "set"))?,
    })
}

/// Makes one, and starts it if that is asked for.
pub(super) async fn create(call: &Call, matches: &ArgMatches, kind: GuestKind, make: Make<'_>) -> Result<()> {
    let vmid = numbered(call, matches, "vmid", make).await?;
    tell(call, vmid)?;
    if matches.get_flag("start") {
        call.api.guest_start(GuestId { kind, node: &call.node, vmid }).await?;
    }
    Ok(())
}

/// Has a guest made with the number of option `name`, or with the next free one. The API reserves no number: one that we chose
/// and somebody else was quicker to take is no failure, the next one is tried.
async fn numbered(call: &Call, matches: &ArgMatches, name: &str, make: Make<'_>) -> Result<Vmid> {
    if matches.get_one::<String>(name).is_some() {
        let id = vmid(matches, name)?;
        return call.task(make.begin(call, id).await).await.map(|()| id);
    }
    let mut tried = 0;
    loop {
        let id = call.api.next_vmid().await?;
        tried += 1;
        match call.task(make.begin(call, id).await).await {
            Ok(()) => return Ok(id),
            Err(e) => {
                let taken = e.downcast_ref::<ApiError>().is_some_and(|e| *e.kind() == ErrorKind::AlreadyExists);
                if !taken || tried >= COLLISIONS {
                    return Err(e);
                }
            }
        }
    }
}

/// Shows a configuration.
pub(super) fn show(call: &Call, keys: &BTreeMap<String, String>) -> Result<()> {
    if call.json {
        say!("{}", serde_json::to_string_pretty(keys)?)?;
        return Ok(());
    }
    for (key, value) in keys {
        let lines: Vec<String> = value.trim_end().lines().map(clean).collect();
        say!("{key}: {}", lines.join("\n  "))?;
    }
    Ok(())
}

/// Shows all about a guest.
pub(super) fn info(
    call: &Call,
    status: &GuestStatus,
    keys: &BTreeMap<String, String>,
    addresses: &[Interface],
) -> Result<()> {
    if call.json {
        let all = serde_json::json!({ "status": status, "config": keys, "interfaces": addresses });
        say!("{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    let state = if status.is_paused() { "paused" } else { status.status.as_str() };
    let (used, most) = (mib(status.mem), mib(status.maxmem));
    say!("vmid: {}\nstatus: {state}\nuptime: {} s\nmemory: {used} of {most} MiB", status.vmid, status.uptime)?;
    for interface in addresses {
        let found: Vec<_> = [&interface.inet, &interface.inet6].into_iter().flatten().map(String::as_str).collect();
        say!("interface {}: {}", clean(&interface.name), clean(&found.join(" ")))?;
    }
    show(call, keys)
}
