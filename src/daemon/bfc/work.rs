//! The verbs of `bfc` that make or read something: pack, import, create, extract, verify.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail, ensure};
use camino::Utf8Path;
use clap::ArgMatches;

use super::show::{name as shown, print};
use super::{path, text};
use crate::api::local;
use crate::cli::Context;
use crate::cli::client::{Client, is_file_source};
use crate::core::error::Error;
use crate::core::reference::Reference;
use crate::integrations::bfc::{self, Compress, Container, ExtractOptions, KeySource, Kind, WriteOptions};
use crate::integrations::images::pack::{PackSource, pack as pack_images};
use crate::utils::tasks::TaskSet;

pub(super) fn plain(e: impl Into<Error>) -> anyhow::Error {
    anyhow!(e.into().chain())
}

/// The key that the flags name: `password` is the flag for one as it is.
fn key(matches: &ArgMatches, password: &str) -> Result<Option<KeySource>> {
    let given = [
        matches.try_get_one::<String>(password).ok().flatten().map(|text| KeySource::password(text)),
        text(matches, "keyfile").map(|path| KeySource::key_file(Utf8Path::new(&path))),
        text(matches, "password-file").map(|path| KeySource::password_file(Utf8Path::new(&path))),
    ];
    let mut given = given.into_iter().flatten();
    let key = given.next().transpose().map_err(plain)?;
    ensure!(given.next().is_none(), "a password and a key: one of them");
    Ok(key)
}

/// Where it can't be said, it can't be helped.
fn complain(what: &str) {
    let _ = writeln!(std::io::stderr(), "proxmox-lxcri: {what}");
}

fn says(matches: &ArgMatches) -> bool {
    !matches.get_flag("quiet")
}

pub(super) fn open(matches: &ArgMatches) -> Result<Container> {
    Container::open(&path(matches, "FILE")).map_err(plain)
}

pub(super) async fn pack(context: &Context, matches: &ArgMatches) -> Result<u8> {
    let mut images: Vec<String> = matches.get_many::<String>("IMAGES").into_iter().flatten().cloned().collect();
    let target = images.pop().unwrap_or_default();
    ensure!(!images.is_empty(), "bfc pack: an image and the container to make are needed");
    let looks_like_image = is_file_source(&target) || !target.ends_with(".bfc");
    ensure!(!looks_like_image, "bfc pack: {target:?} does not end in .bfc: the container comes last");
    let name = text(matches, "as");
    ensure!(name.is_none() || images.len() == 1, "--as names one image");
    let default = &context.config.images.default_registry;
    let name = name.map(|n| Reference::parse(&n, default)).transpose().map_err(plain)?;
    let mut sources = Vec::new();
    for image in &images {
        sources.push(if is_file_source(image) {
            let (kind, path) = image.split_once(':').unwrap_or((image, ""));
            let absolute = std::path::absolute(path)?;
            let source = format!("{kind}:{}", absolute.display());
            PackSource::Local(crate::cri::image::source(&source, None).map_err(plain)?, name.clone())
        } else {
            ensure!(name.is_none(), "--as names an image from a file; {image} has a name");
            PackSource::Registry(Reference::parse(image, default).map_err(plain)?)
        });
    }
    let key = key(matches, "encrypt")?;
    let options = WriteOptions {
        level: matches.get_one::<i32>("zstd").copied().unwrap_or(3),
        force: matches.get_flag("force"),
        // Encrypted twice, the same bytes must differ.
        deterministic: if key.is_some() { None } else { Some(0) },
        key,
        ..WriteOptions::default()
    };
    let tasks = TaskSet::new("unpack");
    let unpacker = crate::daemon::storage::unpacker(&context.config, &tasks).await.map_err(plain)?;
    let config = crate::daemon::images_config(&context.config, unpacker).map_err(plain)?;
    let scratch = tempfile_folder(Utf8Path::new(&target));
    let done = pack_images(&config, sources, Utf8Path::new(&target), options, &scratch).await;
    tasks.shutdown().await;
    let (packed, size) = done.map_err(plain)?;
    if says(matches) {
        let mut said = String::new();
        for image in &packed {
            let name = image.name.as_deref().unwrap_or("(no name)");
            let _ = writeln!(said, "{}  {name}  {} bytes", image.digest, image.size);
        }
        print(&format!("{said}{target}: {size} bytes\n"))?;
    }
    Ok(0)
}

/// Where a compressed archive may be expanded: beside the target, where its blobs go anyway.
fn tempfile_folder(target: &Utf8Path) -> camino::Utf8PathBuf {
    match target.parent() {
        Some(folder) if !folder.as_str().is_empty() => folder.to_owned(),
        _ => ".".into(),
    }
}

