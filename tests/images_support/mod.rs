//! What the image tests are made with: layers, OCI layouts, a real registry, and a server that misbehaves on demand.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly
#![allow(dead_code)] // each test file uses a part of it

use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use proxmox_lxcri::core::ids::{ContainerId, Digest};
use proxmox_lxcri::core::ports::{Claims, LayerStore, Usage};
use proxmox_lxcri::integrations::images::{ImagesConfig, LocalImageStore};
use proxmox_lxcri::integrations::layers::confined::{Confined, Landlock, Unpacker};
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::integrations::layers::unpack::Limits;
use proxmox_lxcri::integrations::overlay::{OverlayOptions, OverlayStore};
use proxmox_lxcri::integrations::registry::keychain::Keychain;
use proxmox_lxcri::integrations::registry::proxy::Proxies;
use proxmox_lxcri::integrations::zfs::ZfsConfig;
use proxmox_lxcri::integrations::zfs_store::{ZfsStore, ZfsStoreConfig};
use proxmox_lxcri::utils::tasks::TaskSet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// One entry of a layer.
pub struct Item {
    pub header: tar::Header,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub data: Vec<u8>,
    pub pax: Vec<(String, Vec<u8>)>,
}

impl Item {
    pub fn new(kind: tar::EntryType, path: &str, mode: u32) -> Self {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        Self { header, path: path.as_bytes().to_vec(), link: Vec::new(), data: Vec::new(), pax: Vec::new() }
    }
    pub fn file(path: &str, data: &[u8]) -> Self {
        let mut item = Self::new(tar::EntryType::Regular, path, 0o644);
        item.data = data.to_vec();
        item
    }
    pub fn dir(path: &str) -> Self {
        Self::new(tar::EntryType::Directory, path, 0o755)
    }
    pub fn symlink(path: &str, target: &str) -> Self {
        let mut item = Self::new(tar::EntryType::Symlink, path, 0o777);
        item.link = target.as_bytes().to_vec();
        item
    }
    pub fn hardlink(path: &str, target: &str) -> Self {
        let mut item = Self::new(tar::EntryType::Link, path, 0o644);
        item.link = target.as_bytes().to_vec();
        item
    }
    pub fn mode(mut self, mode: u32) -> Self {
        self.header.set_mode(mode);
        self
    }
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.header.set_uid(uid);
        self.header.set_gid(gid);
        self
    }
    pub fn pax(mut self, key: &str, value: &[u8]) -> Self {
        self.pax.push((key.into(), value.to_vec()));
        self
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().div_ceil(512) * 512, 0);
}

/// A pax record with its own length in front.
pub fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

/// The items as a tar. Names go into the header raw, so that hostile ones are possible; long ones into a pax header.
pub fn layer(items: &[Item]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        let mut pax: Vec<u8> = item.pax.iter().flat_map(|(k, v)| pax_record(k, v)).collect();
        if item.path.len() > 100 {
            pax.extend(pax_record("path", &item.path));
        }
        if item.link.len() > 100 {
            pax.extend(pax_record("linkpath", &item.link));
        }
        if !pax.is_empty() {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::XHeader);
            header.set_size(pax.len() as u64);
            header.set_cksum();
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&pax);
            pad(&mut out);
        }
        let mut header = item.header.clone();
        header.set_size(item.data.len() as u64);
        let name = &item.path[..item.path.len().min(100)];
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        let link = &item.link[..item.link.len().min(100)];
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(&item.data);
        pad(&mut out);
    }
    out.resize(out.len() + 1024, 0);
    out
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// An image as its blobs.
#[derive(Clone)]
pub struct Built {
    pub blobs: HashMap<String, Vec<u8>>,
    pub manifest: Vec<u8>,
    pub layers: Vec<Digest>,
    pub config: Digest,
}

impl Built {
    pub fn digest(&self) -> Digest {
        digest_of(&self.manifest)
    }
}

