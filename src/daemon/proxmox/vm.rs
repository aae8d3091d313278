//! `proxmox vm ...`: virtual machines of Proxmox by hand; what they have in common with containers is in `guest`.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::ArgMatches;

use super::guest::Make;
use super::{Call, guest, text, texts, vmid};
use crate::integrations::proxmox_api::{ErrorKind, GuestId, GuestKind, VmSpec, Vmid};

/// Most bytes that are read from our standard input: one more than can be sent, so that too many are told.
const MAX_INPUT: u64 = (64 << 10) + 1;

pub(super) async fn run(call: &Call, matches: &ArgMatches) -> Result<u8> {
    let Some((verb, matches)) = matches.subcommand() else { bail!("no command") };
    if let Some(code) = guest::run(call, GuestKind::Vm, verb, matches).await? {
        return Ok(code);
    }
    let id = || vmid(matches, "VMID");
    match verb {
        "create" => guest::create(call, matches, GuestKind::Vm, Make::Vm(&spec(matches)?)).await?,
        "info" => info(call, id()?).await?,
        "exec" => return exec(call, id()?, matches).await,
        "config" => guest::show(call, &call.api.vm_config(&call.node, id()?).await?.keys()?)?,
        verb => bail!("proxmox vm {verb}: no such verb"),
    }
    Ok(0)
}

fn spec(matches: &ArgMatches) -> Result<VmSpec> {
    Ok(VmSpec {
        name: text(matches, "name"),
        cpu: text(matches, "cpu"),
        disks: guest::parsed(matches, "disk")?,
        agent: matches.get_flag("agent"),
        guest: guest::new(matches)?,
    })
}

async fn info(call: &Call, id: Vmid) -> Result<()> {
    let vm = GuestId::vm(&call.node, id);
    let status = call.api.guest_status(vm).await?;
    let config = call.api.vm_config(&call.node, id).await?;
    let addresses = if status.is_running() && !status.is_paused() && config.get("agent").is_some() {
        match call.api.agent_interfaces(vm).await {
            Ok(found) => found,
            // It has not started yet, or the VM has stopped meanwhile.
            Err(e) if matches!(e.kind(), ErrorKind::NoAgent | ErrorKind::NotRunning) => {
                eprintln!("no addresses: {}", e.message());
                Vec::new()
            }
            Err(e) => return Err(e.into()),
        }
    } else {
        Vec::new()
    };
    guest::info(call, &status, &config.keys()?, &addresses)
}

async fn exec(call: &Call, id: Vmid, matches: &ArgMatches) -> Result<u8> {
    let mut input = Vec::new();
    if matches.get_flag("stdin") {
        std::io::stdin().lock().take(MAX_INPUT).read_to_end(&mut input).context("standard input")?;
    }
    let command = command(texts(matches, "CMD"), matches.get_flag("direct"));
    let limit = Duration::from_secs(matches.get_one::<u64>("timeout").copied().unwrap_or(60));
    let output = call.api.agent_exec(GuestId::vm(&call.node, id), &command, &input, limit).await?;
    std::io::stdout().write_all(&output.stdout).context("standard output")?;
    std::io::stderr().write_all(&output.stderr).context("standard error")?;
    if output.truncated {
        bail!(
            "the guest agent has cut the output, which was too long for it (the command's exit code: {})",
            output.code
        );
    }
    // Windows has larger ones, of which none is a success but 0.
    Ok(u8::try_from(output.code).unwrap_or(u8::MAX))
}

/// The API gives no sensible answer for a program that the guest has not: a shell says so, with exit code 127.
fn command(words: Vec<String>, direct: bool) -> Vec<String> {
    if direct {
        return words;
    }
    let mut all: Vec<String> = ["/bin/sh", "-c", "exec \"$@\"", "sh"].map(String::from).into();
    all.extend(words);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words() {
        let words: Vec<String> = vec!["ls".into(), "-l".into(), "a b".into()];
        assert_eq!(command(words.clone(), true), words);
        assert_eq!(command(words, false), ["/bin/sh", "-c", "exec \"$@\"", "sh", "ls", "-l", "a b"]);
    }
}
