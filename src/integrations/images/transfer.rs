//! Images from node to node as one stream: `image send` writes it, `image recv` reads it.
//!
//! ```text
//! "lxcri-image-1\n", then frames: kind (1 byte), length (4 bytes, big endian), content
//!   H  what the image is (JSON, first)              D  a piece of the layer's own stream (the driver's: `zfs send`)
//!   L  a layer begins: its place, big endian        E  it ends: SHA-256 of its pieces
//!   R  like L, where an earlier stream was cut: its place, and the token that the receiving node gave (the driver's)
//!   Z  all ends: SHA-256 of every byte before this frame
//! ```
//! Called by the store. What comes in is not trusted as far as the framing goes: kinds, lengths and order are checked, everything
//! is capped, a layer counts when its digest fits, the image when the last one does. What a driver makes of its own
//! stream's content is another matter: who is received from is trusted like one who may pull here. Fails by name. A
//! stream that ends early leaves whole layers that no image names, and where the driver can the beginning of one more, which
//! the next try does not need again; they go with the next collection of layers.

use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::assemble::Plan;
use super::commit::plain_layer;
use super::ends::{Incoming, Outgoing, Pieces, Produced};
use super::manifest::{self, Descriptor, MAX_LAYERS};
use super::source::{LayerBytes, Source};
use super::{Inner, blocking};
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, LayerState, SendImage, StreamFrom, Usage};
use crate::core::reference::Reference;
use crate::integrations::layers::pipeline::digest_of;
use crate::integrations::registry::MAX_CONFIG;

const MAGIC: &[u8] = b"lxcri-image-1\n";
/// Largest piece of a layer, in bytes.
const PIECE: usize = 256 << 10;
/// Largest frame that is taken.
const MAX_FRAME: usize = 1 << 20;
/// Longest token of a layer that is here in part, in bytes.
const MAX_TOKEN: usize = 4096;
/// Largest description of an image that is taken.
const MAX_HEADER: usize = 16 << 20;
/// Largest layer that is taken.
const MAX_LAYER: u64 = 1 << 40;
/// Names that one image may have.
const MAX_NAMES: usize = 100;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// Whose streams the layers are.
    driver: String,
    names: Vec<String>,
    /// The config, base64.
    config: String,
    /// Base first.
    layers: Vec<HeaderLayer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderLayer {
    diff_id: String,
    bytes: u64,
    inodes: u64,
    /// It comes with this stream; else it has to be there.
    sent: bool,
}

/// What one layer is sent as.
#[derive(Debug, PartialEq, Eq)]
enum How {
    /// The other side has it.
    Not,
    /// On its parent, which the other side has in the same state.
    OnParent,
    Whole,
    /// The other side has its beginning: the token.
    Rest(String),
}

/// `have`: layers of the other side; None: not known, and taken to be none.
fn plan(chains: &[Digest], states: &[String], have: &[LayerState]) -> Vec<How> {
    let there = |n: usize| have.iter().filter(move |l| l.chain == chains[n]);
    let state_there = |n: usize| there(n).find(|l| l.part.is_none()).map(|l| &l.state);
    let mut all = Vec::new();
    for n in 0..chains.len() {
        let part = there(n).find_map(|l| l.part.clone());
        all.push(match (state_there(n), n.checked_sub(1)) {
            (Some(_), _) => How::Not,
            (None, _) if part.is_some() => How::Rest(part.unwrap_or_default()),
            (None, None) => How::Whole,
            // Sent before it, or there in the state that ours has.
            (None, Some(parent)) => match all[parent] != How::Not || state_there(parent) == Some(&states[parent]) {
                true => How::OnParent,
                false => How::Whole,
            },
        });
    }
    all
}

/// Writes frames, and sums all that it writes.
struct Framer<W> {
    out: W,
    sum: Sha256,
}

impl<W: Write> Framer<W> {
    fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.out.write_all(bytes)
    }

    fn frame(&mut self, kind: u8, content: &[u8]) -> io::Result<()> {
        let length = u32::try_from(content.len()).map_err(|_| io::Error::other("a frame is too long"))?;
        self.raw(&[kind])?;
        self.raw(&length.to_be_bytes())?;
        self.raw(content)
    }

    fn end(mut self) -> io::Result<()> {
        let sum = self.sum.clone().finalize();
        self.frame(b'Z', &sum)?;
        self.out.flush()
    }
}