/// Builds an image of uncompressed layers; `architecture` is the config's.
pub fn build(layers: &[Vec<u8>], architecture: &str, zstd_layers: bool) -> Built {
    let mut blobs = HashMap::new();
    let (mut descriptors, mut digests) = (Vec::new(), Vec::new());
    for tar in layers {
        let (blob, kind) =
            if zstd_layers { (zstd::encode_all(tar.as_slice(), 1).unwrap(), "zstd") } else { (gzip(tar), "gzip") };
        let digest = digest_of(&blob);
        descriptors.push(serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar+{kind}"), "digest": digest.as_str(), "size": blob.len()
        }));
        digests.push(digest.clone());
        blobs.insert(digest.to_string(), blob);
    }
    let diff_ids: Vec<String> = layers.iter().map(|l| digest_of(l).to_string()).collect();
    let config = serde_json::to_vec(&serde_json::json!({
        "architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"], "User": "7:8", "WorkingDir": "/w", "StopSignal": "SIGINT"}
    }))
    .unwrap();
    let config_digest = digest_of(&config);
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest.as_str(), "size": config.len()},
        "layers": descriptors
    }))
    .unwrap();
    blobs.insert(config_digest.to_string(), config);
    Built { blobs, manifest, layers: digests, config: config_digest }
}

