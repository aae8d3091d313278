//! A Proxmox node for tests: a TLS server that speaks the API as a real one does, with its permissions, parameter checks,
//! tasks, locks and delays, and with faults on command. Guests are kept as records, or really run: containers by Debian's `lxc`,
//! virtual machines by QEMU.
//!
//! A test makes one by [`Pve::start`], gives [`Pve::settings`] to the client, and at its end calls [`Pve::violations`]: where
//! the schema of the real API is at hand (`LXCRI_PVE_API`, or `../shared/pve-api.json`), every request was checked against it.
//! All of it ends with the value.

#![allow(clippy::disallowed_methods, dead_code)]

mod access;
mod agent;
mod api;
mod cts;
mod disks;
mod guests;
mod http;
mod lxc;
mod nets;
mod operator;
mod params;
mod qemu;
mod schema;
mod state;
mod storage;
mod tasks;
mod vms;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use proxmox_lxcri::core::config::Proxmox as Settings;

pub use guests::Runner;
pub use state::{Fault, Seen, What};

/// How a server is to be.
pub struct Options {
    /// How long a second of the real one's waits is: 0.01 is a hundredth.
    pub scale: f64,
    /// Keeps records of guests, or runs them.
    pub runner: Runner,
}

impl Default for Options {
    fn default() -> Self {
        Self { scale: 0.02, runner: Runner::Records }
    }
}

/// A running server.
pub struct Pve {
    pub(crate) state: Arc<state::Server>,
    address: SocketAddr,
    folder: tempfile::TempDir,
    fingerprint: String,
    runtime: Option<tokio::runtime::Runtime>,
}

/// Secret of the test's token.
pub const SECRET: &str = "5d2f2b0c-7f3c-4a4e-9b1f-0f6a3a8b9c11";
/// Id of the test's token.
pub const TOKEN: &str = "lxcri@pve!node1";

impl Pve {
    /// Starts one on a free port of 127.0.0.1.
    pub fn start(options: Options) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
        let folder = tempfile::tempdir().expect("a folder");
        // A container's root has to get to its root file system; secrets are in files of their own modes.
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("mode");
        let identity = http::Identity::new();
        std::fs::write(folder.path().join("ca.pem"), &identity.ca).expect("CA");
        let state = Arc::new(state::Server::new(options, folder.path().to_path_buf()));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("its address");
        let fingerprint = identity.fingerprint.clone();
        runtime.spawn(http::serve(listener, identity, state.clone()));
        Self { state, address, folder, fingerprint, runtime: Some(runtime) }
    }

    /// `https://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// SHA-256 of its certificate.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// A file in the server's folder.
    pub fn file(&self, name: &str) -> Utf8PathBuf {
        Utf8PathBuf::from_path_buf(self.folder.path().join(name)).expect("UTF-8")
    }

    /// Writes a file that only we may read.
    pub fn secret(&self, name: &str, text: &str) -> Utf8PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let path = self.file(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
        path
    }

    /// What a client with the test's token needs: the CA, short times.
    pub fn settings(&self) -> Settings {
        Settings {
            endpoints: vec![self.url()],
            node: "pve1".into(),
            token_id: TOKEN.into(),
            token_file: self.file("token"),
            ca_file: Some(self.file("ca.pem")),
            timeout: Duration::from_secs(20).into(),
            task_timeout: Duration::from_secs(60).into(),
            ..Settings::default()
        }
    }

    /// Lets the next `times` requests that fit fail.
    pub fn fault(&self, method: &str, path: &str, times: usize, what: What) {
        let fault = Fault { method: method.into(), path: path.into(), times, what };
        self.state.lock().faults.push(fault);
    }

    /// Lets every request that fits fail until [`Pve::mend`].
    pub fn fault_for_long(&self, method: &str, path: &str, what: What) {
        self.fault(method, path, usize::MAX, what);
    }

    /// No more faults; how many requests have met one since the last time.
    pub fn mend(&self) -> usize {
        let mut state = self.state.lock();
        state.faults.clear();
        std::mem::take(&mut state.met)
    }

    /// Requests so far, in order.
    pub fn requests(&self) -> Vec<Seen> {
        self.state.lock().seen.clone()
    }

    /// How many requests there were of a method and path.
    pub fn count(&self, method: &str, path: &str) -> usize {
        self.requests().iter().filter(|s| s.method == method && s.path.contains(path)).count()
    }

    /// What in the requests does not fit the real API's schema; None: the schema is not at hand.
    pub fn violations(&self) -> Option<Vec<String>> {
        self.state.schema.as_ref().map(|_| self.state.lock().violations.clone())
    }
}

impl Drop for Pve {
    fn drop(&mut self) {
        self.state.end_guests();
        if let Some(runtime) = self.runtime.take() {
            // On a thread of its own: the test may be in a runtime, too, which waits for nobody.
            let _ = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(5))).join();
        }
    }
}