/// Reads frames, and sums all that it reads.
struct Unframer<R> {
    input: R,
    sum: Sha256,
}

fn malformed(why: impl std::fmt::Display) -> Error {
    Error::invalid(format!("this is no image stream, or a damaged one: {why}"))
}

fn read_failed(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => malformed("it ends too early"),
        _ => failed("reading the image stream", e),
    }
}

fn failed(what: &str, e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::TimedOut => Error::because(Kind::DeadlineExceeded, "the image stream stands still", e),
        _ => Error::io(what, e),
    }
}

impl<R: Read> Unframer<R> {
    fn open(input: R) -> Result<Self> {
        let mut frames = Self { input, sum: Sha256::new() };
        let mut magic = [0; MAGIC.len()];
        frames.input.read_exact(&mut magic).map_err(read_failed)?;
        if magic != MAGIC {
            return Err(malformed("it begins with something else"));
        }
        frames.sum.update(magic);
        Ok(frames)
    }

    /// The next frame's content goes into `content`; its kind, and the sum of all before it.
    fn next(&mut self, content: &mut Vec<u8>, max: usize) -> Result<(u8, [u8; 32])> {
        let before: [u8; 32] = self.sum.clone().finalize().into();
        let mut head = [0; 5];
        self.input.read_exact(&mut head).map_err(read_failed)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if length > max {
            return Err(malformed(format!("a frame of {length} bytes")));
        }
        content.resize(length, 0);
        self.input.read_exact(content).map_err(read_failed)?;
        self.sum.update(head);
        self.sum.update(content.as_slice());
        Ok((head[0], before))
    }

    /// Copies a layer's pieces up to its end, which has to have their digest.
    fn layer(&mut self, out: &mut dyn Write, content: &mut Vec<u8>) -> Result<()> {
        let (mut sum, mut total, mut written) = (Sha256::new(), 0u64, Ok(()));
        loop {
            let (kind, _) = self.next(content, MAX_FRAME)?;
            match kind {
                b'D' => {
                    total += content.len() as u64;
                    if total > MAX_LAYER {
                        return Err(malformed(format!("a layer of more than {MAX_LAYER} bytes")));
                    }
                    sum.update(content.as_slice());
                    if written.is_ok() {
                        written = out.write_all(content);
                    }
                    written = match written {
                        Err(e) if e.kind() == io::ErrorKind::TimedOut => return Err(read_failed(e)),
                        other => other,
                    };
                }
                b'E' if content.as_slice() == sum.clone().finalize().as_slice() => {
                    // Whoever did not take all of it says why by himself.
                    return written.or_else(|e| match e.kind() {
                        io::ErrorKind::BrokenPipe => Ok(()),
                        _ => Err(Error::io("passing a layer on", e)),
                    });
                }
                b'E' => return Err(malformed("a layer's digest does not fit")),
                other => return Err(malformed(format!("a frame {other:#04x} in a layer"))),
            }
        }
    }
}

/// The token that the layer at place `n` goes on at, if it does; an error if this is not its beginning.
fn begins(kind: u8, content: &[u8], n: usize) -> Result<Option<String>> {
    let misplaced = || malformed("a layer is not where it should be");
    let place = u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes();
    let token = content.strip_prefix(&place).ok_or_else(misplaced)?;
    match kind {
        b'L' if token.is_empty() => Ok(None),
        b'R' if !token.is_empty() => {
            let token = std::str::from_utf8(token).map_err(|_| malformed("a token that is no text"))?;
            Ok(Some(token.to_owned()))
        }
        _ => Err(misplaced()),
    }
}

/// What a stream says of its layers' sizes is added up and shown later: none may be larger than a layer can be.
fn sizes_fit(layers: &[HeaderLayer]) -> Result<()> {
    match layers.iter().any(|l| l.bytes > MAX_LAYER || l.inodes > MAX_LAYER) {
        true => Err(malformed(format!("its header: a layer of more than {MAX_LAYER} bytes"))),
        false => Ok(()),
    }
}