/// Writes images as an OCI layout; names go into the index.
pub fn write_layout(folder: &Path, images: &[(Built, Option<&str>)]) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let mut entries = Vec::new();
    for (image, name) in images {
        for (digest, data) in &image.blobs {
            std::fs::write(blobs.join(&digest[7..]), data).unwrap();
        }
        std::fs::write(blobs.join(image.digest().hex()), &image.manifest).unwrap();
        let mut entry = serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": image.digest().as_str(), "size": image.manifest.len()
        });
        if let Some(name) = name {
            entry["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
        }
        entries.push(entry);
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": entries});
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

/// Runs a program to success.
pub fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Makes a certificate in `folder`: its file, and what a registry's `http` settings say of it with `more`.
pub fn tls(folder: &Path, more: &str) -> (PathBuf, String) {
    let (cert, key) = (folder.join("ca.pem"), folder.join("key.pem"));
    let args = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test \
        -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
    let mut args: Vec<&str> = args.split_whitespace().collect();
    args.extend(["-out", cert.to_str().unwrap(), "-keyout", key.to_str().unwrap()]);
    run("/usr/bin/openssl", &args);
    let tls = format!(", tls: {{certificate: {}, key: {}{more}}}", cert.display(), key.display());
    (cert, tls)
}

/// A real registry on a free port of the loopback, ended with the value.
pub struct Registry {
    child: Child,
    pub host: String,
    _dir: tempfile::TempDir,
}

impl Registry {
    pub fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), "")
    }

    /// One that speaks TLS with a certificate of its own making, `ca.pem` in the folder returned.
    pub fn start_tls() -> (Self, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (cert, tls) = tls(dir.path(), "");
        (Self::start_with(dir, &tls), cert)
    }

    /// `more` goes into its `http` settings.
    pub fn start_with(dir: tempfile::TempDir, more: &str) -> Self {
        Self::start_at(dir, "127.0.0.1", more, "")
    }

    /// `address` is one of this machine's, `whole` more of its configuration.
    pub fn start_at(dir: tempfile::TempDir, address: &str, more: &str, whole: &str) -> Self {
        let port = std::net::TcpListener::bind(format!("{address}:0")).unwrap().local_addr().unwrap().port();
        let host = format!("{address}:{port}");
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp: {{addr: '{host}'{more}}}\n{whole}",
            dir.path().join("data").display()
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("/usr/bin/docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let registry = Self { child, host, _dir: dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(&registry.host).is_err() {
            let log = || std::fs::read_to_string(registry._dir.path().join("log"));
            assert!(Instant::now() < deadline, "docker-registry does not listen: {:?}", log());
            std::thread::yield_now();
        }
        registry
    }

    /// Pushes an image with skopeo.
    pub fn push(&self, image: &Built, name: &str) {
        self.push_with(image, name, &[]);
    }

    /// The same with more of skopeo's flags.
    pub fn push_with(&self, image: &Built, name: &str, flags: &[&str]) {
        let dir = tempfile::tempdir().unwrap();
        write_layout(dir.path(), &[(image.clone(), Some("x"))]);
        let (from, to) = (format!("oci:{}:x", dir.path().display()), format!("docker://{}/{name}", self.host));
        let mut args = vec!["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"];
        args.extend(flags);
        args.extend([from.as_str(), &to]);
        run("/usr/bin/skopeo", &args);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A store in a folder of its own; where LXCRI_TEST_STORAGE=zfs in a dataset of its own in the pool `tank`.
pub struct World {
    pub dir: tempfile::TempDir,
    pub layers: Arc<dyn LayerStore>,
    pub images: Arc<LocalImageStore>,
    pub tasks: TaskSet,
}

impl World {
    pub async fn new() -> Self {
        Self::open(tempfile::tempdir().unwrap()).await
    }

    pub async fn open(dir: tempfile::TempDir) -> Self {
        Self::open_with(dir, Limits::default()).await
    }

    /// A store whose layers may hold no more than `limits` (driver `overlay`).
    pub async fn open_with(dir: tempfile::TempDir, limits: Limits) -> Self {
        let tasks = TaskSet::new("images-test");
        let root = Utf8PathBuf::from_path_buf(dir.path().to_path_buf()).unwrap();
        let layers: Arc<dyn LayerStore> = match zfs() {
            true => ZfsStore::open(zfs_config(&root), tasks.clone()).await.unwrap(),
            false => {
                let options = OverlayOptions { unpacker: confined(&tasks), limits, ..OverlayOptions::default() };
                OverlayStore::open(root.join("overlay"), options, tasks.clone()).unwrap()
            }
        };
        let config = ImagesConfig {
            root: root.join("images"),
            certs_dirs: vec![root.join("certs.d")],
            keychain: Keychain {
                file: Some(root.join("auth.json")).filter(|f| f.exists()),
                helper_dirs: vec![root.join("helpers")],
                helper_timeout: Duration::from_secs(2),
            },
            proxies: Proxies::parse(&settings(&root.join("proxies"))).unwrap(),
            policy_file: Some(root.join("policy.toml")).filter(|f| f.exists()),
            default_registry: "docker.io".into(),
            max_concurrent_downloads: 3,
            progress_timeout: Duration::from_millis(1500),
            unpacker: confined(&tasks),
            bfc: Default::default(),
        };
        let images = LocalImageStore::open(config, layers.clone(), tasks.clone()).await.unwrap();
        Self { dir, layers, images, tasks }
    }

    /// A store that reaches hosts as `proxies` says.
    pub async fn reaching(proxies: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<String> = proxies.iter().map(|(host, way)| format!("{host} {way}")).collect();
        std::fs::write(dir.path().join("proxies"), lines.join("\n")).unwrap();
        Self::open(dir).await
    }

    /// Ends the store and opens it anew, as a restarted daemon does.
    pub async fn restart(mut self) -> Self {
        self.tasks.shutdown().await;
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        drop(self);
        Self::open(dir).await
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub fn hosts(&self, registry: &str, text: &str) {
        let folder = self.path("certs.d").join(registry);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("hosts.toml"), text).unwrap();
    }

    /// Layers on disk, unfinished ones, containers.
    pub fn counts(&self) -> (usize, usize, usize) {
        if zfs() {
            return self.zfs_counts();
        }
        let count = |f: &str| std::fs::read_dir(self.path("overlay").join(f)).unwrap().count();
        (count("layers"), count("tmp"), count("containers"))
    }

    /// Destroying goes on in the background: counted when it is done.
    fn zfs_counts(&self) -> (usize, usize, usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let root = zfs_config(Utf8Path::from_path(self.dir.path()).unwrap()).dataset.to_string();
        loop {
            let check = async {
                let whole: BTreeSet<_> = self.layers.list_rootfs().await.unwrap().into_iter().collect();
                self.layers.check(&|| Claims { whole: whole.clone(), ..Claims::default() }).await.unwrap()
            };
            let report = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(check));
            let going = report.notes.iter().chain(&report.problems).any(|n| n.contains("destroyed"));
            if !going {
                assert_eq!(report.problems, Vec::<String>::new());
                let out = Command::new("/usr/sbin/zfs")
                    .args(["list", "-H", "-o", "name", "-t", "filesystem,snapshot", "-r", &root])
                    .output();
                let text = String::from_utf8(out.unwrap().stdout).unwrap();
                let all: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix(&root)).collect();
                let layers = all.iter().filter(|n| n.starts_with("/layers/") && n.ends_with("@ready")).count();
                let begun = all.iter().filter(|n| n.starts_with("/layers/") && !n.contains('@')).count();
                return (layers, begun - layers, all.iter().filter(|n| n.starts_with("/containers/")).count());
            }
            assert!(Instant::now() < deadline, "{report:?}");
            std::thread::sleep(Duration::from_millis(20)); // the poll of a condition with a deadline
        }
    }

    /// What a container has written, when it is `bytes` at least: ZFS counts what a transaction has brought to disk.
    pub async fn written(&self, id: &ContainerId, bytes: u64) -> Usage {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let usage = self.layers.rootfs_usage(id).await.unwrap();
            if usage.bytes >= bytes || !zfs() {
                return usage;
            }
            assert!(Instant::now() < deadline, "{usage:?}");
            tokio::time::sleep(Duration::from_millis(50)).await; // the poll of a condition with a deadline
        }
    }
}