/// What tests do to it.
impl Pve {
    /// The token has another secret from now on.
    pub fn allow_token(&self, id: &str, secret: &str) {
        self.state.lock().access.tokens.insert(id.into(), secret.into());
    }

    /// All tickets have run out.
    pub fn expire_tickets(&self) {
        self.state.lock().access.expire();
    }

    /// Nothing more fits on a storage, or it does again.
    pub fn fill(&self, store: &str, full: bool) {
        self.state.lock().stores.get_mut(store).expect("the storage").full = full;
    }

    /// Numbers of all guests.
    pub fn guests(&self) -> Vec<u32> {
        self.state.lock().guests.keys().copied().collect()
    }

    /// Somebody else's guest, which the test's token has no right to see.
    pub fn add_hidden_guest(&self, vmid: u32) {
        let config = [("hostname".to_owned(), "other".to_owned())].into();
        self.state.lock().guests.insert(vmid, guests::Guest::new(guests::Kind::Ct, config, String::new()));
    }

    /// Files of guests' disks on the storage.
    pub fn volumes(&self) -> Vec<String> {
        let list = std::fs::read_dir(self.folder.path().join("local/images")).expect("the images").flatten();
        list.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Containers and their volumes.
    pub fn cts_and_volumes(&self) -> Vec<String> {
        let guests = &self.state.lock().guests;
        let cts = guests.iter().filter(|(_, g)| g.kind == guests::Kind::Ct).map(|(vmid, _)| format!("CT {vmid}"));
        let folders = std::fs::read_dir(self.folder.path().join("local/images")).expect("the images").flatten();
        let files = folders.filter_map(|f| std::fs::read_dir(f.path()).ok()).flat_map(Iterator::flatten);
        let names = files.map(|e| e.file_name().to_string_lossy().into_owned());
        cts.chain(names.filter(|name| name.starts_with("subvol-"))).collect()
    }

    /// Leaves half of each template.
    pub fn cut_templates(&self) {
        for entry in std::fs::read_dir(self.folder.path().join("local/template/cache")).expect("the cache").flatten() {
            let text = std::fs::read(entry.path()).expect("a template");
            std::fs::write(entry.path(), &text[..text.len() / 2]).expect("half of it");
        }
    }

    /// Somebody else's guest in our pool that is being made.
    pub fn add_guest_under_way(&self, vmid: u32) {
        let config = [("lock".to_owned(), "create".to_owned())].into();
        let guest = guests::Guest { half: true, ..guests::Guest::new(guests::Kind::Ct, config, "k8s".into()) };
        self.state.lock().guests.insert(vmid, guest);
    }

    /// Begins the log of requests anew.
    pub fn forget_requests(&self) {
        self.state.lock().seen.clear();
    }

    /// Every create takes so much longer from now on.
    pub fn dawdle(&self, time: Duration) {
        self.state.lock().dawdle = time;
    }

    /// Deletes all templates.
    pub fn drop_templates(&self) {
        for entry in std::fs::read_dir(self.folder.path().join("local/template/cache")).expect("the cache").flatten() {
            std::fs::remove_file(entry.path()).expect("removed");
        }
    }

    /// A value of a guest's configuration.
    pub fn config(&self, vmid: u32, key: &str) -> Option<String> {
        self.state.lock().guests.get(&vmid)?.config.get(key).cloned()
    }

    /// Privileges that the role of deploy/proxmox/role.sh has.
    pub fn role(&self) -> Vec<String> {
        let state = self.state.lock();
        let own = state.access.acls.iter().find(|a| a.who == TOKEN).map(|a| a.privileges.clone());
        own.unwrap_or_default().into_iter().collect()
    }

    /// The token and its user lack a privilege from now on; "": none.
    pub fn take_away(&self, privilege: &str) {
        let taken = Some(privilege.to_owned()).filter(|p| !p.is_empty());
        self.state.lock().access.taken = taken.into_iter().collect();
    }

    /// How long requests were worked on or tasks went on, one or more of them, within that time.
    pub fn busy(&self, from: Instant, to: Instant) -> Duration {
        let mut spans = self.state.lock().busy.clone();
        spans.sort();
        let (mut total, mut seen) = (Duration::ZERO, from);
        for (start, end) in spans {
            let (start, end) = (start.max(seen), end.min(to));
            if end > start {
                total += end - start;
                seen = end;
            }
        }
        total
    }

    /// The cluster has no quorum, or has it again.
    pub fn freeze(&self, frozen: bool) {
        self.state.lock().frozen = frozen;
    }

    /// How many tasks of a kind were under way at once, at most.
    pub fn most_at_once(&self, kind: &str) -> usize {
        self.state.lock().most.get(kind).copied().unwrap_or_default()
    }
}