/// Nothing is fetched: all layers are there when the image is made.
struct Nowhere;

#[async_trait::async_trait]
impl Source for Nowhere {
    async fn blob(&self, blob: &Descriptor, _max: u64) -> Result<Bytes> {
        Err(Error::internal(format!("blob {} was not sent", blob.digest)))
    }
    async fn layer(&self, layer: &Descriptor, _after: Option<usize>) -> Result<Option<LayerBytes>> {
        Err(Error::new(Kind::Aborted, format!("layer {} was removed meanwhile", layer.digest)))
    }
}

/// A header that was checked.
struct Described {
    names: Vec<Reference>,
    config: Bytes,
    diff_ids: Vec<Digest>,
    chains: Vec<Digest>,
    layers: Vec<HeaderLayer>,
}

impl Inner {
    /// Sends an image into `out`. DeadlineExceeded when nobody takes anything for the time that a pull may stand still.
    pub(super) async fn send_image(
        self: &Arc<Self>,
        wanted: SendImage,
        out: mpsc::Sender<Result<Bytes>>,
    ) -> Result<()> {
        let not_here = |name: &str| Error::not_found(format!("image {name:?} is not here"));
        let record = |name: &str| {
            let id = self.find(name).ok_or_else(|| not_here(name))?;
            self.read().get(&id).map(|(record, _)| record.clone()).ok_or_else(|| not_here(name))
        };
        let image = record(&wanted.image)?;
        let chains: Vec<Digest> = image.layers.iter().map(|l| l.chain.clone()).collect();
        let _lease = self.lease(&chains).await;
        let all = self.layers.layer_states()?;
        let state = |chain: &Digest| {
            let found = all.iter().find(|l| l.chain == *chain).map(|l| l.state.clone());
            found.ok_or_else(|| Error::new(Kind::Aborted, format!("layer {chain} was removed meanwhile")))
        };
        let ours = chains.iter().map(state).collect::<Result<Vec<String>>>()?;
        let mut have = wanted.have;
        if let Some(since) = &wanted.since {
            let since = record(since)?;
            // The other side has it from here: in the same state.
            let both = chains.iter().zip(&ours).filter(|(c, _)| since.layers.iter().any(|l| l.chain == **c));
            have.extend(both.map(|(chain, state)| LayerState {
                chain: chain.clone(),
                state: state.clone(),
                part: None,
            }));
        }
        let mut fitting = Vec::new();
        for there in have.into_iter().filter(|l| chains.contains(&l.chain)) {
            if let Some(token) = &there.part
                && let Err(e) = self.layers.can_go_on(&there.chain, token).await
            {
                tracing::info!(layer = %there.chain, error = e.chain(), "sent from its beginning");
                continue;
            }
            fitting.push(there);
        }
        let have = fitting;
        let how = plan(&chains, &ours, &have);
        let path = self.disk.blob_path(&image.id);
        let config = blocking(move || std::fs::read(&path).map_err(|e| Error::io(&path, e))).await?;
        let header = Header {
            driver: self.layers.driver().into(),
            names: image.repo_tags.clone(),
            config: BASE64_STANDARD.encode(&config),
            layers: image
                .layers
                .iter()
                .zip(&how)
                .map(|(l, how)| HeaderLayer {
                    diff_id: l.diff_id.to_string(),
                    bytes: l.usage.bytes,
                    inodes: l.usage.inodes,
                    sent: *how != How::Not,
                })
                .collect(),
        };
        let header = serde_json::to_vec(&header).map_err(|e| Error::because(Kind::Internal, "an image's header", e))?;
        let runtime = tokio::runtime::Handle::current();
        let store = self.clone();
        blocking(move || {
            let failed = |e| failed("sending the image", e);
            let idle = store.config.progress_timeout;
            let client = out.clone();
            let pieces = Pieces { out, runtime: runtime.clone(), idle, stalled: false };
            let mut frames = Framer { out: BufWriter::with_capacity(2 * PIECE, pieces), sum: Sha256::new() };
            frames.raw(MAGIC).and_then(|()| frames.frame(b'H', &header)).map_err(failed)?;
            for (n, how) in how.iter().enumerate().filter(|(_, how)| **how != How::Not) {
                let place = u32::try_from(n).map_err(|_| Error::internal("too many layers"))?.to_be_bytes();
                let (kind, from) = match how {
                    How::Rest(token) => (b'R', StreamFrom::Cut(token.clone())),
                    How::OnParent => (b'L', StreamFrom::Parent(chains[n - 1].clone())),
                    How::Not | How::Whole => (b'L', StreamFrom::Nothing),
                };
                let token = match &from {
                    StreamFrom::Cut(token) => token.as_bytes(),
                    _ => &[],
                };
                frames.frame(kind, &[&place, token].concat()).map_err(failed)?;
                let (pipe, writer) = io::pipe().map_err(|e| Error::io("a pipe", e))?;
                let mut reader = Produced { pipe, idle, client: &client };
                let (layers, chain) = (store.layers.clone(), chains[n].clone());
                // Ended with this, however this ends.
                let given_up = CancellationToken::new();
                let _ended = given_up.clone().drop_guard();
                let sending = runtime.spawn_blocking({
                    let runtime = runtime.clone();
                    let sent = async move { layers.send_layer(&chain, &from, OwnedFd::from(writer)).await };
                    move || runtime.block_on(given_up.run_until_cancelled(sent)).unwrap_or(Ok(()))
                });
                let mut sum = Sha256::new();
                let mut piece = vec![0; PIECE];
                loop {
                    let got = reader.read(&mut piece).map_err(|e| failed(e).context(format!("layer {}", chains[n])))?;
                    if got == 0 {
                        break;
                    }
                    sum.update(&piece[..got]);
                    frames.frame(b'D', &piece[..got]).map_err(failed)?;
                }
                let sent = runtime.block_on(sending);
                sent.unwrap_or_else(|e| Err(Error::internal(format!("sending a layer: {e}"))))
                    .map_err(|e| e.context(format!("layer {}", chains[n])))?;
                frames.frame(b'E', &sum.finalize()).map_err(failed)?;
            }
            frames.end().map_err(failed)
        })
        .await
    }

