//! The Proxmox client against a server that speaks the API as a real node does (`tests/support/pve`): every convention of its
//! errors, every fault, and a container's life, first as records and then really run by Debian's `lxc`. `vms` has what is of VMs.
//!
//! Where the real API's schema is at hand, all requests are checked against it; where not, the test says so.

#![allow(clippy::disallowed_methods, clippy::print_stdout)]

mod support;
#[path = "pve_client/vms.rs"]
mod vms;

use std::time::{Duration, Instant};

use proxmox_lxcri::core::config::Proxmox as Settings;
use proxmox_lxcri::integrations::proxmox_api::{
    ApiError, CloneSpec, CtSpec, Ended, ErrorKind, GuestChange, GuestId, GuestKind, Net, NewGuest, Proxmox, Vmid,
    Volume, needs,
};
use support::pve::{self, Options, Pve, SECRET, TOKEN, What};

const NODE: &str = "pve1";

fn vmid(n: u64) -> Vmid {
    Vmid::new(n).expect("a VMID")
}

/// A container of the node.
fn ct(id: Vmid) -> GuestId<'static> {
    GuestId::ct(NODE, id)
}

fn client(settings: &Settings) -> Proxmox {
    Proxmox::new(settings).expect("a client")
}

/// A server with a template, and a client of it.
async fn node() -> (Pve, Proxmox) {
    let pve = tokio::task::block_in_place(|| Pve::start(Options::default()));
    std::fs::write(pve.file("local").join("template/cache/base.tar"), b"a template").expect("a template");
    let api = client(&pve.settings());
    (pve, api)
}

fn spec() -> CtSpec {
    CtSpec {
        ostemplate: "local:vztmpl/base.tar".into(),
        rootfs: Some(Volume::allocate("local", 1024)),
        hostname: Some("c1".into()),
        guest: NewGuest {
            memory: Some(64),
            pool: Some("k8s".into()),
            tags: "k8s;ns-default".parse().expect("tags"),
            description: Some("a=1;b=2&c\nof the test".into()),
            nets: vec![Net {
                name: "eth0".into(),
                bridge: Some("vmbr0".into()),
                ip: Some("10.0.0.5/24".into()),
                ..Net::default()
            }],
            ..NewGuest::default()
        },
        ..CtSpec::default()
    }
}

async fn create(api: &Proxmox, id: u64, spec: &CtSpec) -> Result<Ended, ApiError> {
    api.ct_create(NODE, vmid(id), spec).await?.wait().await
}

