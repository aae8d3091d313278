//! Images for real: pulls from a real registry and from one that misbehaves, loads, overlay mounts, removal, restarts.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use images_support::{Answer, Built, Fake, Item, Registry, World, build, gzip, layer, run, write_layout};
use proxmox_lxcri::core::error::Kind;
use proxmox_lxcri::core::ids::ContainerId;
use proxmox_lxcri::core::ports::{ImageSource, ImageStore, LayerStore, RegistryAuth, RootfsOptions};
use proxmox_lxcri::core::spec::IdMapping;
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::integrations::overlay::{OverlayOptions, OverlayStore};
use proxmox_lxcri::utils::beneath::Root;
use proxmox_lxcri::utils::tasks::TaskSet;
use rustix::fs::{Mode, OFlags};

fn simple(content: &str) -> Built {
    build(&[layer(&[Item::dir("etc"), Item::file("etc/name", content.as_bytes())])], "amd64", false)
}

fn two_layers() -> Built {
    two_layers_as(true)
}

fn two_layers_as(zstd: bool) -> Built {
    let base = layer(&[
        Item::dir("./").mode(0o711),
        Item::dir("etc").owner(3, 4).mode(0o750),
        Item::file("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
        Item::file("etc/gone", b"old"),
        Item::dir("hidden"),
        Item::file("hidden/a", b"a"),
        Item::file("bin/su", b"#!").mode(0o4755),
        Item::hardlink("bin/su2", "bin/su"),
    ]);
    let top = layer(&[
        Item::file("etc/.wh.gone", b""),
        Item::file("etc/new", b"new"),
        Item::dir("hidden"),
        Item::file("hidden/.wh..wh..opq", b""),
        Item::file("hidden/b", b"b"),
    ]);
    build(&[base, top], "amd64", zstd)
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_from_a_real_registry_and_mounts() {
    let registry = Registry::start();
    registry.push(&two_layers(), "lib/two:1");
    let world = World::new().await;
    let name = format!("{}/lib/two:1", registry.host);
    let image = world.images.pull(&name, None).await.unwrap();
    assert_eq!(image.repo_tags, std::slice::from_ref(&name));
    assert_eq!(image.id, two_layers().config);
    assert!(image.repo_digests[0].starts_with(&format!("{}/lib/two@sha256:", registry.host)));
    assert_eq!((image.config.user.as_str(), image.config.cmd.as_slice()), ("7:8", ["/bin/sh".to_owned()].as_slice()));
    assert!(image.size > 0 && image.chains.len() == 2);
    for form in [
        name.as_str(),
        image.id.as_str(),
        image.id.hex(),
        &image.id.hex()[..12],
        &image.repo_digests[0],
        &format!("{}/lib/two:other@{}", registry.host, image.repo_digests[0].split('@').nth(1).unwrap()),
    ] {
        assert_eq!(world.images.resolve(form).unwrap().id, image.id, "{form}");
    }
    for form in [&image.id.hex()[..11], "busybox", "", "sha256:", &format!("{}/lib/two", registry.host)] {
        assert!(world.images.resolve(form).is_none(), "{form}");
    }
    assert_eq!(world.images.usage().1.bytes, image.size);
    assert_eq!(world.counts(), (2, 0, 0));

    let id = ContainerId::new();
    world.layers.create_rootfs(&id, &image.chains, &RootfsOptions::default()).await.unwrap();
    world.layers.create_rootfs(&id, &image.chains, &RootfsOptions::default()).await.unwrap();
    let mount = Root::from_fd(world.layers.mount_rootfs(&id).await.unwrap());
    assert_eq!(mount.read_file("etc/new", 10).unwrap(), b"new");
    assert_eq!(mount.read_file("etc/passwd", 100).unwrap(), b"root:x:0:0::/:/bin/sh\n");
    assert!(mount.read_file("etc/gone", 10).is_err());
    assert!(mount.read_file("hidden/a", 10).is_err());
    assert_eq!(mount.read_file("hidden/b", 10).unwrap(), b"b");
    let stat = |path: &str| {
        rustix::fs::fstat(mount.open_at(path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap()).unwrap()
    };
    assert_eq!(stat("bin/su").st_mode & 0o7777, 0o4755);
    assert_eq!(stat("bin/su").st_ino, stat("bin/su2").st_ino);
    // The upper layer only implies etc: owner and mode are the base's; so is the root's mode.
    assert_eq!((stat("etc").st_uid, stat("etc").st_gid, stat("etc").st_mode & 0o7777), (3, 4, 0o750));
    assert_eq!(stat(".").st_mode & 0o7777, 0o711);
    std::io::Write::write_all(&mut mount.create_file(Path::new("written"), 0o600).unwrap(), &[1; 100_000]).unwrap();
    let usage = world.written(&id, 100_000).await;
    assert!(usage.bytes >= 100_000 && usage.inodes == 1, "{usage:?}");
    drop(mount);
    // The same boot: it can be mounted again, with what was written.
    let mount = Root::from_fd(world.layers.mount_rootfs(&id).await.unwrap());
    assert_eq!(mount.read_file("written", 200_000).unwrap().len(), 100_000);
    drop(mount);

    // Images go, layers in use stay until their container is gone.
    world.images.remove(&name).await.unwrap();
    assert!(world.images.list().is_empty());
    assert_eq!(world.counts(), (2, 0, 1));
    let world = world.restart().await;
    assert_eq!(world.layers.list_rootfs().await.unwrap(), std::slice::from_ref(&id));
    assert_eq!(world.counts(), (2, 0, 1));
    world.layers.remove_rootfs(&id).await.unwrap();
    world.layers.remove_rootfs(&id).await.unwrap();
    assert!(world.images.collect_layers().await.unwrap() > 0);
    assert_eq!(world.counts(), (0, 0, 0));
    world.tasks.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pull_however_many_ask() {
    let image = two_layers();
    let fake = Fake::serving(image.clone(), |_| None).await;
    let world = World::new().await;
    let pulls = (0..20).map(|n| {
        let (images, name) = (world.images.clone(), format!("{}/x:{}", fake.host, n % 4));
        async move { images.pull(&name, None).await.unwrap() }
    });
    let got = futures::future::join_all(pulls).await;
    assert!(got.iter().all(|i| i.id == image.config));
    for blob in image.blobs.keys() {
        assert_eq!(fake.count(blob), 1, "{blob}");
    }
    let all = world.images.list();
    assert_eq!((all.len(), all[0].repo_tags.len(), all[0].repo_digests.len()), (1, 4, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_gives_up_can_join_again() {
    let image = simple("slow");
    let blob = image.layers[0].to_string();
    let gate = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let opened = gate.clone();
    let fake = Fake::serving(image, move |seen| {
        // The test opens the gate when the first caller has gone.
        let deadline = Instant::now() + Duration::from_secs(10);
        while seen.path.contains(&blob) && !opened.load(std::sync::atomic::Ordering::SeqCst) {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        None
    })
    .await;
    let world = World::new().await;
    let name = format!("{}/x", fake.host);
    let first = tokio::time::timeout(Duration::from_millis(300), world.images.pull(&name, None)).await;
    assert!(first.is_err(), "the first caller has to give up");
    gate.store(true, std::sync::atomic::Ordering::SeqCst);
    world.images.pull(&name, None).await.unwrap();
    assert_eq!(fake.count("/blobs/"), 2, "config and layer once each");
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_move_and_images_survive_restarts() {
    let registry = Registry::start();
    let world = World::new().await;
    let name = format!("{}/app:latest", registry.host);
    registry.push(&simple("one"), "app:latest");
    let one = world.images.pull(&name, None).await.unwrap();
    registry.push(&simple("two"), "app:latest");
    let two = world.images.pull(&name, None).await.unwrap();
    assert_ne!(one.id, two.id);
    let old = world.images.resolve(one.id.as_str()).unwrap();
    assert!(old.repo_tags.is_empty());
    assert_eq!(old.repo_digests, one.repo_digests);
    assert_eq!(world.images.resolve(&name).unwrap().id, two.id);
    // A known digest needs no registry.
    drop(registry);
    assert_eq!(world.images.pull(&one.repo_digests[0], None).await.unwrap().id, one.id);
    // Under another name it does: knowing a digest gives no right to a repository.
    let other = one.repo_digests[0].replace("/app@", "/private@");
    assert_eq!(world.images.pull(&other, None).await.unwrap_err().kind(), Kind::Unavailable);

    let before = world.images.list();
    let world = world.restart().await;
    assert_eq!(world.images.list(), before);
    // A damaged record is set aside; the other image and all layers stay.
    let record = world.path("images/images").join(format!("{}.json", two.id.hex()));
    std::fs::write(&record, "{\"version\":1").unwrap();
    let world = world.restart().await;
    assert_eq!(world.images.list().iter().map(|i| i.id.clone()).collect::<Vec<_>>(), std::slice::from_ref(&one.id));
    assert_eq!(std::fs::read_dir(world.path("images/quarantine")).unwrap().count(), 1);
    assert_eq!(world.counts().0, 2);
    assert_eq!(world.images.collect_layers().await.unwrap_err().kind(), Kind::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn misbehaving_registries_leave_nothing() {
    let image = two_layers();
    let blob = image.layers[1].to_string();
    let wrong = gzip(&layer(&[Item::file("evil", b"x")]));
    let data = image.blobs[&blob].clone();
    let mut flipped = data.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let manifest = |answer: Answer| ("/manifests/".to_owned(), answer);
    let index = |arch: &str| {
        serde_json::json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": image.digest().as_str(), "size": 1, "platform": {"os": "linux", "architecture": arch}}]})
        .to_string()
    };
    let cases: Vec<((String, Answer), Kind, &str)> = vec![
        ((blob.clone(), Answer::Truncated(data.clone(), data.len() / 2)), Kind::Unavailable, &blob),
        ((blob.clone(), Answer::ok(&data[..data.len() / 2])), Kind::Internal, &blob),
        ((blob.clone(), Answer::ok(&wrong)), Kind::Internal, &blob),
        ((blob.clone(), Answer::ok(&flipped)), Kind::Internal, ": got sha256:"),
        ((blob.clone(), Answer::ok(&[data.clone(), data.clone()].concat())), Kind::Internal, &blob),
        ((blob.clone(), Answer::Stalled(data.clone(), 10)), Kind::DeadlineExceeded, "no progress"),
        ((blob.clone(), Answer::Silent), Kind::DeadlineExceeded, "no progress"),
        ((blob.clone(), Answer::status(404)), Kind::NotFound, &blob),
        ((blob.clone(), Answer::status(500)), Kind::Unavailable, "answer 500"),
        ((image.config.to_string(), Answer::ok(b"{}")), Kind::Internal, image.config.as_str()),
        (manifest(Answer::ok(b"garbage")), Kind::InvalidArgument, "malformed"),
        (manifest(Answer::ok(&vec![b' '; 5 << 20])), Kind::InvalidArgument, "longer than 4194304"),
        (manifest(Answer::Silent), Kind::DeadlineExceeded, "no progress"),
        (manifest(Answer::status(404)), Kind::NotFound, "/x:1"),
        (manifest(Answer::status(401)), Kind::PermissionDenied, "401"),
        (manifest(Answer::status(403)), Kind::PermissionDenied, "403"),
        (manifest(Answer::ok(br#"{"schemaVersion":1,"fsLayers":[]}"#)), Kind::Unimplemented, "schema 1"),
        (manifest(Answer::ok(index("s390x").as_bytes())), Kind::NotFound, "there is linux/s390x"),
        (
            manifest(Answer::Full(200, vec![("Docker-Content-Digest".into(), blob.clone())], image.manifest.clone())),
            Kind::Internal,
            "digest should be",
        ),
        (
            manifest(Answer::Full(307, vec![("Location".into(), "ftp://x/".into())], Vec::new())),
            Kind::Internal,
            "redirect",
        ),
    ];
    for ((part, answer), kind, text) in cases {
        let (shown, text) = (part.clone(), text.to_owned());
        let fake = Fake::serving(image.clone(), move |s| s.path.contains(&part).then(|| answer.clone())).await;
        let world = World::new().await;
        let e = world.images.pull(&format!("{}/x:1", fake.host), None).await.expect_err(&shown);
        assert_eq!(e.kind(), kind, "{shown}: {}", e.chain());
        assert!(e.chain().contains(&text) && e.chain().contains(&fake.host), "{shown}: {}", e.chain());
        assert!(world.images.list().is_empty());
        assert_eq!(world.counts().1, 0, "nothing unfinished: {}", e.chain());
        world.images.collect_layers().await.unwrap();
        assert_eq!(world.counts().0, 0);
        assert_eq!(std::fs::read_dir(world.path("images/images")).unwrap().count(), 0);
    }
    let world = World::new().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let e = world.images.pull(&format!("{closed}/x:1"), None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_for_other_machines_are_refused() {
    let world = World::new().await;
    let fake = Fake::serving(build(&[layer(&[Item::dir("a")])], "s390x", false), |_| None).await;
    let e = world.images.pull(&format!("{}/x", fake.host), None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::FailedPrecondition);
    assert!(e.chain().contains("linux/s390x"), "{}", e.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_where_they_belong() {
    let image = simple("secret");
    let blob = image.layers[0].to_string();
    // The blob is elsewhere; that server must not see any credentials.
    let elsewhere = Fake::serving(image.clone(), |_| None).await;
    let location = format!("http://{}/v2/x/blobs/{blob}", elsewhere.host);
    let redirect = move |path: &str| {
        let headers = vec![("Location".to_owned(), location.clone())];
        path.ends_with(&blob).then(|| Answer::Full(307, headers, Vec::new()))
    };
    let challenge = |value: String| Answer::Full(401, vec![("WWW-Authenticate".into(), value)], Vec::new());
    let to = redirect.clone();
    let basic = Fake::serving(image.clone(), move |seen| match seen.authorization.as_deref() {
        Some("Basic dTpw") => to(&seen.path),
        _ => Some(challenge("Basic realm=\"x\"".into())),
    })
    .await;
    let auth = |username: &str, password: &str| {
        Some(RegistryAuth { username: username.into(), password: password.into(), ..Default::default() })
    };
    let world = World::new().await;
    let name = format!("{}/x", basic.host);
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::PermissionDenied);
    let e = world.images.pull(&name, auth("u", "wrong-password")).await.unwrap_err();
    assert_eq!(e.kind(), Kind::PermissionDenied);
    assert!(!format!("{e:?}").contains("wrong-password"));
    world.images.pull(&name, auth("u", "p")).await.unwrap();
    assert!(elsewhere.seen.lock().unwrap().iter().all(|s| s.authorization.is_none()));

    let tokens = Fake::start(Arc::new(|seen: &images_support::Seen| match seen.authorization.as_deref() {
        Some("Basic dTpw") if seen.path.contains("scope=repository%3Ax%3Apull") && seen.path.contains("service=s") => {
            Answer::ok(br#"{"token":"T0k"}"#)
        }
        _ => Answer::status(401),
    }))
    .await;
    let realm = tokens.host.clone();
    let bearer = Fake::serving(image, move |seen| match seen.authorization.as_deref() {
        Some("Bearer T0k") => redirect(&seen.path),
        _ => {
            Some(challenge(format!("Bearer realm=\"http://{realm}/token\",service=\"s\",scope=\"repository:x:pull\"")))
        }
    })
    .await;
    let world = World::new().await;
    let name = format!("{}/x", bearer.host);
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::PermissionDenied);
    world.images.pull(&name, auth("u", "p")).await.unwrap();
    assert!(elsewhere.seen.lock().unwrap().iter().all(|s| s.authorization.is_none()));
}

/// A program in the folder of credential helpers.
fn helper(world: &World, name: &str, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(world.path("helpers")).unwrap();
    let path = world.path("helpers").join(format!("docker-credential-{name}"));
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A node with this `auth.json`.
async fn with_auth_file(text: &str) -> World {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("auth.json");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    World::open(dir).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_own_credentials() {
    let challenge = || Answer::Full(401, vec![("WWW-Authenticate".into(), "Basic realm=\"x\"".into())], Vec::new());
    let fake = Fake::serving(simple("mine"), move |seen| match seen.authorization.as_deref() {
        // n:ode-secret, h:elper-secret
        Some("Basic bjpvZGUtc2VjcmV0" | "Basic aDplbHBlci1zZWNyZXQ=") => None,
        _ => Some(challenge()),
    })
    .await;
    let name = format!("{}/x", fake.host);
    let auths = |entry: &str| format!(r#"{{"auths": {{"{}": {entry}}}}}"#, fake.host);
    let world = with_auth_file(&auths(r#"{"auth": "bjpvZGUtc2VjcmV0"}"#)).await;
    world.images.pull(&name, None).await.unwrap();
    // Those of the pull come first, right or wrong.
    let auth = RegistryAuth { username: "u".into(), password: "wrong".into(), ..Default::default() };
    let e = world.images.pull(&format!("{}/y", fake.host), Some(auth)).await.unwrap_err();
    assert_eq!(e.kind(), Kind::PermissionDenied);
    // Another's are not shown to it.
    let world = with_auth_file(r#"{"auths": {"127.0.0.1:1": {"auth": "bjpvZGUtc2VjcmV0"}}}"#).await;
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::PermissionDenied);

    let asks = |program: &str| format!(r#"{{"credHelpers": {{"{}": "{program}"}}}}"#, fake.host);
    let world = with_auth_file(&asks("it")).await;
    let e = world.images.pull(&name, None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::FailedPrecondition);
    assert!(e.chain().contains("credential helper it: no docker-credential-it in"), "{}", e.chain());
    let answer = r#"[ "$1" = get ] && server=$(cat) && echo "{\"ServerURL\":\"$server\",\"Username\":\"h\",\"Secret\":\"elper-secret\"}""#;
    for (script, kind, said) in [
        (answer, None, ""),
        ("echo 'credentials not found in native keychain'; exit 1", Some(Kind::PermissionDenied), "401"),
        ("echo elper-secret; echo elper-secret >&2; exit 3", Some(Kind::FailedPrecondition), "tells why"),
        ("echo elper-secret", Some(Kind::FailedPrecondition), "not its protocol's"),
        ("sleep 60", Some(Kind::DeadlineExceeded), "not done after 2000 ms"),
    ] {
        let world = with_auth_file(&asks("it")).await;
        helper(&world, "it", script);
        match (world.images.pull(&name, None).await, kind) {
            (Ok(_), None) => {}
            (Err(e), Some(kind)) => {
                assert_eq!(e.kind(), kind, "{script}: {}", e.chain());
                assert!(
                    e.chain().contains(said) && !format!("{e:?}").contains("elper-secret"),
                    "{script}: {}",
                    e.chain()
                );
            }
            (got, _) => panic!("{script}: {got:?}"),
        }
    }
}

#[test]
fn what_a_pull_would_ask_is_explained() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().display();
    std::fs::create_dir_all(dir.path().join("certs.d/quay.io")).unwrap();
    let hosts = "server = 'https://quay.io'\n[host.'http://10.0.0.5:5000']\ncapabilities = ['pull']\n\
        [host.'http://10.0.0.5:5000'.header]\nX-Key = 'header-secret'\n";
    std::fs::write(dir.path().join("certs.d/quay.io/hosts.toml"), hosts).unwrap();
    let auth = r#"{"auths": {"quay.io/team": {"auth": "bjpvZGUtc2VjcmV0"}}, "credHelpers": {"docker.io": "pass"}}"#;
    std::fs::write(dir.path().join("auth.json"), auth).unwrap();
    let config = format!("[images]\nconfig_path = [\"{folder}/certs.d\"]\nauth_file = \"{folder}/auth.json\"\n");
    std::fs::write(dir.path().join("config.toml"), config).unwrap();
    let explain = |image: &str| {
        let program = std::env::var_os("LXCRI_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into());
        let mut command = std::process::Command::new(program);
        command.arg("--config").arg(dir.path().join("config.toml")).args(["registry", "explain", image, "--json"]);
        command.output().unwrap()
    };
    let out = explain("quay.io/team/app:1");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("auth.json") && said.contains("chmod 600"), "{said}");
    std::fs::set_permissions(dir.path().join("auth.json"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let told = |image: &str| -> serde_json::Value {
        let out = explain(image);
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && !said.contains("secret") && !said.contains("bjpvZGU"), "{out:?}");
        serde_json::from_str(&said).unwrap()
    };
    let quay = told("quay.io/team/app:1");
    assert_eq!(quay["hosts_file"], format!("{folder}/certs.d/quay.io/hosts.toml"));
    let (mirror, server) = (&quay["hosts"][0], &quay["hosts"][1]);
    assert_eq!((&mirror["url"], &mirror["resolve"]), (&"http://10.0.0.5:5000/v2".into(), &false.into()));
    assert_eq!((&mirror["tls"], &mirror["headers"][0]), (&"none (plain HTTP)".into(), &"X-Key".into()));
    assert_eq!(mirror["credentials"], "none of the node's");
    assert_eq!(server["credentials"], format!("{folder}/auth.json, entry \"quay.io/team\""));
    let hub = told("busybox");
    assert_eq!(
        (&hub["image"], &hub["hosts_file"]),
        (&"docker.io/library/busybox:latest".into(), &serde_json::Value::Null)
    );
    assert_eq!(hub["hosts"][0]["credentials"], "docker-credential-pass, asked for \"docker.io\"");
    assert_eq!(hub["hosts"][0]["tls"], "verified by the system's CAs");
}

#[test]
fn mirrors_come_from_a_registries_conf() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("config.toml"), format!("[images]\nconfig_path = [\"{}\"]\n", path("certs.d"))).unwrap();
    let lxcri = |args: &[&str]| {
        let program = std::env::var_os("LXCRI_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into());
        let out = std::process::Command::new(program)
            .args(["--config", &path("config.toml"), "registry"])
            .args(args)
            .output();
        let out = out.unwrap();
        (out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let conf = "[[registry]]\nlocation = 'quay.io'\n[[registry.mirror]]\nlocation = 'm.example/quay'\n";
    std::fs::write(path("conf"), format!("{conf}[[registry]]\nlocation = 'evil.example'\nblocked = true\n")).unwrap();
    let (code, said) = lxcri(&["import", &path("conf")]);
    assert!(
        code == Some(1) && said.contains("evil.example: blocked") && said.contains("nothing was written"),
        "{said}"
    );
    assert!(!dir.path().join("certs.d").exists());
    let (code, said) = lxcri(&["import", "--partial", &path("conf")]);
    assert!(code == Some(0) && said.contains("certs.d/quay.io/hosts.toml"), "{said}");
    let (code, said) = lxcri(&["explain", "quay.io/team/app:1"]);
    assert!(
        code == Some(0) && said.contains("1. https://m.example/v2/quay") && said.contains("2. https://quay.io/v2"),
        "{said}"
    );
    std::fs::write(path("conf"), conf).unwrap();
    assert!(lxcri(&["import", &path("conf")]).1.contains("is there already"));
    assert_eq!(lxcri(&["import", "--force", &path("conf")]).0, Some(0));
    assert!(
        lxcri(&["import", "--dry-run", "--to", "/elsewhere", &path("conf")])
            .1
            .contains("# /elsewhere/quay.io/hosts.toml")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn overloaded_registries_are_asked_again_and_broken_downloads_go_on() {
    let image = two_layers();
    let blob = image.layers[1].to_string();
    let data = image.blobs[&blob].clone();
    // Busy twice, then the manifest; a layer that breaks twice, and goes on where it broke.
    let busy = std::sync::atomic::AtomicUsize::new(0);
    let (half, more) = (data.len() / 2, data.len() / 2 + 7);
    let (part, whole) = (blob.clone(), data.clone());
    let fake = Fake::serving(image.clone(), move |seen| {
        if seen.path.contains("/manifests/") && busy.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 2 {
            return Some(Answer::Full(429, vec![("Retry-After".into(), "1".into())], Vec::new()));
        }
        let from = seen.range.as_ref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
        match (seen.path.contains(&part), from) {
            (false, _) => None,
            (true, None) => Some(Answer::Truncated(whole.clone(), half)),
            (true, Some(from)) if from < more => Some(Answer::Part(whole.clone(), from, more)),
            (true, Some(from)) => Some(Answer::Part(whole.clone(), from, whole.len())),
        }
    })
    .await;
    let world = World::new().await;
    world.images.pull(&format!("{}/x:1", fake.host), None).await.unwrap();
    assert_eq!((fake.count("/manifests/"), fake.count(&blob)), (3, 3));

    // A wait that is longer than any progress is not begun, and another host is not waited for.
    let wait = |seconds: u64| Answer::Full(503, vec![("Retry-After".into(), seconds.to_string())], Vec::new());
    let later = Fake::start(Arc::new(move |_: &images_support::Seen| wait(3600))).await;
    let world = World::new().await;
    let begun = std::time::Instant::now();
    let e = world.images.pull(&format!("{}/x:1", later.host), None).await.unwrap_err();
    assert_eq!((e.kind(), later.count("/manifests/")), (Kind::Unavailable, 1), "{}", e.chain());
    let mirror = Fake::start(Arc::new(move |_: &images_support::Seen| wait(1))).await;
    world.hosts("r.example", &format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", fake.host, mirror.host));
    world.images.pull("r.example/x:1", None).await.unwrap();
    assert_eq!(mirror.count("/manifests/"), 1);
    assert!(begun.elapsed() < std::time::Duration::from_secs(20));

    // The rest of something else is not taken for the rest of this.
    let (part, whole) = (blob.clone(), data.clone());
    let wrong = Fake::serving(image, move |seen| match (seen.path.contains(&part), &seen.range) {
        (false, _) => None,
        (true, None) => Some(Answer::Truncated(whole.clone(), half)),
        (true, Some(_)) => Some(Answer::Part(whole.clone(), half - 1, whole.len())),
    })
    .await;
    let world = World::new().await;
    let e = world.images.pull(&format!("{}/x:1", wrong.host), None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
    assert!(world.images.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_serve_but_names_stay() {
    let image = two_layers();
    let blob = image.layers[0].to_string();
    // The first mirror has a damaged layer, the second one is asked for it.
    let damaged = blob.clone();
    let first =
        Fake::serving(image.clone(), move |s| s.path.contains(&damaged).then(|| Answer::ok(&gzip(b"not this layer"))))
            .await;
    let second = Fake::serving(image.clone(), |_| None).await;
    let world = World::new().await;
    world.hosts("registry.k8s.io", &format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", second.host, first.host));
    let auth = RegistryAuth { username: "u".into(), password: "p".into(), ..Default::default() };
    let got = world.images.pull("registry.k8s.io/pause:3.9", Some(auth)).await.unwrap();
    assert_eq!(got.repo_tags, ["registry.k8s.io/pause:3.9"]);
    assert!(got.repo_digests[0].starts_with("registry.k8s.io/pause@"));
    assert_eq!(first.count("ns=registry.k8s.io"), first.count("/v2/pause/"));
    assert_eq!((first.count(&blob), second.count(&blob), second.count("/manifests/")), (1, 1, 0));
    assert!(first.seen.lock().unwrap().iter().all(|s| s.authorization.is_none()));

    world.hosts("quay.io", "server = 'x'\nsevrer = 'y'");
    let e = world.images.pull("quay.io/a", None).await.unwrap_err();
    assert!(e.chain().contains("quay.io/hosts.toml") && e.chain().contains("sevrer"), "{}", e.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_unless_told_otherwise() {
    let (registry, ca) = Registry::start_tls();
    registry.push(&simple("tls"), "x:1");
    let name = format!("{}/x:1", registry.host);
    let world = World::new().await;
    let e = world.images.pull(&name, None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
    assert!(e.chain().contains("certificate"), "{}", e.chain());
    // A name for the same host that is not this machine by its looks: nothing but TLS is tried.
    world.hosts("r.example", &format!("server = 'https://{}'\nca = '{}'", registry.host, ca.display()));
    world.images.pull("r.example/x:1", None).await.unwrap();
    let world = World::new().await;
    world.hosts(&registry.host, "skip_verify = true");
    world.images.pull(&name, None).await.unwrap();
    world.hosts("other.example", &format!("server = 'https://{}'\nca = 'missing.pem'", registry.host));
    let e = world.images.pull("other.example/x:1", None).await.unwrap_err();
    assert!(e.chain().contains("missing.pem"), "{}", e.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_removed() {
    let world = World::new().await;
    let dir = world.dir.path().to_path_buf();
    for folder in ["overlay/tmp/half/fs/etc", "overlay/trash/old/fs", "images/tmp/x"] {
        std::fs::create_dir_all(dir.join(folder)).unwrap();
    }
    std::fs::write(dir.join("images/images/.tmp-1-2-x.json"), "half").unwrap();
    std::fs::create_dir_all(dir.join("overlay/layers").join("a".repeat(64)).join("fs")).unwrap();
    let world = world.restart().await;
    world.tasks.shutdown().await;
    for (folder, count) in [
        ("overlay/tmp", 0),
        ("overlay/trash", 0),
        ("overlay/layers", 0),
        ("overlay/quarantine", 1),
        ("images/images", 0),
    ] {
        assert_eq!(std::fs::read_dir(dir.join(folder)).unwrap().count(), count, "{folder}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_layouts_and_archives() {
    let world = World::new().await;
    let (one, two) = (simple("one"), two_layers_as(false));
    let folder = world.path("layout");
    write_layout(&folder, &[(one.clone(), Some("example.com/one:1")), (two.clone(), Some("two"))]);
    let utf8 = |p: std::path::PathBuf| camino::Utf8PathBuf::from_path_buf(p).unwrap();
    let layout = |name: Option<&str>| ImageSource::OciLayout(utf8(folder.clone()), name.map(str::to_owned));
    let got = world.images.load(&layout(None), None).await.unwrap();
    assert_eq!(
        got.iter().map(|i| i.repo_tags[0].as_str()).collect::<Vec<_>>(),
        ["example.com/one:1", "docker.io/library/two:latest"]
    );
    let got = world.images.load(&layout(Some("two")), Some("example.com/new:2")).await.unwrap();
    assert_eq!((got.len(), got[0].repo_tags.len()), (1, 2));
    assert!(world.images.load(&layout(None), Some("a/b")).await.is_err());
    assert_eq!(world.images.load(&layout(Some("three")), None).await.unwrap_err().kind(), Kind::NotFound);

    let from = format!("oci:{}:two", folder.display());
    for (kind, file) in [("oci-archive", "a.tar"), ("docker-archive", "d.tar")] {
        let path = world.path(file);
        let target = format!("{kind}:{}:example.com/{kind}:9", path.display());
        run("/usr/bin/skopeo", &["--insecure-policy", "copy", "--quiet", &from, &target]);
        for compressed in [false, true] {
            let world = World::new().await;
            let file = if compressed {
                std::fs::write(world.path("c"), gzip(&std::fs::read(&path).unwrap())).unwrap();
                world.path("c")
            } else {
                path.clone()
            };
            let source = match kind {
                "oci-archive" => ImageSource::OciArchive(utf8(file)),
                _ => ImageSource::DockerArchive(utf8(file)),
            };
            let got = world.images.load(&source, None).await.unwrap();
            assert_eq!(got[0].repo_tags, [format!("example.com/{kind}:9")]);
            assert_eq!(got[0].chains.len(), 2);
            assert_eq!(world.counts(), (2, 0, 0));
        }
    }
    // Hostile or broken archives.
    std::fs::write(world.path("bad"), b"not a tar").unwrap();
    let e = world.images.load(&ImageSource::DockerArchive(utf8(world.path("bad"))), None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::InvalidArgument, "{}", e.chain());
    let manifest = br#"[{"Config":"../../etc/passwd","RepoTags":null,"Layers":[]}]"#;
    std::fs::write(world.path("bad"), layer(&[Item::file("manifest.json", manifest)])).unwrap();
    let e = world.images.load(&ImageSource::DockerArchive(utf8(world.path("bad"))), None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::NotFound, "{}", e.chain());
    std::fs::write(folder.join("blobs/sha256").join(one.layers[0].hex()), b"damaged").unwrap();
    let fresh = World::new().await;
    let e = fresh.images.load(&layout(Some("example.com/one:1")), None).await.unwrap_err();
    assert!(e.chain().contains(one.layers[0].as_str()), "{}", e.chain());
    assert_eq!(fresh.counts(), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_layers_mount_in_both_ways() {
    for legacy in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let root = camino::Utf8PathBuf::from_path_buf(dir.path().join("o")).unwrap();
        let tasks = TaskSet::new("many-layers");
        let options = OverlayOptions { legacy_mount: legacy, ..Default::default() };
        let store = OverlayStore::open(root.clone(), options.clone(), tasks.clone()).unwrap();
        assert!(OverlayStore::open(root.clone(), options, tasks.clone()).is_err(), "one store per folder");
        let mut chains: Vec<proxmox_lxcri::core::ids::Digest> = Vec::new();
        for n in 0..130 {
            let tar = layer(&[Item::file(&format!("f{n}"), b"x"), Item::file("last", n.to_string().as_bytes())]);
            let chain = digest_of(format!("{n}").as_bytes());
            let data = Box::new(std::io::Cursor::new(tar));
            store.apply(chains.last(), &chain, data, Box::new(|| Ok(()))).await.unwrap();
            chains.push(chain);
        }
        let id = ContainerId::new();
        store.create_rootfs(&id, &chains, &RootfsOptions::default()).await.unwrap();
        for _ in 0..2 {
            let mount = Root::from_fd(store.mount_rootfs(&id).await.unwrap());
            assert_eq!(mount.read_file("last", 10).unwrap(), b"129");
            assert_eq!(mount.read_file("f0", 10).unwrap(), b"x");
        }
        // For a pod with a user namespace: each layer is idmapped, the container's own folder has the ids of outside.
        store.try_idmap().await.unwrap();
        let map = |host_id| vec![IdMapping { host_id, container_id: 0, length: 1000 }];
        let options = RootfsOptions { uid_map: map(300_000), gid_map: map(400_000), ..Default::default() };
        let mapped = ContainerId::new();
        store.create_rootfs(&mapped, &chains, &options).await.unwrap();
        store.create_rootfs(&mapped, &chains, &options).await.unwrap();
        let e = store.create_rootfs(&mapped, &chains, &RootfsOptions::default()).await.unwrap_err();
        assert_eq!(e.kind(), Kind::AlreadyExists, "{}", e.chain());
        for _ in 0..2 {
            let mount = Root::from_fd(store.mount_rootfs(&mapped).await.unwrap());
            for name in ["last", "f0", "."] {
                let file = mount.open_at(name, OFlags::RDONLY, Mode::empty()).unwrap();
                let seen = rustix::fs::fstat(&file).unwrap();
                assert_eq!((seen.st_uid, seen.st_gid), (300_000, 400_000), "{name}");
            }
            assert_eq!(mount.read_file("last", 10).unwrap(), b"129");
        }
        assert!(!std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(root.as_str()));
        assert_eq!(std::fs::read_dir(dir.path().join("o/tmp")).unwrap().count(), 0);
        let half = RootfsOptions { uid_map: map(300_000), ..Default::default() };
        let e = store.create_rootfs(&ContainerId::new(), &chains, &half).await.unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument, "{}", e.chain());
        let quota = RootfsOptions { quota: 1, ..Default::default() };
        let e = store.create_rootfs(&ContainerId::new(), &chains, &quota).await.unwrap_err();
        assert_eq!(e.kind(), Kind::Unimplemented);
        tasks.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    // Mounted in a namespace of a thread of its own, so that nothing is left whatever happens.
    let done = std::thread::spawn(move || {
        // SAFETY: the thread ends with this test and shares nothing that depends on its mounts.
        #[allow(unsafe_code)]
        unsafe {
            rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS | rustix::thread::UnshareFlags::FS)
        }
        .unwrap();
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount("tmpfs", &small, "tmpfs", MountFlags::empty(), Some(c"size=1m")).unwrap();
        // The runtime's threads are born here, in this namespace.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let root = camino::Utf8PathBuf::from_path_buf(small.join("o")).unwrap();
            let store = OverlayStore::open(root.clone(), OverlayOptions::default(), TaskSet::new("full")).unwrap();
            let tar = layer(&[Item::file("big", &vec![1; 3 << 20])]);
            let chain = digest_of(b"x");
            let e =
                store.apply(None, &chain, Box::new(std::io::Cursor::new(tar)), Box::new(|| Ok(()))).await.unwrap_err();
            assert_eq!(e.kind(), Kind::ResourceExhausted, "{}", e.chain());
            assert_eq!(std::fs::read_dir(root.join("tmp")).unwrap().count(), 0);
            assert_eq!(std::fs::read_dir(root.join("layers")).unwrap().count(), 0);
        });
    });
    done.join().unwrap();
}