    /// Takes an image from `input`.
    pub(super) async fn receive_image(
        self: &Arc<Self>,
        input: Box<dyn AsyncRead + Send + Unpin>,
    ) -> Result<Arc<Image>> {
        let (store, runtime) = (self.clone(), tokio::runtime::Handle::current());
        let (described, lease) = blocking(move || {
            let mut frames = Unframer::open(Incoming { input, runtime: runtime.clone(), idle: None })?;
            let mut content = Vec::new();
            let (kind, _) = frames.next(&mut content, MAX_HEADER)?;
            if kind != b'H' {
                return Err(malformed("it does not say what it is"));
            }
            let described = store.described(&content)?;
            // Others wait for the layers that this stream is at.
            frames.input.idle = Some(store.config.progress_timeout);
            let lease = runtime.block_on(store.lease(&described.chains));
            for (n, layer) in described.layers.iter().enumerate() {
                if layer.sent {
                    let (kind, _) = frames.next(&mut content, 4 + MAX_TOKEN)?;
                    let token = begins(kind, &content, n)?;
                    store.receive_one(&runtime, &mut frames, &mut content, &described, n, token)?;
                } else if !runtime.block_on(store.layers.has(&described.chains[n]))? {
                    return Err(Error::precondition(format!(
                        "layer {} was not sent and is not here: tell the sender what is (`image have`)",
                        described.chains[n]
                    )));
                }
            }
            let (kind, before) = frames.next(&mut content, 32)?;
            if kind != b'Z' || content != before {
                return Err(malformed("its digest does not fit"));
            }
            Ok((described, lease))
        })
        .await?;
        let plan = Plan {
            source: Arc::new(Nowhere),
            config: Descriptor {
                media_type: String::new(),
                digest: digest_of(&described.config),
                size: described.config.len() as u64,
            },
            config_bytes: Some(described.config),
            layers: described.diff_ids.into_iter().map(plain_layer).collect(),
            manifests: Vec::new(),
            repo_tags: described.names.iter().filter_map(Reference::tagged).collect(),
            repo_digests: Vec::new(),
            cancel: self.tasks.token().child_token(),
            progress: Default::default(),
        };
        let id = self.assemble(plan).await?;
        drop(lease);
        self.by_id(&id)
    }