/// The server ends outside of the test's runtime; and what was sent was what the real API knows.
fn end(pve: Pve) {
    match pve.violations() {
        Some(found) => assert!(found.is_empty(), "{found:#?}"),
        None => println!("figure: the real API's schema is not at hand, requests were not checked against it"),
    }
    tokio::task::block_in_place(|| drop(pve));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containers_life() {
    let (pve, api) = node().await;
    assert_eq!(api.version().await.expect("version").major(), Some(9));
    assert_eq!(api.nodes().await.expect("nodes")[0].mem, 1 << 30);
    let id = api.next_vmid().await.expect("next");
    assert_eq!(id.get(), 100);

    let mut lines = Vec::new();
    let task = api.ct_create(NODE, id, &spec()).await.expect("created");
    assert_eq!((task.upid().kind(), task.upid().id(), task.upid().user()), ("vzcreate", "100", TOKEN));
    task.wait_with(|l| lines.push(l.to_owned())).await.expect("made");
    assert!(lines.iter().any(|l| l == "TASK OK"), "{lines:?}");
    assert!(!api.vmid_is_free(id).await.expect("asked"));

    let config = api.ct_config(NODE, id).await.expect("config");
    assert_eq!(config.description(), "a=1;b=2&c\nof the test", "nothing separates but what we separate");
    assert_eq!(
        (config.tags.to_string().as_str(), config.nets[&0].bridge.as_deref()),
        ("k8s;ns-default", Some("vmbr0"))
    );
    assert_eq!(
        (config.get("memory"), config.get("onboot"), config.get("unprivileged")),
        (Some("64"), Some("0"), Some("1"))
    );

    api.guest_start(ct(id)).await.expect("started");
    api.guest_start(ct(id)).await.expect("it runs already, which is fine");
    assert!(api.guest_status(ct(id)).await.expect("status").is_running());
    assert_eq!(api.ct_interfaces(NODE, id).await.expect("interfaces")[0].name, "lo");

    // What takes effect at once, and what waits.
    let change = |key: &str, value: &str| GuestChange {
        set: [(key.to_owned(), value.to_owned())].into(),
        ..GuestChange::default()
    };
    assert_eq!(api.guest_update(ct(id), &change("memory", "128")).await.expect("memory").len(), 0);
    let pending = api.guest_update(ct(id), &change("features", "nesting=1")).await.expect("features");
    assert_eq!(pending.iter().map(|p| p.key.as_str()).collect::<Vec<_>>(), ["features"]);
    let stale = GuestChange { digest: Some(config.digest), ..change("memory", "256") };
    assert_eq!(*api.guest_update(ct(id), &stale).await.expect_err("stale").kind(), ErrorKind::Changed);
    let gone = GuestChange { delete: vec!["hostname".into()], ..GuestChange::default() };
    api.guest_update(ct(id), &gone).await.expect("deleted");
    assert_eq!(api.ct_config(NODE, id).await.expect("config").get("hostname"), None);

    let resized = api.guest_resize(ct(id), "rootfs", "+1G").await.expect("resize").wait().await;
    resized.expect("resized");
    let less = api.guest_resize(ct(id), "rootfs", "1G").await.expect("accepted").wait().await.expect_err("less");
    assert_eq!(*less.kind(), ErrorKind::TaskFailed);
    assert_eq!(api.ct_config(NODE, id).await.expect("config").volumes["rootfs"].size.as_deref(), Some("2G"));

    api.guest_snapshot(ct(id), "s1", "first").await.expect("snapshot").wait().await.expect("taken");
    let again = api.guest_snapshot(ct(id), "s1", "").await.expect("accepted").wait().await.expect_err("twice");
    assert_eq!(*again.kind(), ErrorKind::AlreadyExists);
    assert_eq!(api.guest_snapshots(ct(id)).await.expect("list").len(), 1, "the present state is none");
    api.guest_rollback(ct(id), "s1", false).await.expect("rollback").wait().await.expect("back");
    let no = api.guest_rollback(ct(id), "s2", false).await.expect("accepted").wait().await.expect_err("none");
    assert!(no.is_not_found(), "{no:?}");
    api.guest_delete_snapshot(ct(id), "s1").await.expect("delete").wait().await.expect("deleted");

    let clone = CloneSpec { name: Some("c2".into()), pool: Some("k8s".into()), full: true, ..CloneSpec::default() };
    api.guest_clone(ct(id), vmid(101), &clone).await.expect("clone").wait().await.expect("cloned");
    api.guest_make_template(ct(vmid(101))).await.expect("a template");
    assert!(api.guest_list(GuestKind::Ct, NODE).await.expect("list").iter().any(|c| c.vmid == vmid(101) && c.template));
    assert_eq!(api.guests().await.expect("guests").len(), 2);

    api.guest_start(ct(id)).await.expect("started");
    api.guest_shutdown(ct(id), 5, true).await.expect("shut down");
    api.guest_stop(ct(id)).await.expect("it is stopped already, which is fine");
    for id in [id, vmid(101)] {
        api.guest_delete(ct(id), false).await.expect("deleted");
        api.guest_delete(ct(id), false).await.expect("it is gone already, which is fine");
        assert!(!api.guest_exists(ct(id)).await.expect("asked"), "the pool's token is refused what is gone: still no");
    }
    assert!(api.guest_start(ct(id)).await.expect_err("gone").is_not_found());
    assert!(api.ct_config(NODE, id).await.expect_err("gone").is_not_found());
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_refuses() {
    let (pve, api) = node().await;
    create(&api, 100, &spec()).await.expect("made");
    let e = create(&api, 100, &spec()).await.expect_err("taken");
    assert_eq!(*e.kind(), ErrorKind::AlreadyExists);
    let absent = CtSpec { ostemplate: "local:vztmpl/none.tar".into(), ..spec() };
    let e = create(&api, 101, &absent).await.expect_err("accepted, then failed");
    assert!(e.is_not_found() && e.to_string().contains("UPID:"), "{e}");
    assert!(api.vmid_is_free(vmid(101)).await.expect("asked"), "nothing is left");

    let set = |key: &str, value: &str| GuestChange {
        set: [(key.to_owned(), value.to_owned())].into(),
        ..GuestChange::default()
    };
    let bad = api.guest_update(ct(vmid(100)), &set("memory", "abc")).await.expect_err("no number");
    assert_eq!((bad.kind(), bad.status()), (&ErrorKind::Invalid, Some(400)));
    assert!(bad.params()["memory"].contains("type check"), "{bad}");
    let bad = api.guest_update(ct(vmid(100)), &set("memroy", "64")).await.expect_err("unknown");
    assert!(bad.to_string().contains("memroy"), "{bad}");
    for (key, value) in [("mp0", "/etc,mp=/x"), ("dev0", "/dev/kvm"), ("features", "keyctl=1")] {
        let e = api.guest_update(ct(vmid(100)), &set(key, value)).await.expect_err("root only");
        assert_eq!(*e.kind(), ErrorKind::RootOnly, "{e}");
    }
    let e = api.guest_delete_snapshot(ct(vmid(100)), "none").await.expect("accepted").wait().await.expect_err("none");
    assert!(e.is_not_found());
    api.guest_start(ct(vmid(100))).await.expect("started");
    let e = api.guest_delete(ct(vmid(100)), false).await.expect_err("it runs");
    assert_eq!(*e.kind(), ErrorKind::StillRunning);
    api.guest_delete(ct(vmid(100)), true).await.expect("by force");
    assert_eq!(*api.guest_list(GuestKind::Ct, "zzz").await.expect_err("no such node").kind(), ErrorKind::UnknownNode);
    // `memroy` is what the schema has to find; without it the check would check nothing.
    if let Some(found) = pve.violations() {
        assert!(found.iter().any(|f| f.contains("memroy")) && found.iter().any(|f| f.contains("memory")), "{found:?}");
    }
    tokio::task::block_in_place(|| drop(pve));
}

#[tokio::test(flavor = "multi_thread")]
async fn privileges() {
    let (pve, api) = node().await;
    let all = needs("k8s", &["local".into()], &["vmbr0".into()]);
    assert_eq!(api.lacking(&all).await.expect("asked"), []);
    let more = needs("other", &["local".into()], &["vmbr9".into()]);
    let lacking = api.lacking(&more).await.expect("asked");
    assert!(lacking.iter().all(|n| n.path == "/pool/other" || n.path.ends_with("vmbr9")) && lacking.len() > 10);

    let mut outside = spec();
    outside.guest.pool = None;
    let e = create(&api, 100, &outside).await.expect_err("outside the pool");
    let expected = ErrorKind::Permission { path: "/vms/100".into(), privileges: vec!["VM.Allocate".into()] };
    assert_eq!(*e.kind(), expected);
    assert!(e.to_string().contains("lacks VM.Allocate on /vms/100"), "{e}");
    let e = create(&api, 100, &CtSpec { privileged: true, ..spec() }).await.expect_err("privileged");
    assert!(matches!(e.kind(), ErrorKind::Permission { path, .. } if path == "/"), "{e}");
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_tickets_and_secrets() {
    let (pve, api) = node().await;
    // The token is exchanged on the node: the file is read again.
    let other = "00000000-1111-2222-3333-444444444444";
    pve.allow_token(TOKEN, other);
    let e = api.nodes().await.expect_err("the old secret");
    assert_eq!((e.kind(), e.status()), (&ErrorKind::Auth, Some(401)));
    assert!(!format!("{e} {e:?} {api:?}").contains(SECRET));
    pve.secret("token", other);
    // All at once: who reads the file first does it for those that were refused with him.
    let all = futures::future::join_all((0..8).map(|_| api.nodes())).await;
    assert!(all.iter().all(Result::is_ok), "the new one: {all:?}");

    let password = pve.secret("password", "hunter22");
    let settings =
        Settings { token_id: String::new(), user: "root@pam".into(), password_file: Some(password), ..pve.settings() };
    let by_ticket = client(&settings);
    by_ticket.nodes().await.expect("a ticket");
    create(&by_ticket, 200, &spec()).await.expect("writing takes the CSRF token");
    assert_eq!(pve.count("POST", "/access/ticket"), 1, "one ticket serves all");
    pve.expire_tickets();
    by_ticket.nodes().await.expect("renewed after a 401");
    assert_eq!(pve.count("POST", "/access/ticket"), 2);
    pve.expire_tickets();
    let all = futures::future::join_all((0..8).map(|_| by_ticket.nodes())).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    assert_eq!(pve.count("POST", "/access/ticket"), 3, "one logs in for all");
    // A login that hangs is waited for once, by all, and nothing of their calls was sent.
    let hasty = client(&Settings { timeout: Duration::from_secs(1).into(), ..settings.clone() });
    pve.fault_for_long("POST", "/access/ticket", What::Slow(Duration::from_secs(5)));
    let began = Instant::now();
    let id = vmid(200);
    let all = futures::future::join_all((0..8).map(|_| hasty.guest_start(ct(id)))).await;
    for e in all.into_iter().map(|r| r.expect_err("no ticket")) {
        assert!(*e.kind() == ErrorKind::Timeout && !e.is_uncertain(), "{e:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(pve.count("POST", "/status/start"), 0);
    pve.mend();
    hasty.nodes().await.expect("a ticket");
    let wrong = pve.secret("password", "hunter23");
    let by_ticket = client(&Settings { password_file: Some(wrong), ..settings });
    let e = by_ticket.nodes().await.expect_err("a wrong password");
    assert!(*e.kind() == ErrorKind::Auth && !format!("{e:?}").contains("hunter23"), "{e:?}");
    // A value that the API repeats in its refusal.
    pve.fault("POST", "/lxc", 1, What::Status(500, "value 'sesame1' of password is too short".into()));
    let mut told = spec();
    told.guest.extra = [("password".to_owned(), "sesame1".to_owned())].into();
    let e = create(&api, 201, &told).await.expect_err("refused");
    assert!(e.to_string().contains("[secret]") && !e.to_string().contains("sesame1"), "{e}");
    tokio::task::block_in_place(|| drop(pve));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates() {
    let (pve, _) = node().await;
    let pinned = |print: &str| {
        let text = format!(
            "[proxmox]\nendpoints = [\"{}\"]\ntoken_id = \"{TOKEN}\"\ntoken_file = \"{}\"\nfingerprint = \"{print}\"\nnode = \"pve1\"\n",
            pve.url(),
            pve.file("token")
        );
        client(&proxmox_lxcri::core::config::Config::parse(&text, "c.toml").expect("a configuration").proxmox)
    };
    pinned(pve.fingerprint()).nodes().await.expect("the right fingerprint");
    let e = pinned(&"AB".repeat(32)).nodes().await.expect_err("another one");
    assert_eq!(*e.kind(), ErrorKind::Certificate);
    assert!(e.to_string().contains(pve.fingerprint()), "it says which one it is: {e}");
    let (other, _) = node().await;
    let wrong_ca = Settings { ca_file: Some(other.file("ca.pem")), ..pve.settings() };
    assert_eq!(*client(&wrong_ca).nodes().await.expect_err("another CA").kind(), ErrorKind::Certificate);
    assert!(pve.requests().iter().all(|r| r.path == "/nodes") && pve.requests().len() == 1, "nothing was sent");
    let broken = Settings { ca_file: Some(pve.file("token")), ..pve.settings() };
    assert!(Proxmox::new(&broken).expect_err("no certificate in it").chain().contains("ca_file"));
    tokio::task::block_in_place(|| drop((pve, other)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_repeated_and_what_is_not() {
    let (pve, api) = node().await;
    create(&api, 100, &spec()).await.expect("made");
    let status = |n: u16, text: &str| What::Status(n, text.into());
    // Reading: again.
    for what in [
        status(596, "Connection timed out"),
        status(595, ""),
        What::Cut,
        status(500, "can't lock file '/x' - got timeout"),
    ] {
        let before = pve.count("GET", "/nodes");
        pve.fault("GET", "/nodes", 2, what.clone());
        api.nodes().await.unwrap_or_else(|e| panic!("{what:?}: {e}"));
        assert_eq!(pve.count("GET", "/nodes") - before, 3, "{what:?}");
    }
    // Changes whose fate is not known: given to the caller, who looks.
    for what in [status(596, "Broken pipe"), status(595, ""), What::Cut, What::CutAfter] {
        let before = pve.count("POST", "/status/start");
        pve.fault("POST", "/status/start", 1, what.clone());
        let e = api.guest_start(ct(vmid(100))).await.expect_err("not known");
        assert_eq!(*e.kind(), ErrorKind::NoAnswer, "{what:?}");
        assert_eq!(pve.count("POST", "/status/start") - before, 1, "{what:?}");
    }
    // The last one was done although nobody heard: the task is found by its guest.
    let found = api.active_tasks(NODE, Some(vmid(100))).await.expect("tasks");
    match found.into_iter().find(|t| t.kind == "vzstart") {
        Some(task) => drop(api.resume(task.upid).wait().await.expect("started")),
        None => assert!(api.guest_status(ct(vmid(100))).await.expect("status").is_running()),
    }
    // A lock that was not got is no change: again.
    pve.fault("PUT", "/config", 1, status(500, "can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout"));
    let change = GuestChange { set: [("cores".to_owned(), "2".to_owned())].into(), ..GuestChange::default() };
    api.guest_update(ct(vmid(100)), &change).await.expect("at the second try");
    let e = {
        pve.fault("GET", "/version", 1, What::Data(serde_json::json!("what")));
        api.version().await.expect_err("no version")
    };
    assert_eq!(*e.kind(), ErrorKind::Protocol);
    // Other types for the same thing.
    let odd = serde_json::json!([{ "vmid": "100", "status": "running", "mem": "12", "maxmem": 5.5, "cpu": "0.25", "uptime": null, "template": "" }]);
    pve.fault("GET", "/lxc", 1, What::Data(odd));
    let list = api.guest_list(GuestKind::Ct, NODE).await.expect("understood");
    assert_eq!((list[0].mem, list[0].maxmem, list[0].cpu), (12, 5, 0.25));
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_are_away() {
    let (pve, _) = node().await;
    let away = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let mut settings = Settings { endpoints: vec![format!("https://{away}"), pve.url()], ..pve.settings() };
    let api = client(&settings);
    // Nothing was sent, so that also a change goes on to the next.
    create(&api, 100, &spec()).await.expect("at the second endpoint");
    settings.endpoints.truncate(1);
    let e = client(&settings).nodes().await.expect_err("nobody there");
    assert_eq!(*e.kind(), ErrorKind::Unreachable);
    // One that takes the connection and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("https://{}", silent.local_addr().expect("its address"));
    let settings = Settings { endpoints: vec![url], timeout: Duration::from_secs(1).into(), ..pve.settings() };
    let began = Instant::now();
    let e = client(&settings).nodes().await.expect_err("silent");
    assert!(matches!(e.kind(), ErrorKind::Timeout | ErrorKind::Unreachable), "{e:?}");
    assert!(began.elapsed() < Duration::from_secs(30));
    pve.fault("GET", "/nodes", 1, What::Slow(Duration::from_secs(5)));
    let settings = Settings { timeout: Duration::from_secs(1).into(), ..pve.settings() };
    client(&settings).nodes().await.expect("slow once, then quick: reading is repeated");
    pve.fault("POST", "/status/start", 1, What::Slow(Duration::from_secs(5)));
    let e = client(&settings).guest_start(ct(vmid(100))).await.expect_err("slow");
    assert_eq!(*e.kind(), ErrorKind::Timeout);
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_end_badly() {
    let (pve, api) = node().await;
    pve.fault("POST", "/lxc", 1, What::TaskWarns(2));
    assert_eq!(create(&api, 100, &spec()).await.expect("with warnings"), Ended::Warnings(2));
    pve.fault("POST", "/status/start", 1, What::TaskEnds("startup for container '100' failed".into()));
    let e = api.guest_start(ct(vmid(100))).await.expect_err("failed");
    assert_eq!(*e.kind(), ErrorKind::TaskFailed);
    pve.fill("local", true);
    let e = create(&api, 101, &spec()).await.expect_err("full");
    assert_eq!(*e.kind(), ErrorKind::NoSpace);
    assert_eq!(proxmox_lxcri::core::error::Error::from(e).kind(), proxmox_lxcri::core::error::Kind::ResourceExhausted);
    pve.fill("local", false);
    // A worker that died half-way leaves a locked container in no pool: no token whose rights come from there gets at it.
    pve.fault("POST", "/lxc", 1, What::HalfDone);
    let e = create(&api, 102, &spec()).await.expect_err("died");
    assert!(*e.kind() == ErrorKind::TaskFailed && e.has_died(), "{e}");
    let hidden = [api.ct_config(NODE, vmid(102)).await.map(drop), api.guest_delete(ct(vmid(102)), true).await];
    for result in hidden {
        assert!(matches!(result.expect_err("in no pool").kind(), ErrorKind::Permission { .. }));
    }
    // Root sees it: it goes without its volume, which nothing names, or with it.
    let password = pve.secret("password", "hunter22");
    let root =
        Settings { token_id: String::new(), user: "root@pam".into(), password_file: Some(password), ..pve.settings() };
    let root = client(&root);
    pve.lock_guest(102, None);
    root.guest_delete(ct(vmid(102)), true).await.expect("deleted");
    assert!(pve.cts_and_volumes().contains(&"subvol-102-disk-0.subvol".to_owned()));
    pve.fault("POST", "/lxc", 1, What::HalfDone);
    create(&api, 102, &spec()).await.expect_err("died");
    pve.lock_guest(102, None);
    assert!(root.guest_destroy(ct(vmid(102)), true, true).await.expect("deleted"));
    assert!(!root.guest_destroy(ct(vmid(102)), true, true).await.expect("it is gone already"));
    assert_eq!(pve.cts_and_volumes(), ["CT 100", "subvol-100-disk-0.subvol"]);
    // Locks hold whoever forces, and so does protection.
    pve.lock_guest(100, Some("backup"));
    for result in [api.guest_delete(ct(vmid(100)), true).await, api.guest_start(ct(vmid(100))).await] {
        assert_eq!(*result.expect_err("locked").kind(), ErrorKind::Locked("backup".into()));
    }
    pve.lock_guest(100, None);
    pve.set_config(100, "protection", "1");
    let e = api.guest_delete(ct(vmid(100)), true).await.expect_err("protected");
    assert_eq!(*e.kind(), ErrorKind::Locked("protection".into()));
    pve.set_config(100, "protection", "0");
    pve.fault("DELETE", "/lxc/100", 1, What::TaskEnds("storage 'gone' does not exist".into()));
    let e = api.guest_delete(ct(vmid(100)), false).await.expect_err("what is not there is its storage");
    assert!(e.is_not_found() && api.guest_exists(ct(vmid(100))).await.expect("asked"));
    // A task that did not get the lock has done nothing.
    let busy = || What::TaskEnds("can't lock file '/run/lock/lxc/pve-config-100.lock' - got timeout".into());
    pve.fault("POST", "/status/start", 2, busy());
    api.guest_start(ct(vmid(100))).await.expect("at the third try");
    pve.fault("POST", "/status/stop", 1, busy());
    api.guest_stop(ct(vmid(100))).await.expect("at the second try");
    pve.fault("POST", "/status/start", usize::MAX, busy());
    assert_eq!(*api.guest_start(ct(vmid(100))).await.expect_err("always").kind(), ErrorKind::Busy);
    pve.mend();
    // What stops does not wait for what is made.
    let narrow = client(&Settings { max_parallel: 1, ..pve.settings() });
    api.guest_start(ct(vmid(100))).await.expect("started");
    pve.dawdle(Duration::from_secs(3));
    let slow = narrow.ct_create(NODE, vmid(104), &spec()).await.expect("begun");
    let began = Instant::now();
    narrow.guest_stop(ct(vmid(100))).await.expect("stopped");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    slow.wait().await.expect("made");
    pve.dawdle(Duration::ZERO);
    pve.freeze(true);
    assert_eq!(*create(&api, 103, &spec()).await.expect_err("no quorum").kind(), ErrorKind::NoQuorum);
    assert_eq!(*api.guest_start(ct(vmid(100))).await.expect_err("no quorum").kind(), ErrorKind::NoQuorum);
    api.guest_list(GuestKind::Ct, NODE).await.expect("reading needs none");
    pve.freeze(false);
    // Looks at a task may fail while it goes on.
    pve.fault("GET", "/tasks/", 3, What::Status(596, "Connection timed out".into()));
    api.guest_start(ct(vmid(100))).await.expect("started");
    let unknown = "UPID:pve1:00000001:00000001:00000001:vzstart:100:root@pam:".parse().expect("a UPID");
    assert!(api.resume(unknown).wait().await.expect_err("no such task").is_not_found());
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_at_once() {
    let (pve, _) = node().await;
    let api = client(&Settings { max_parallel_creates: 2, max_parallel: 4, ..pve.settings() });
    let jobs = (0..20).map(|n| {
        let api = api.clone();
        async move {
            // All want the same numbers: who loses takes the next.
            for id in 100 + n / 4..200 {
                match create(&api, id, &spec()).await {
                    Err(e) if *e.kind() == ErrorKind::AlreadyExists => {}
                    made => {
                        made.expect("made");
                        return api.guest_start(ct(vmid(id))).await.map(|()| id);
                    }
                }
            }
            panic!("no number left")
        }
    });
    let ids = futures::future::join_all(jobs).await.into_iter().collect::<Result<std::collections::BTreeSet<_>, _>>();
    assert_eq!(ids.expect("all started").len(), 20);
    assert!(api.guest_list(GuestKind::Ct, NODE).await.expect("list").iter().all(|c| c.is_running()));
    assert!(pve.most_at_once("vzcreate") <= 2, "{} creates at once", pve.most_at_once("vzcreate"));
    end(pve);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads() {
    let (pve, api) = node().await;
    let file = pve.file("made.tar.zst");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    std::fs::write(&file, &content).expect("a file");
    api.upload_template(NODE, "local", &file).await.expect("upload").wait().await.expect("there");
    let list = api.content(NODE, "local", Some("vztmpl")).await.expect("content");
    let found = list.iter().find(|c| c.volid == "local:vztmpl/made.tar.zst").expect("listed");
    assert_eq!(found.size, 3_000_000);
    assert_eq!(std::fs::read(pve.file("local").join("template/cache/made.tar.zst")).expect("the file"), content);
    let e = api.upload_template(NODE, "local", &pve.file("token")).await.expect_err("no template's name");
    assert_eq!(*e.kind(), ErrorKind::Invalid);
    let e = api
        .delete_volume(NODE, "local", "local:vztmpl/made.tar.zst")
        .await
        .expect_err("the role has no Datastore.Allocate");
    assert!(matches!(e.kind(), ErrorKind::Permission { .. }), "{e}");
    assert_eq!(api.storages(NODE, Some("rootdir")).await.expect("storages")[0].total, 107_374_182_400);
    assert!(api.content(NODE, "none", None).await.expect_err("no storage").is_not_found());
    end(pve);
}

/// A template: busybox, and an init that ends on SIGPWR as Proxmox's shutdown wants it.
fn busybox_template(pve: &Pve) {
    let root = pve.file("template");
    for folder in ["bin", "sbin", "proc", "sys", "dev", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| std::path::Path::new(p).is_file());
    std::fs::copy(busybox.expect("busybox in the tests' root"), root.join("bin/busybox")).expect("busybox");
    for name in ["sh", "sleep", "cat", "id", "hostname"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("a link");
    }
    let init = root.join("sbin/init");
    std::fs::write(&init, "#!/bin/sh\ntrap 'exit 0' PWR\nwhile :; do sleep 1 & wait $!; done\n").expect("init");
    let tar = pve.file("busybox.tar");
    let mode = std::process::Command::new("chmod").arg("755").arg(&init).status().expect("chmod");
    assert!(mode.success());
    support::run(std::process::Command::new("tar").args(["cf", tar.as_str(), "-C", root.as_str(), "."]));
}

#[test]
fn containers_really_run_by_the_command_line() {
    support::isolated("containers_really_run_by_the_command_line", || {
        // As on a Proxmox node: root may give containers this range.
        for file in ["/etc/subuid", "/etc/subgid"] {
            std::fs::write(file, "root:100000:65536\n").expect("a range of users");
        }
        let lxc = std::path::PathBuf::from("/var/lib/lxc");
        std::fs::create_dir_all(&lxc).expect("lxc's folder");
        let pve = Pve::start(Options { runner: pve::Runner::Lxc(lxc), ..Options::default() });
        busybox_template(&pve);
        let hosts = pve.file("config.toml");
        let state = pve.file("state");
        let text = format!(
            "[server]\nroot = \"{state}\"\n[proxmox]\nendpoints = [\"{}\"]\nnode = \"pve1\"\ntoken_id = \"{TOKEN}\"\ntoken_file = \"{}\"\nca_file = \"{}\"\n",
            pve.url(),
            pve.file("token"),
            pve.file("ca.pem"),
        );
        std::fs::write(&hosts, text).expect("the configuration");
        let output = |args: &[&str]| {
            let mut command = std::process::Command::new(support::daemon_program());
            command.args(["--config", hosts.as_str(), "proxmox"]).args(args).stdin(std::process::Stdio::null());
            command.output().expect("the program starts")
        };
        let ok = |args: &[&str]| {
            let out = output(args);
            assert!(out.status.success(), "{args:?}: {}", support::describe(&out));
            String::from_utf8(out.stdout).expect("text")
        };

        assert!(ok(&["check", "--storage", "local", "--bridge", "vmbr0"]).contains("all that is needed"));
        let out = output(&["check", "--pool", "other"]);
        assert!(out.status.code() == Some(1) && support::describe(&out).contains("lacks VM.Allocate on /pool/other"));
        ok(&["templates", "--storage", "local", "--upload", pve.file("busybox.tar").as_str()]);
        assert!(ok(&["templates"]).contains("local:vztmpl/busybox.tar"));
        let create = [
            "ct",
            "create",
            "local:vztmpl/busybox.tar",
            "--pool",
            "k8s",
            "--hostname",
            "c1",
            "--memory",
            "64",
            "--start",
        ];
        let id = ok(&create).trim().to_owned();
        assert_eq!(id, "100");
        assert!(ok(&["ct", "list"]).lines().any(|l| l.starts_with("100") && l.contains("running") && l.contains("c1")));
        assert!(ok(&["vmids"]).contains("next free: 101"));
        assert!(ok(&["ct", "info", "100"]).contains("memory: 64"));

        // Streams apart, the exit code, the container's own namespaces.
        let out =
            output(&["ct", "exec", "100", "--", "sh", "-c", "id -u; cat /proc/self/uid_map; echo err >&2; exit 7"]);
        let said = String::from_utf8_lossy(&out.stdout).split_whitespace().map(String::from).collect::<Vec<_>>();
        assert_eq!(
            (out.status.code(), said.join(" ").as_str()),
            (Some(7), "0 0 100000 65536"),
            "{}",
            support::describe(&out)
        );
        assert!(String::from_utf8_lossy(&out.stderr).contains("err"));
        assert_eq!(ok(&["ct", "exec", "100", "hostname"]).trim(), "CT100");
        let out = output(&["ct", "exec", "--node", "pve2", "100", "hostname"]);
        assert!(!out.status.success());

        let pending = ok(&["ct", "update", "100", "memory=128", "features=nesting=1"]);
        assert_eq!(pending.trim(), "features takes effect at the next start");
        assert!(ok(&["ct", "config", "100", "--json"]).contains("\"memory\": \"128\""));
        let out = output(&["ct", "update", "100", "memroy=1"]);
        assert!(
            out.status.code() == Some(1) && support::describe(&out).contains("memroy"),
            "{}",
            support::describe(&out)
        );
        ok(&["ct", "shutdown", "100", "--timeout", "30"]);
        let out = output(&["ct", "exec", "100", "hostname"]);
        assert!(support::describe(&out).contains("does not run"), "{}", support::describe(&out));
        ok(&["ct", "resize", "100", "rootfs", "+1G"]);
        ok(&["ct", "snapshot", "100", "s1"]);
        assert!(ok(&["ct", "snapshots", "100"]).contains("s1"));
        ok(&["ct", "rollback", "100", "s1", "--start"]);
        ok(&["ct", "stop", "100"]);
        assert_eq!(ok(&["ct", "clone", "100", "--pool", "k8s", "--hostname", "c2"]).trim(), "101");
        ok(&["ct", "start", "101"]);
        assert_eq!(ok(&["ct", "exec", "101", "sh", "-c", "echo here"]).trim(), "here");

        // What is ours by its notes and has no pod; what only looks like it.
        assert!(ok(&["orphans"]).is_empty(), "an installation that was never started owns nothing");
        let (own, pod) = ("0123456789abcdef0123456789abcdef", "ab".repeat(32));
        std::fs::create_dir_all(state.join("pods")).expect("a folder");
        std::fs::write(state.join("installation"), own).expect("an id");
        let mark = |installation: &str, pod: &str| {
            format!("description=Pod a/b\nproxmox-lxcri: installation={installation} pod={pod}")
        };
        ok(&["ct", "update", "101", &mark(own, &pod), "tags=k8s"]);
        ok(&["ct", "update", "100", &mark(&own.replace('0', "f"), &pod), "tags=k8s"]);
        std::fs::create_dir_all(state.join("pods").join(&pod)).expect("its record");
        assert!(!ok(&["orphans"]).contains("101"), "its pod has a record");
        std::fs::remove_dir(state.join("pods").join(&pod)).expect("no record");
        assert!(ok(&["orphans"]).contains("101") && !ok(&["orphans"]).contains("100"));
        std::fs::create_dir_all(state.join("quarantine")).expect("a folder");
        std::fs::create_dir_all(state.join("quarantine/pod-x")).expect("a record");
        assert!(!output(&["orphans", "--remove"]).status.success(), "not with records in quarantine");
        // Without pods' records in it the folder is nothing.
        std::fs::remove_dir(state.join("quarantine/pod-x")).expect("no record");
        ok(&["orphans", "--remove"]);
        let exists = |id: &str| output(&["ct", "exists", id]).status.code();
        assert_eq!((exists("101"), exists("100")), (Some(1), Some(0)));
        pve.fault("GET", "/status/current", 1, What::Status(401, String::new()));
        assert_eq!(exists("100"), Some(3), "it can't be told");
        assert_eq!(ok(&["ct", "exists", "100", "--json"]).trim(), "true");
        assert!(
            ok(&["check", "--storage", "local", "--pool", "k8s", "--bridge", "pods", "--json"])
                .contains("\"lacking\": []")
        );
        ok(&["ct", "delete", "100"]);
        assert!(ok(&["tasks"]).contains("vzdestroy"));
        assert!(!ok(&["tasks", "--active"]).contains("vz"));
        let found = pve.violations().unwrap_or_default();
        assert!(found.iter().all(|f| f.contains("memroy")), "{found:#?}");
    });
}