/// Layers are unpacked as a daemon has it done: by processes of the program under test.
pub fn confined(tasks: &TaskSet) -> Unpacker {
    Unpacker::Confined(Arc::new(Confined {
        program: env!("CARGO_BIN_EXE_proxmox-lxcri").into(),
        require_landlock: false,
        landlock: Landlock::Full,
        patience: Duration::from_secs(60),
        tasks: tasks.clone(),
    }))
}

/// Pairs of words, a line each.
fn settings(path: &Utf8Path) -> std::collections::BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().filter_map(|l| l.split_once(' ')).map(|(a, b)| (a.to_owned(), b.to_owned())).collect()
}

/// The tests run on the ZFS driver.
pub fn zfs() -> bool {
    std::env::var("LXCRI_TEST_STORAGE").is_ok_and(|s| s == "zfs")
}

fn zfs_config(root: &Utf8Path) -> ZfsStoreConfig {
    let leaf: String = root.file_name().unwrap().chars().filter(char::is_ascii_alphanumeric).collect();
    ZfsStoreConfig {
        zfs: ZfsConfig::default(),
        dataset: format!("tank/{leaf}").parse().unwrap(),
        folder: root.join("zfs"),
        owner: "c".repeat(32),
        limits: Limits::default(),
        unpacker: confined(&TaskSet::new("unpacking")),
        health_interval: Duration::from_secs(5),
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if zfs() {
            // The store's own, and what zfs-fuse keeps mounted beside it.
            let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            let ours = mounts.lines().filter_map(|l| l.split(' ').nth(1));
            for at in ours.filter(|at| Path::new(at).starts_with(self.dir.path())) {
                let _ = Command::new("/bin/umount").arg(at).output();
            }
        }
    }
}

/// What the misbehaving server answers.
#[derive(Clone)]
pub enum Answer {
    /// Status, headers, body.
    Full(u16, Vec<(String, String)>, Vec<u8>),
    /// As Full with 200, but the connection ends after so many bytes of the body.
    Truncated(Vec<u8>, usize),
    /// 206 with what is from a byte on, but the connection ends before another byte.
    Part(Vec<u8>, usize, usize),
    /// The head and then nothing.
    Stalled(Vec<u8>, usize),
    /// Nothing at all.
    Silent,
}