    fn described(&self, header: &[u8]) -> Result<Described> {
        let header: Header = serde_json::from_slice(header).map_err(|e| malformed(format!("its header: {e}")))?;
        if header.driver != self.layers.driver() {
            let (theirs, ours) = (header.driver.chars().take(20).collect::<String>(), self.layers.driver());
            return Err(Error::precondition(format!("its layers are streams of driver {theirs:?}, here is {ours:?}")));
        }
        if header.layers.is_empty() || header.layers.len() > MAX_LAYERS || header.names.len() > MAX_NAMES {
            return Err(malformed("its header: too many layers or names, or none"));
        }
        let config = BASE64_STANDARD.decode(&header.config).map_err(|e| malformed(format!("its config: {e}")))?;
        if config.len() as u64 > MAX_CONFIG {
            return Err(malformed("its config is too long"));
        }
        let (_, diff_ids) = manifest::parse_config(&config, header.layers.len(), &self.platform)?;
        if diff_ids.iter().zip(&header.layers).any(|(d, l)| d.to_string() != l.diff_id) {
            return Err(malformed("its header names other layers than its config"));
        }
        sizes_fit(&header.layers)?;
        let names = header.names.iter().map(|n| Reference::parse(n, &self.config.default_registry));
        let names = names.collect::<Result<Vec<_>>>()?;
        let chains = manifest::chain_ids(&diff_ids);
        Ok(Described { names, config: config.into(), diff_ids, chains, layers: header.layers })
    }