pub(super) async fn import(context: &Context, matches: &ArgMatches) -> Result<u8> {
    let mut client = Client::connect(&context.local_socket).await?;
    let images = client
        .load_all(local::LoadImageRequest {
            source: format!("bfc:{}", path(matches, "FILE")),
            name: text(matches, "tag").unwrap_or_default(),
            key_file: text(matches, "keyfile").unwrap_or_default(),
            password_file: text(matches, "password-file").unwrap_or_default(),
            pin: matches.get_flag("pin"),
        })
        .await?;
    if says(matches) {
        for image in images {
            print(&format!("{}  {}\n", image.id, image.repo_tags.join(" ")))?;
        }
    }
    Ok(0)
}

pub(super) fn create(matches: &ArgMatches) -> Result<u8> {
    let target = path(matches, "OUT");
    let inputs: Vec<PathBuf> = matches.get_many::<PathBuf>("IN").into_iter().flatten().cloned().collect();
    let deterministic = match (matches.get_flag("deterministic"), std::env::var("SOURCE_DATE_EPOCH")) {
        (false, _) => None,
        (true, Err(_)) => Some(0),
        (true, Ok(seconds)) => {
            let seconds = seconds.parse::<u64>().ok().and_then(|s| s.checked_mul(1_000_000_000));
            Some(seconds.ok_or_else(|| anyhow!("SOURCE_DATE_EPOCH is no number of seconds"))?)
        }
    };
    let options = WriteOptions {
        compress: match text(matches, "compression").as_deref() {
            Some("zstd") => Compress::Always,
            Some("auto") => Compress::Auto,
            _ => Compress::Never,
        },
        level: matches.get_one::<i32>("compression-level").copied().unwrap_or(3),
        threshold: matches.get_one::<u64>("compression-threshold").copied().unwrap_or(64),
        block_size: matches.get_one::<u32>("block-size").copied().unwrap_or(4096),
        key: key(matches, "encrypt")?,
        deterministic,
        force: matches.get_flag("force"),
        ..WriteOptions::default()
    };
    let verbose = matches.get_flag("verbose");
    let created = bfc::create(&target, &inputs, options, &mut |name, kind| {
        if verbose {
            let slash = if kind == Kind::Folder { "/" } else { "" };
            // Whether anybody hears it changes nothing.
            let _ = print(&format!("Added: {}{slash}\n", shown(name)));
        }
    });
    let created = created.map_err(plain)?;
    for path in &created.skipped {
        complain(&format!("left out, since no container can hold it: {}", shown(path.as_os_str().as_bytes())));
    }
    for path in &created.own {
        complain(&format!("left out, since it is the container itself: {}", shown(path.as_os_str().as_bytes())));
    }
    if says(matches) {
        print(&format!("{target}: {} entries, {} bytes\n", created.entries, created.size))?;
    }
    Ok(0)
}

pub(super) fn extract(matches: &ArgMatches) -> Result<u8> {
    let mut container = open(matches)?;
    if let Some(key) = key(matches, "password")? {
        container.unlock(&key).map_err(plain)?;
    }
    let options = ExtractOptions {
        force: matches.get_flag("force"),
        keep_paths: matches.get_flag("keep-paths"),
        paths: matches.get_many::<OsString>("PATHS").into_iter().flatten().map(|p| p.as_bytes().to_vec()).collect(),
    };
    let directory = matches.get_one::<PathBuf>("directory").cloned().unwrap_or_else(|| ".".into());
    let verbose = matches.get_flag("verbose");
    let count = bfc::extract(&container, &directory, &options, &mut |name, _| {
        if verbose {
            let _ = print(&format!("Extracted: {}\n", shown(name)));
        }
    });
    let count = count.map_err(plain)?;
    if says(matches) {
        print(&format!("{count} entries extracted into {}\n", shown(directory.as_os_str().as_bytes())))?;
    }
    Ok(0)
}

pub(super) fn verify(matches: &ArgMatches) -> Result<u8> {
    let mut container = open(matches)?;
    let deep = matches.get_flag("deep");
    match key(matches, "password")? {
        Some(key) => container.unlock(&key).map_err(plain)?,
        None if deep && container.entries().iter().any(|e| e.encrypted) => {
            bail!("its content is encrypted: --deep needs --keyfile or --password-file");
        }
        None => {}
    }
    let progress = matches.get_flag("progress");
    let found = bfc::verify(&container, deep, &mut |entry| {
        if progress {
            let _ = writeln!(std::io::stderr(), "{}", shown(&entry.path));
        }
    });
    for problem in &found.problems {
        complain(&chain(problem));
    }
    if !found.problems.is_empty() {
        complain(&format!("{}: problems found: {}", path(matches, "FILE"), found.problems.len()));
        return Ok(1);
    }
    if says(matches) {
        let what = if deep { format!("{} bytes of content read", found.bytes) } else { "content not read".into() };
        print(&format!("{}: sound, {} entries, {what}\n", path(matches, "FILE"), found.entries))?;
    }
    Ok(0)
}

fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {}", chain(cause)))
}