impl Answer {
    pub fn ok(body: &[u8]) -> Self {
        Self::Full(200, Vec::new(), body.to_vec())
    }
    pub fn status(status: u16) -> Self {
        Self::Full(status, Vec::new(), Vec::new())
    }
}

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
    pub head: String,
}

impl Seen {
    /// A header's value; its name in lower case.
    pub fn header(&self, name: &str) -> Option<String> {
        let found = self.head.lines().find_map(|l| l.split_once(": ").filter(|h| h.0.eq_ignore_ascii_case(name)));
        found.map(|(_, value)| value.to_owned())
    }
}

pub type Handler = dyn Fn(&Seen) -> Answer + Send + Sync;

/// An HTTP server on the loopback that answers as told.
pub struct Fake {
    pub host: String,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    tasks: TaskSet,
}

impl Fake {
    pub async fn start(handler: Arc<Handler>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let tasks = TaskSet::new("fake-registry");
        let (log, connections) = (seen.clone(), tasks.clone());
        tasks.spawn_cancellable("accept", async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (handler, log) = (handler.clone(), log.clone());
                connections.spawn_cancellable("connection", async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        let mut byte = [0];
                        if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                            return;
                        }
                        head.push(byte[0]);
                    }
                    let text = String::from_utf8_lossy(&head);
                    let header = |name: &str| {
                        let found =
                            text.lines().find_map(|l| l.split_once(": ").filter(|h| h.0.eq_ignore_ascii_case(name)));
                        found.map(|(_, value)| value.to_owned())
                    };
                    let (authorization, range) = (header("authorization"), header("range"));
                    let path = text.split(' ').nth(1).unwrap_or("").to_owned();
                    let seen = Seen { path, authorization, range, head: text.into_owned() };
                    log.lock().unwrap().push(seen.clone());
                    let mut send = async |status: u16, headers: &[(String, String)], length: usize, body: &[u8]| {
                        let mut out =
                            format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n");
                        for (name, value) in headers {
                            out.push_str(&format!("{name}: {value}\r\n"));
                        }
                        out.push_str("\r\n");
                        let _ = stream.write_all(out.as_bytes()).await;
                        let _ = stream.write_all(body).await;
                        let _ = stream.flush().await;
                    };
                    match handler(&seen) {
                        Answer::Full(status, headers, body) => send(status, &headers, body.len(), &body).await,
                        Answer::Truncated(body, keep) => send(200, &[], body.len(), &body[..keep]).await,
                        Answer::Part(body, from, keep) => {
                            let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
                            send(206, &[("Content-Range".into(), range)], body.len() - from, &body[from..keep]).await;
                        }
                        Answer::Stalled(body, keep) => {
                            send(200, &[], body.len(), &body[..keep]).await;
                            std::future::pending::<()>().await;
                        }
                        Answer::Silent => std::future::pending::<()>().await,
                    }
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { host, seen, tasks }
    }

    /// Serves `image` under any name and tag, except where `other` has an answer.
    pub async fn serving(image: Built, other: impl Fn(&Seen) -> Option<Answer> + Send + Sync + 'static) -> Self {
        Self::start(Arc::new(move |seen: &Seen| {
            if let Some(answer) = other(seen) {
                return answer;
            }
            let path = seen.path.split('?').next().unwrap();
            let last = path.rsplit('/').next().unwrap();
            if path.contains("/manifests/") {
                return Answer::ok(&image.manifest);
            }
            image.blobs.get(last).map_or(Answer::status(404), |b| Answer::ok(b))
        }))
        .await
    }

    pub fn count(&self, part: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|s| s.path.contains(part)).count()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.tasks.token().cancel();
    }
}