    fn receive_one(
        &self,
        runtime: &tokio::runtime::Handle,
        frames: &mut Unframer<Incoming>,
        content: &mut Vec<u8>,
        described: &Described,
        n: usize,
        token: Option<String>,
    ) -> Result<()> {
        let chain = &described.chains[n];
        let _turn = runtime.block_on(self.turns.take(chain));
        if runtime.block_on(self.layers.has(chain))? {
            return frames.layer(&mut io::sink(), content);
        }
        let (reader, writer) = io::pipe().map_err(|e| Error::io("a pipe", e))?;
        let idle = self.config.progress_timeout;
        let mut writer = Outgoing::new(writer, idle).map_err(|e| Error::io("a pipe", e))?;
        let (told, whole) = std::sync::mpsc::sync_channel(1);
        let verify = Box::new(move || whole.recv().unwrap_or_else(|_| Err(malformed("it ends in a layer"))));
        let usage = Usage { bytes: described.layers[n].bytes, inodes: described.layers[n].inodes };
        let (layers, name, handle) = (self.layers.clone(), chain.clone(), runtime.clone());
        let taking = runtime.spawn_blocking(move || {
            handle.block_on(layers.receive_layer(&name, usage, token.as_deref(), OwnedFd::from(reader), verify))
        });
        let copied = frames.layer(&mut writer, content);
        let good = copied.is_ok();
        let _ = told.send(match good {
            true => Ok(()),
            false => Err(malformed("a layer is not whole")),
        });
        drop(writer);
        let taken = match good {
            true => runtime.block_on(taking),
            // Whoever hangs does so alone: only what is kept of the beginning depends on it.
            false => runtime.block_on(async { tokio::time::timeout(idle, taking).await.unwrap_or(Ok(Ok(()))) }),
        };
        let part = |l: &LayerState| l.chain == *chain && l.part.is_some();
        copied.map_err(|e| match self.layers.layer_states().is_ok_and(|all| all.iter().any(part)) {
            true => e.context(format!("the beginning of layer {chain} is kept (`image have`)")),
            false => e,
        })?;
        let taken = taken.unwrap_or_else(|e| Err(Error::internal(format!("receiving a layer: {e}"))));
        taken.map_err(|e| e.context(format!("layer {chain}")))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::ends::SENT_PIECE;
    use super::*;

    fn chain(n: u8) -> Digest {
        Digest::from_sha256(&[n; 32])
    }

    #[test]
    fn only_what_is_missing_is_sent() {
        let chains = [chain(1), chain(2), chain(3)];
        let states = ["a", "b", "c"].map(String::from);
        let have = |list: &[(u8, &str)]| -> Vec<LayerState> {
            list.iter().map(|(n, s)| LayerState { chain: chain(*n), state: (*s).into(), part: None }).collect()
        };
        use How::{Not, OnParent, Rest, Whole};
        assert_eq!(plan(&chains, &states, &[]), [Whole, OnParent, OnParent]);
        assert_eq!(plan(&chains, &states, &have(&[(1, "a")])), [Not, OnParent, OnParent]);
        // The same layer, unpacked there: nothing can be put onto it.
        assert_eq!(plan(&chains, &states, &have(&[(1, "x")])), [Not, Whole, OnParent]);
        assert_eq!(plan(&chains, &states, &have(&[(1, "x"), (2, "b"), (9, "z")])), [Not, Not, OnParent]);
        assert_eq!(plan(&chains, &states, &have(&[(3, "c")])), [Whole, OnParent, Not]);
        let part = LayerState { chain: chain(2), state: String::new(), part: Some("1-a".into()) };
        let begun = [have(&[(1, "a")]), vec![part.clone()]].concat();
        assert_eq!(plan(&chains, &states, &begun), [Not, Rest("1-a".into()), OnParent]);
        // It came whole meanwhile.
        let both = [vec![part], have(&[(1, "a"), (2, "b")])].concat();
        assert_eq!(plan(&chains, &states, &both), [Not, Not, OnParent]);
    }

    #[test]
    fn a_stream_that_stands_still_ends() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let idle = Duration::from_millis(50);
        let (mut client, input) = tokio::io::duplex(1 << 20);
        let piece = |content: &[u8]| {
            let mut frame = Framer { out: Vec::new(), sum: Sha256::new() };
            frame.frame(b'D', content).expect("a frame");
            frame.out
        };
        runtime.block_on(tokio::io::AsyncWriteExt::write_all(&mut client, &piece(&[7; 100]))).expect("written");
        let input = Incoming { input: Box::new(input), runtime: runtime.handle().clone(), idle: Some(idle) };
        let mut frames = Unframer { input, sum: Sha256::new() };
        let (mut taken, mut content) = (Vec::new(), Vec::new());
        let e = frames.layer(&mut taken, &mut content).expect_err("nothing more comes");
        assert_eq!((e.kind(), taken.len()), (Kind::DeadlineExceeded, 100), "{}", e.chain());

        // Nobody reads the pipe.
        let (_reader, writer) = io::pipe().expect("a pipe");
        let mut out = Outgoing::new(writer, idle).expect("a pipe");
        runtime.block_on(tokio::io::AsyncWriteExt::write_all(&mut client, &piece(&[7; PIECE]))).expect("written");
        let e = frames.layer(&mut out, &mut content).expect_err("nothing is taken");
        assert!(e.kind() == Kind::DeadlineExceeded && e.chain().contains("taken"), "{}", e.chain());
    }

    #[test]
    fn a_client_that_takes_nothing_is_not_waited_for() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (out, mut client) = mpsc::channel(1);
        let idle = Duration::from_millis(300);
        let pieces = Pieces { out, runtime: runtime.handle().clone(), idle, stalled: false };
        let mut frames = Framer { out: BufWriter::with_capacity(2 * PIECE, pieces), sum: Sha256::new() };
        let asked = std::time::Instant::now();
        let e =
            failed("sending", (0..10).try_for_each(|_| frames.frame(b'D', &[7; PIECE])).expect_err("one piece fits"));
        assert!(
            e.kind() == Kind::DeadlineExceeded && e.chain().contains("nothing was taken for 0.3 s"),
            "{}",
            e.chain()
        );
        // The rest is given up at once, by the end of the writer, too.
        frames.end().expect_err("it stands still");
        assert!((idle..idle * 2).contains(&asked.elapsed()), "{:?}", asked.elapsed());
        let piece = client.blocking_recv().expect("the first").expect("no error");
        assert_eq!(piece.len(), SENT_PIECE);
        assert!(client.blocking_recv().is_none());

