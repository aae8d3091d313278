//! `export` and `import`: images to and from archives.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Arg, ArgAction, ArgMatches};

use super::client::{Client, called, is_file_source};
use super::output::print;
use super::{Command, Context, required, string, switch};
use crate::api::local;
use crate::utils::newfile::NewFile;

pub(super) struct Export;

#[async_trait::async_trait]
impl Command for Export {
    fn name(&self) -> &'static str {
        "export"
    }
    fn about(&self) -> &'static str {
        "Write an image as an OCI archive. Its layers are written anew, so that its id may be another one there"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required("IMAGE", "Reference or id; a reference is its name in the archive"),
            required("FILE", "The archive, or - for standard output"),
            switch("force", Some('f'), "Replace the file"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let (image, path) = (string(matches, "IMAGE"), string(matches, "FILE"));
        let mut client = Client::connect(&context.local_socket).await?;
        let request = local::ExportImageRequest { image };
        if path == "-" {
            let mut out = std::io::stdout();
            ensure!(!out.is_terminal(), "export: this is for a pipe or a file, not for a terminal");
            copy(called(client.local.export_image(request).await)?, &mut out).await?;
            return Ok(0);
        }
        let path = std::path::absolute(&path).with_context(|| format!("path {path:?}"))?;
        let name = path.file_name().with_context(|| format!("{path:?} has no name"))?;
        let name = std::ffi::CString::new(std::os::unix::ffi::OsStrExt::as_bytes(name))?;
        let force = matches.get_flag("force");
        ensure!(force || path.symlink_metadata().is_err(), "{} is there already (--force replaces it)", path.display());
        let folder = path.parent().unwrap_or(Path::new("/"));
        let folder = File::open(folder).with_context(|| folder.display().to_string())?;
        // It appears whole or not at all.
        let new =
            NewFile::create(std::os::fd::AsFd::as_fd(&folder), 0o644).with_context(|| path.display().to_string())?;
        let bytes = copy(called(client.local.export_image(request).await)?, &mut new.file()).await?;
        new.place(&name, force).with_context(|| path.display().to_string())?;
        print(&format!("{}  {bytes} bytes\n", path.display()))?;
        Ok(0)
    }
}

async fn copy(mut pieces: tonic::Streaming<local::ImagePiece>, out: &mut (dyn Write + Send)) -> Result<u64> {
    let mut bytes = 0;
    while let Some(piece) = pieces.message().await.map_err(|s| anyhow::anyhow!("{}", s.message()))? {
        out.write_all(&piece.data).context("writing the archive")?;
        bytes += piece.data.len() as u64;
    }
    out.flush().context("writing the archive")?;
    Ok(bytes)
}

pub(super) struct Import;

#[async_trait::async_trait]
impl Command for Import {
    fn name(&self) -> &'static str {
        "import"
    }
    fn about(&self) -> &'static str {
        "Take the images of an OCI layout or archive, of what `docker save` writes, or of a BFC container"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required(
                "FILE",
                "The folder or file; oci:DIR[:NAME], oci-archive:FILE, docker-archive:FILE and bfc:FILE[:NAME] say what it is",
            ),
            Arg::new("as").long("as").value_name("REFERENCE").help("Name for the image (one image)"),
            Arg::new("keyfile").long("keyfile").short('K').value_name("FILE").help("Key of an encrypted container"),
            Arg::new("password-file")
                .long("password-file")
                .value_name("FILE")
                .help("Password of an encrypted container"),
            Arg::new("pin")
                .long("pin")
                .action(ArgAction::SetTrue)
                .help("Keep them from a kubelet's garbage collection"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let file = string(matches, "FILE");
        let source = match is_file_source(&file) {
            true => file,
            false => format!("{}:{file}", kind(&PathBuf::from(&file))?),
        };
        let mut client = Client::connect(&context.local_socket).await?;
        let request = local::LoadImageRequest {
            source,
            name: string(matches, "as"),
            key_file: string(matches, "keyfile"),
            password_file: string(matches, "password-file"),
            pin: matches.get_flag("pin"),
        };
        for image in client.load_all(request).await? {
            print(&format!("{}  {}\n", image.id, image.repo_tags.join(" ")))?;
        }
        Ok(0)
    }
}

/// What a folder or file is.
fn kind(path: &Path) -> Result<&'static str> {
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    if meta.is_dir() {
        ensure!(path.join("oci-layout").try_exists()?, "{}: a folder without an oci-layout", path.display());
        return Ok("oci");
    }
    ensure!(meta.is_file(), "{}: not a file or folder", path.display());
    let mut start = [0; 8];
    let got = File::open(path)?.read(&mut start).with_context(|| path.display().to_string())?;
    if got == 8 && &start == b"BFCFv1\0\0" {
        return Ok("bfc");
    }
    let names = names(path).with_context(|| format!("{}: no archive of images", path.display()))?;
    // An archive for both has the original digests in its layout.
    for (name, kind) in [("index.json", "oci-archive"), ("manifest.json", "docker-archive")] {
        if names.iter().any(|n| n == name) {
            return Ok(kind);
        }
    }
    bail!("{}: an archive with neither index.json nor manifest.json", path.display())
}

/// The first names at the archive's root; of one that is compressed, too.
fn names(path: &Path) -> Result<Vec<String>> {
    let mut file = std::io::BufReader::new(File::open(path)?);
    let start: Vec<u8> = std::io::BufRead::fill_buf(&mut file)?.iter().take(4).copied().collect();
    let data: Box<dyn Read> = match start.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(file)?),
        _ => Box::new(file),
    };
    let mut names = Vec::new();
    for entry in tar::Archive::new(data).entries()? {
        let name = entry?.path()?.to_string_lossy().into_owned();
        names.push(name.trim_start_matches("./").to_owned());
    }
    Ok(names)
}
