//! `bfc`: Binary File Containers on the command line: pack images into one, take them from one, and what the format's own
//! tool does (create, list, info, verify, extract), with its flags.
//!
//! Only `import` speaks to the daemon. Fails with 1 and the reason; an output file is there when it is whole.

mod show;
mod work;

use anyhow::{Result, bail};
use clap::{Arg, ArgAction, ArgMatches, value_parser};

use crate::cli::{Command, Context};

/// The command.
pub struct Bfc;

fn flag(name: &'static str, short: char, help: &'static str) -> Arg {
    Arg::new(name).long(name).short(short).action(ArgAction::SetTrue).help(help)
}

fn value(name: &'static str, short: Option<char>, value: &'static str, help: &'static str) -> Arg {
    let arg = Arg::new(name).long(name).value_name(value).help(help);
    short.map_or(arg.clone(), |c| arg.short(c))
}

fn container() -> Arg {
    Arg::new("FILE").required(true).value_name("FILE").help("The container")
}

/// A path in a container: bytes, which need not be text.
fn entry(name: &'static str) -> Arg {
    Arg::new(name).value_parser(value_parser!(std::ffi::OsString))
}

fn password_file() -> Arg {
    value("password-file", None, "FILE", "The password, in a file (not seen by others, as an argument is)")
}

#[async_trait::async_trait]
impl Command for Bfc {
    fn name(&self) -> &'static str {
        "bfc"
    }

    fn about(&self) -> &'static str {
        "Images and files in Binary File Containers, for nodes without a registry"
    }

    /// Before the verb, where the format's own tool has them, or after it.
    fn arguments(&self) -> Vec<Arg> {
        [flag("verbose", 'v', "Say more"), flag("quiet", 'q', "Say nothing but errors")].map(|a| a.global(true)).into()
    }

    fn subcommands(&self) -> Vec<clap::Command> {
        let verb = |name: &'static str, about: &'static str| clap::Command::new(name).about(about);
        let level = value("zstd", None, "N", "Level of compression of manifests and configs, 1 to 22")
            .value_parser(value_parser!(i32).range(1..=22))
            .default_value("3");
        vec![
            verb("pack", "Pack images into a container, their blobs as they are")
                .arg(flag("force", 'f', "Replace the container"))
                .arg(level)
                .arg(value("encrypt", Some('e'), "PASSWORD", "Encrypt with this password"))
                .arg(value("keyfile", Some('k'), "FILE", "Encrypt with the key in this file (32 bytes)"))
                .arg(password_file())
                .arg(value("as", None, "REFERENCE", "Name of the image inside (one image)"))
                .arg(
                    Arg::new("IMAGES")
                        .required(true)
                        .num_args(1..)
                        .action(ArgAction::Append)
                        .value_name("IMAGE... OUT.bfc")
                        .help("References (fetched from their registries), oci:DIR[:NAME], oci-archive:FILE or bfc:FILE; then the container"),
                ),
            verb("import", "Take the images of a container into the node's store")
                .arg(value("tag", None, "REFERENCE", "Name for the image (one image)"))
                .arg(value("keyfile", Some('K'), "FILE", "Key of an encrypted container (default: the configuration's)"))
                .arg(password_file())
                .arg(flag("pin", 'P', "Keep the images from a kubelet's garbage collection"))
                .arg(container()),
            verb("create", "Make a container of files and folders")
                .arg(
                    value("block-size", Some('b'), "SIZE", "Written into the header")
                        .value_parser(value_parser!(u32))
                        .default_value("4096"),
                )
                .arg(flag("force", 'f', "Replace the container"))
                .arg(
                    value("compression", Some('c'), "TYPE", "none, zstd, or auto (what a sample says gets smaller)")
                        .value_parser(["none", "zstd", "auto"])
                        .default_value("none"),
                )
                .arg(
                    value("compression-level", Some('l'), "N", "1 to 22")
                        .value_parser(value_parser!(i32).range(1..=22))
                        .default_value("3"),
                )
                .arg(
                    value("compression-threshold", Some('t'), "BYTES", "Store smaller files as they are")
                        .value_parser(value_parser!(u64))
                        .default_value("64"),
                )
                .arg(value("encrypt", Some('e'), "PASSWORD", "Encrypt with this password"))
                .arg(value("keyfile", Some('k'), "FILE", "Encrypt with the key in this file (32 bytes)"))
                .arg(password_file())
                .arg(
                    Arg::new("deterministic")
                        .long("deterministic")
                        .action(ArgAction::SetTrue)
                        .help("The same files give the same bytes: times are SOURCE_DATE_EPOCH or 0"),
                )
                .arg(Arg::new("OUT").required(true).value_name("OUT.bfc").help("The container"))
                .arg(
                    Arg::new("IN")
                        .required(true)
                        .num_args(1..)
                        .action(ArgAction::Append)
                        .value_parser(value_parser!(std::path::PathBuf))
                        .help("Files and folders"),
                ),
            verb("list", "List the entries of a container")
                .arg(flag("long", 'l', "With type, permissions, size and time (UTC)"))
                .arg(flag("size", 's', "With sizes"))
                .arg(flag("checksum", 'c', "With checksums"))
                .arg(container())
                .arg(entry("PATH").help("Only this entry and what is below it")),
            verb("info", "Tell about a container or an entry")
                .arg(flag("detailed", 'd', "With all entries"))
                .arg(container())
                .arg(entry("PATH").help("Only this entry")),
            verb("verify", "Look whether a container is sound")
                .arg(
                    Arg::new("deep")
                        .long("deep")
                        .action(ArgAction::SetTrue)
                        .help("Read all content and compare its checksums"),
                )
                .arg(flag("progress", 'p', "Say what is looked at"))
                .arg(value("keyfile", Some('K'), "FILE", "Key of an encrypted container (32 bytes)"))
                .arg(password_file())
                .arg(container()),
            verb("extract", "Write entries to disk")
                .arg(
                    value("directory", Some('C'), "DIR", "Where to")
                        .value_parser(value_parser!(std::path::PathBuf))
                        .default_value("."),
                )
                .arg(flag("force", 'f', "Replace what is there"))
                .arg(flag("keep-paths", 'k', "Make the entries' folders; else all files land in one"))
                .arg(value("password", Some('p'), "PASSWORD", "Password of an encrypted container"))
                .arg(value("keyfile", Some('K'), "FILE", "Key of an encrypted container (32 bytes)"))
                .arg(password_file())
                .arg(container())
                .arg(entry("PATHS").num_args(0..).action(ArgAction::Append).help("Only these entries and what is below them")),
        ]
    }

    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        match matches.subcommand() {
            Some(("pack", m)) => work::pack(context, m).await,
            Some(("import", m)) => work::import(context, m).await,
            Some((verb, m)) => {
                let (verb, m) = (verb.to_owned(), m.clone());
                tokio::task::spawn_blocking(move || match verb.as_str() {
                    "create" => work::create(&m),
                    "extract" => work::extract(&m),
                    "verify" => work::verify(&m),
                    "list" => show::list(&m),
                    "info" => show::info(&m),
                    verb => bail!("bfc {verb}: no such verb"),
                })
                .await?
            }
            None => bail!("bfc: no verb"),
        }
    }
}

fn text(matches: &ArgMatches, name: &str) -> Option<String> {
    matches.get_one::<String>(name).cloned()
}

fn path(matches: &ArgMatches, name: &str) -> camino::Utf8PathBuf {
    text(matches, name).unwrap_or_default().into()
}