        // One that takes a little from time to time is.
        let (out, mut client) = mpsc::channel(1);
        let pieces = Pieces { out, runtime: runtime.handle().clone(), idle, stalled: false };
        let slow = std::thread::spawn(move || {
            let mut got = 0;
            while let Some(piece) = client.blocking_recv() {
                got += piece.expect("no error").len();
                std::thread::sleep(idle / 3);
            }
            got
        });
        let mut frames = Framer { out: BufWriter::with_capacity(2 * PIECE, pieces), sum: Sha256::new() };
        let asked = std::time::Instant::now();
        frames.frame(b'D', &[7; 2 * PIECE]).and_then(|()| frames.out.flush()).expect("slow, but going");
        drop(frames);
        assert!(asked.elapsed() > idle);
        assert_eq!(slow.join().expect("the client"), 2 * PIECE + 5);
    }

    #[test]
    fn a_size_that_no_layer_can_have_is_refused() {
        let of = |bytes, inodes| [HeaderLayer { diff_id: String::new(), bytes, inodes, sent: true }];
        sizes_fit(&of(MAX_LAYER, 1_000_000)).expect("the largest");
        for layers in [of(MAX_LAYER + 1, 1), of(u64::MAX, 1), of(1, u64::MAX)] {
            assert_eq!(sizes_fit(&layers).expect_err("too much").kind(), Kind::InvalidArgument);
        }
    }

    #[test]
    fn a_layer_begins_where_it_should() {
        assert_eq!(begins(b'L', &[0, 0, 0, 2], 2).expect("anew"), None);
        assert_eq!(begins(b'R', b"\0\0\0\x021-a", 2).expect("goes on").as_deref(), Some("1-a"));
        let wrong: [(u8, &[u8]); 6] = [
            (b'L', b"\0\0\0\x01"),
            (b'L', b"\0\0\0\x02x"),
            (b'R', b"\0\0\0\x02"),
            (b'R', b"\0\0\0\x02\xff"),
            (b'L', b""),
            (b'E', b"\0\0\0\x02"),
        ];
        for (kind, content) in wrong {
            assert_eq!(begins(kind, content, 2).expect_err("misplaced").kind(), Kind::InvalidArgument);
        }
    }

    fn stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut frames = Framer { out: &mut bytes, sum: Sha256::new() };
        frames.raw(MAGIC).expect("written");
        frames.frame(b'H', b"{}").expect("written");
        frames.frame(b'D', b"some").expect("written");
        frames.frame(b'D', b"thing").expect("written");
        frames.frame(b'E', &Sha256::digest(b"something")).expect("written");
        frames.end().expect("written");
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut frames = Unframer::open(bytes)?;
        let (mut content, mut out) = (Vec::new(), Vec::new());
        let (kind, _) = frames.next(&mut content, MAX_HEADER)?;
        assert_eq!(kind, b'H');
        frames.layer(&mut out, &mut content)?;
        let (kind, before) = frames.next(&mut content, 32)?;
        if kind != b'Z' || content != before {
            return Err(malformed("its digest does not fit"));
        }
        Ok(out)
    }

    #[test]
    fn a_stream_is_whole_or_refused() {
        let whole = stream();
        assert_eq!(read(&whole).expect("whole"), b"something");
        for end in 0..whole.len() {
            assert_eq!(read(&whole[..end]).expect_err("cut").kind(), Kind::InvalidArgument, "cut at {end}");
        }
        // Everything behind the header's kind: each flipped bit is noticed.
        for at in MAGIC.len() + 1..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            assert!(read(&damaged).is_err(), "damaged at {at}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_comes_in_panics(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let _ = Unframer::open(bytes.as_slice());
            bytes.splice(0..0, MAGIC.iter().copied());
            let mut frames = Unframer::open(bytes.as_slice()).expect("begins well");
            let mut content = Vec::new();
            while frames.next(&mut content, MAX_FRAME).is_ok() {}
        }
    }
}
