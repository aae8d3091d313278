//! `image send`, `recv` and `have`: images from node to node over a pipe.

use std::io::{IsTerminal, Read, Write};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Arg, ArgMatches};

use super::client::{Client, called};
use super::output::say;
use super::{Command, Context, required, string};
use crate::api::local;

/// Bytes of one message.
const PIECE: usize = 256 << 10;
/// Messages that wait.
const QUEUE: usize = 4;
/// Longest list of layers, in bytes.
const HAVE_MAX: u64 = 64 << 20;

pub(super) struct Image;

#[async_trait::async_trait]
impl Command for Image {
    fn name(&self) -> &'static str {
        "image"
    }
    fn about(&self) -> &'static str {
        "Pass images from node to node: `image send REF | ssh NODE proxmox-lxcri image recv` (driver zfs)"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![
            required("VERB", "send (to stdout), recv (from stdin), have (lists this node's layers, also those that are here in part)")
                .value_parser(["send", "recv", "have"]),
            Arg::new("IMAGE").help("Of `send`: reference or id"),
            Arg::new("since")
                .long("since")
                .value_name("IMAGE")
                .help("Leave out what the other node has of this image, which is from here"),
            Arg::new("have")
                .long("have")
                .value_name("FILE")
                .help("Leave out what the other node has: what its `image have` printed. Goes on with a layer that was cut"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let verb = string(matches, "VERB");
        let only_send = ["IMAGE", "since", "have"].iter().any(|name| matches.contains_id(name));
        ensure!(verb == "send" || !only_send, "image {verb}: takes no arguments");
        let mut client = Client::connect(&context.local_socket).await?;
        match verb.as_str() {
            "send" => send(&mut client, matches).await?,
            "recv" => {
                let image = receive(&mut client).await?;
                say!("{}  {}", image.id, image.repo_tags.join(" "))?;
            }
            "have" => {
                for layer in called(client.local.list_layers(local::ListLayersRequest {}).await)?.layers {
                    match layer.part.as_str() {
                        "" => say!("{} {}", layer.chain, layer.state)?,
                        token => say!("{} part {token}", layer.chain)?,
                    }
                }
            }
            verb => bail!("image {verb}: no such verb"),
        }
        Ok(0)
    }
}

async fn send(client: &mut Client, matches: &ArgMatches) -> Result<()> {
    let image = string(matches, "IMAGE");
    ensure!(!image.is_empty(), "image send: an image is needed");
    let mut out = std::io::stdout();
    ensure!(!out.is_terminal(), "image send: this is for a pipe or a file, not for a terminal");
    let have = match matches.get_one::<String>("have") {
        Some(path) => layers(path).with_context(|| format!("--have {path}"))?,
        None => Vec::new(),
    };
    let request = local::SendImageRequest { image, since: string(matches, "since"), have };
    let mut pieces = called(client.local.send_image(request).await)?;
    while let Some(piece) = pieces.message().await.map_err(|s| anyhow::anyhow!("{}", s.message()))? {
        out.write_all(&piece.data).context("write the image")?;
    }
    out.flush().context("write the image")
}

/// What another node's `image have` printed.
fn layers(path: &str) -> Result<Vec<local::LayerState>> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(HAVE_MAX).read_to_string(&mut text)?;
    let parse = |line: &str| {
        let (chain, state) = line.split_once(' ').with_context(|| format!("{line:?} is no layer"))?;
        let (state, part) = match state.strip_prefix("part ") {
            Some(token) => ("", token),
            None => (state, ""),
        };
        Ok(local::LayerState { chain: chain.to_owned(), state: state.to_owned(), part: part.to_owned() })
    };
    text.lines().map(parse).collect()
}

async fn receive(client: &mut Client) -> Result<local::LoadedImage> {
    ensure!(!std::io::stdin().is_terminal(), "image recv: reads what `image send` writes from its standard input");
    let (sender, pieces) = tokio::sync::mpsc::channel(QUEUE);
    let (done, read) = tokio::sync::oneshot::channel();
    // A thread of its own: what still waits for input must not keep this program from its end.
    let reading = std::thread::Builder::new().name("stdin".into());
    reading.spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut buffer = vec![0; PIECE];
        let result = loop {
            match input.read(&mut buffer) {
                Ok(0) => break Ok(()),
                // The daemon does not want more: its answer says why.
                Ok(n) if sender.blocking_send(local::ImagePiece { data: buffer[..n].to_vec() }).is_err() => {
                    break Ok(());
                }
                Ok(_) => {}
                Err(e) => break Err(e),
            }
        };
        let _ = done.send(result);
    })?;
    let stream = tokio_stream::wrappers::ReceiverStream::new(pieces);
    let answer = called(client.local.receive_image(stream).await);
    match answer {
        Ok(answer) => {
            read.await.context("read the image")?.context("read the image")?;
            answer.image.context("the daemon told no image")
        }
        Err(e) => Err(e),
    }
}
