//! Registries as they are out there: Debian's docker-registry with TLS, passwords, tokens and client certificates, on IPv6, behind
//! proxies and sockets, mirrors that are down, hosts that redirect, and what of an image has to come through them.
//!
//! Run by `make test-images`. What registries do wrong on purpose is `images`, what images do `hostile_images`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use images_support::{Answer, Built, Fake, Item, Registry, Seen, World, build, gzip, layer, run, tls, write_layout};
use proxmox_lxcri::core::error::Kind;
use proxmox_lxcri::core::ids::ContainerId;
use proxmox_lxcri::core::ports::{ImageSource, ImageStore, RegistryAuth, RootfsOptions};
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::utils::beneath::Root;
use proxmox_lxcri::utils::tasks::TaskSet;
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn simple(content: &str) -> Built {
    build(&[layer(&[Item::dir("etc"), Item::file("etc/name", content.as_bytes())])], "amd64", false)
}

fn auth(username: &str, password: &str) -> Option<RegistryAuth> {
    Some(RegistryAuth { username: username.into(), password: password.into(), ..Default::default() })
}

fn private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// A file of the image as a container sees it.
async fn rooted(world: &World, chains: &[proxmox_lxcri::core::ids::Digest], look: impl FnOnce(&Root)) {
    let id = ContainerId::new();
    world.layers.create_rootfs(&id, chains, &RootfsOptions::default()).await.unwrap();
    look(&Root::from_fd(world.layers.mount_rootfs(&id).await.unwrap()));
    world.layers.remove_rootfs(&id).await.unwrap();
}

// ------------------------------------------------------------------------------------------ who may pull

/// "u:p" for htpasswd (bcrypt, 4 rounds).
const HTPASSWD: &str = "u:$2y$04$BU.9qiUB5FGhwj3P7LDjgud7/NMsN5Ov8Zbo/42tCieInQD8xD2LO\n";

#[tokio::test(flavor = "multi_thread")]
async fn passwords_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, http) = tls(dir.path(), "");
    let passwords = dir.path().join("htpasswd");
    private(&passwords, HTPASSWD);
    let auth_of = format!("auth: {{htpasswd: {{realm: tests, path: {}}}}}\n", passwords.display());
    let registry = Registry::start_at(dir, "127.0.0.1", &http, &auth_of);
    registry.push_with(&simple("mine"), "team/app:1", &["--dest-creds=u:p"]);
    let world = World::new().await;
    world.hosts(&registry.host, &format!("ca = '{}'", ca.display()));
    let name = format!("{}/team/app:1", registry.host);
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::PermissionDenied);
    assert_eq!(world.images.pull(&name, auth("u", "wrong")).await.unwrap_err().kind(), Kind::PermissionDenied);
    world.images.pull(&name, auth("u", "p")).await.unwrap();
    world.images.remove(&name).await.unwrap();
    // As the kubelet gives a pull secret's `auth`, for a server in Docker's spelling.
    let encoded = RegistryAuth {
        auth: BASE64_STANDARD.encode("u:p"),
        server_address: format!("https://{}/v1/", registry.host),
        ..Default::default()
    };
    world.images.pull(&name, Some(encoded)).await.unwrap();
}

/// A token server as docker-registry's specification has it: tokens are JWTs that its certificate vouches for.
struct TokenServer {
    fake: Fake,
    given: Arc<AtomicUsize>,
}

impl TokenServer {
    async fn start(folder: &Path) -> Self {
        let pem = std::fs::read_to_string(folder.join("key.pem")).unwrap();
        let der = |pem: &str| {
            let body: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
            BASE64_STANDARD.decode(body).unwrap()
        };
        let (key, chain) =
            (der(&pem), BASE64_STANDARD.encode(der(&std::fs::read_to_string(folder.join("ca.pem")).unwrap())));
        let random = ring::rand::SystemRandom::new();
        let algorithm = &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let pair = ring::signature::EcdsaKeyPair::from_pkcs8(algorithm, &key, &random).unwrap();
        let given = Arc::new(AtomicUsize::new(0));
        let count = given.clone();
        let fake = Fake::start(Arc::new(move |seen: &Seen| {
            if seen.authorization.as_deref() != Some("Basic dTpw") {
                return Answer::status(401);
            }
            count.fetch_add(1, Ordering::SeqCst);
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
            let header = serde_json::json!({"typ": "JWT", "alg": "ES256", "x5c": [chain]});
            let scope = seen.path.split("scope=").nth(1).and_then(|s| s.split('&').next()).unwrap_or("");
            let parts: Vec<&str> = scope.split("%3A").collect();
            let actions: Vec<&str> = parts.last().unwrap_or(&"").split("%2C").collect();
            let name = parts.get(1).map(|n| n.replace("%2F", "/")).unwrap_or_default();
            let access = serde_json::json!([{"type": "repository", "name": name, "actions": actions}]);
            let claims = serde_json::json!({"iss": "tests", "sub": "u", "aud": "registry", "exp": now + 300, "nbf": now - 5,
                "iat": now, "jti": "1", "access": access});
            let part = |v: &serde_json::Value| BASE64_URL_SAFE_NO_PAD.encode(v.to_string());
            let text = format!("{}.{}", part(&header), part(&claims));
            let signature = pair.sign(&random, text.as_bytes()).unwrap();
            let token = format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature));
            Answer::ok(serde_json::json!({"token": token, "expires_in": 300}).to_string().as_bytes())
        }))
        .await;
        Self { fake, given }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_a_real_registry_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, _) = tls(dir.path(), "");
    let tokens = TokenServer::start(dir.path()).await;
    let auth_of = format!(
        "auth: {{token: {{realm: 'http://{}/token', service: registry, issuer: tests, rootcertbundle: {}}}}}\n",
        tokens.fake.host,
        ca.display()
    );
    let registry = Registry::start_at(dir, "127.0.0.1", "", &auth_of);
    let image = simple("token");
    tokio::task::block_in_place(|| registry.push_with(&image, "team/app:1", &["--dest-creds=u:p"]));
    let pushing = tokens.given.load(Ordering::SeqCst);
    let world = World::new().await;
    let name = format!("{}/team/app:1", registry.host);
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::PermissionDenied);
    assert_eq!(world.images.pull(&name, auth("u", "no")).await.unwrap_err().kind(), Kind::PermissionDenied);
    for _ in 0..3 {
        world.images.pull(&name, auth("u", "p")).await.unwrap();
        world.images.remove(&name).await.unwrap();
    }
    assert_eq!(tokens.given.load(Ordering::SeqCst) - pushing, 1, "one token for three pulls");
    // Another repository is another scope; nobody else's credentials get the token that is kept.
    let other = format!("{}/team/other:1", registry.host);
    assert_eq!(world.images.pull(&other, auth("u", "p")).await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(tokens.given.load(Ordering::SeqCst) - pushing, 2);
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_taken_back_is_asked_for_anew() {
    let good = Arc::new(Mutex::new("one".to_owned()));
    let now = good.clone();
    let tokens = Fake::start(Arc::new(move |_: &Seen| {
        Answer::ok(format!(r#"{{"access_token":"{}","expires_in":3000}}"#, now.lock().unwrap()).as_bytes())
    }))
    .await;
    let (realm, now) = (tokens.host.clone(), good.clone());
    let fake = Fake::serving(simple("x"), move |seen| {
        let wanted = format!("Bearer {}", now.lock().unwrap());
        let challenge = format!("Bearer realm=\"http://{realm}/token\",service=\"s\"");
        (seen.authorization.as_deref() != Some(wanted.as_str()))
            .then(|| Answer::Full(401, vec![("WWW-Authenticate".into(), challenge)], Vec::new()))
    })
    .await;
    let world = World::new().await;
    let pull = |tag: &str| {
        let name = format!("{}/x:{tag}", fake.host);
        let images = world.images.clone();
        async move { images.pull(&name, None).await }
    };
    pull("1").await.unwrap();
    pull("2").await.unwrap();
    assert_eq!(tokens.count("/token"), 1);
    *good.lock().unwrap() = "two".into();
    pull("3").await.unwrap();
    assert_eq!(tokens.count("/token"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let text = |args: &str| args.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let openssl = |args: Vec<String>| run("/usr/bin/openssl", &args.iter().map(String::as_str).collect::<Vec<_>>());
    openssl(text(&format!(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=people -keyout {} -out {}",
        path("people-key.pem"),
        path("people.pem")
    )));
    openssl(text(&format!(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=node -keyout {} -out {}",
        path("node-key.pem"),
        path("node.csr")
    )));
    std::fs::write(path("ext"), "extendedKeyUsage=clientAuth\nbasicConstraints=CA:FALSE\n").unwrap();
    openssl(text(&format!(
        "x509 -req -in {} -CA {} -CAkey {} -CAcreateserial -days 2 -extfile {} -out {}",
        path("node.csr"),
        path("people.pem"),
        path("people-key.pem"),
        path("ext"),
        path("node.pem")
    )));
    let (people, node, key) = (path("people.pem"), path("node.pem"), path("node-key.pem"));
    let (ca, http) = tls(dir.path(), &format!(", clientcas: [{people}]"));
    let certs = tempfile::tempdir().unwrap();
    for (file, name) in [(&ca, "ca.crt"), (&node.clone().into(), "client.cert"), (&key.clone().into(), "client.key")] {
        std::fs::copy(file, certs.path().join(name)).unwrap();
    }
    let registry = Registry::start_at(dir, "127.0.0.1", &http, "");
    registry.push_with(&simple("x"), "x:1", &["--dest-cert-dir", certs.path().to_str().unwrap()]);
    let world = World::new().await;
    let name = format!("{}/x:1", registry.host);
    world.hosts(&registry.host, &format!("ca = '{}'", ca.display()));
    assert_eq!(world.images.pull(&name, None).await.unwrap_err().kind(), Kind::Unavailable);
    world.hosts(&registry.host, &format!("ca = '{}'\nclient = [['{node}', '{key}']]", ca.display()));
    world.images.pull(&name, None).await.unwrap();
    world.hosts(&registry.host, &format!("ca = '{}'\nclient = [['{node}', '{}']]", ca.display(), people));
    let e = world.images.pull(&format!("{}/x:2", registry.host), None).await.unwrap_err();
    assert!(e.kind() == Kind::FailedPrecondition && e.chain().contains("client certificate"), "{}", e.chain());
}

// ------------------------------------------------------------------------------------------ how hosts are reached

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_on_ipv6() {
    let registry = Registry::start_at(tempfile::tempdir().unwrap(), "[::1]", "", "");
    let four = Registry::start();
    four.push(&simple("six"), "x:1");
    let world = World::new().await;
    let name = format!("{}/x:1", registry.host);
    // Skopeo knows no such addresses.
    let pushed = world.images.push(&format!("{}/x:1", four.host), &name).await.unwrap();
    assert_eq!((pushed.name.as_str(), pushed.sent.0, pushed.there), (name.as_str(), 2, 0));
    let image = world.images.pull(&name, None).await.unwrap();
    assert_eq!(image.repo_tags, std::slice::from_ref(&name));
    assert_eq!(world.images.resolve(&image.repo_digests[0]).unwrap().id, image.id);
}

/// An HTTP proxy and a socket that lead to `to`, whatever is asked for; what was asked.
async fn proxy(to: String, socket: &Path, tasks: &TaskSet) -> (String, Arc<Mutex<Vec<String>>>) {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (log, host, all) = (asked.clone(), to.clone(), tasks.clone());
    tasks.spawn_cancellable("proxy", async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (log, host) = (log.clone(), host.clone());
            all.spawn_cancellable("proxied", async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await.unwrap());
                }
                let text = String::from_utf8(head.clone()).unwrap();
                log.lock().unwrap().push(text.lines().next().unwrap().to_owned());
                let mut server = tokio::net::TcpStream::connect(host).await.unwrap();
                if text.starts_with("CONNECT ") {
                    client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                } else {
                    server.write_all(&head).await.unwrap();
                }
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let listener = tokio::net::UnixListener::bind(socket).unwrap();
    let (log, all) = (asked.clone(), tasks.clone());
    tasks.spawn_cancellable("socket", async move {
        while let Ok((mut client, _)) = listener.accept().await {
            log.lock().unwrap().push("socket".into());
            let mut server = tokio::net::TcpStream::connect(&to).await.unwrap();
            all.spawn_cancellable("proxied", async move {
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    (address, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_have_proxies_and_sockets_of_their_own() {
    let (registry, ca) = Registry::start_tls();
    registry.push(&simple("x"), "x:1");
    let (dir, tasks) = (tempfile::tempdir().unwrap(), TaskSet::new("proxies"));
    let socket = dir.path().join("proxy.sock");
    let (address, asked) = proxy(registry.host.clone(), &socket, &tasks).await;
    let port = registry.host.split(':').next_back().unwrap();
    let way = format!("http://{address}");
    let unix = format!("unix:{}", socket.display());
    let world = World::reaching(&[("127.0.0.1", &way), ("far.example", &unix), ("*.nowhere.example", &way)]).await;
    // https: the proxy is asked to connect.
    world.hosts(&registry.host, &format!("server = 'https://{}'\nca = '{}'", registry.host, ca.display()));
    world.images.pull(&format!("{}/x:1", registry.host), None).await.unwrap();
    assert!(!asked.lock().unwrap().is_empty());
    assert!(asked.lock().unwrap().iter().all(|l| l == &format!("CONNECT 127.0.0.1:{port} HTTP/1.1")), "{asked:?}");
    // A host that no name server knows, over a socket: its certificate is looked at all the same.
    asked.lock().unwrap().clear();
    world.hosts("far.example", &format!("server = 'https://far.example'\nca = '{}'", ca.display()));
    let e = world.images.pull("far.example/x:1", None).await.unwrap_err();
    assert!(e.kind() == Kind::Unavailable && e.chain().contains("certificate"), "{}", e.chain());
    world.hosts("far.example", "server = 'https://far.example'\nskip_verify = true");
    world.images.pull("far.example/x:1", None).await.unwrap();
    assert!(asked.lock().unwrap().iter().all(|l| l == "socket"), "{asked:?}");

    // http: the proxy is given the request. What is said to be direct is.
    let plain = Fake::serving(simple("plain"), |_| None).await;
    let socket = dir.path().join("other.sock");
    let (address, asked) = proxy(plain.host.clone(), &socket, &tasks).await;
    let way = format!("http://{address}");
    let world = World::reaching(&[("*.nowhere.example", &way), (&plain.host, "direct")]).await;
    world.hosts("a.nowhere.example", "server = 'http://a.nowhere.example'");
    world.images.pull("a.nowhere.example/x:1", None).await.unwrap();
    let first = asked.lock().unwrap().first().cloned().unwrap();
    assert!(first.starts_with("GET http://a.nowhere.example/v2/x/manifests/1"), "{first}");
    asked.lock().unwrap().clear();
    world.images.pull(&format!("{}/y:1", plain.host), None).await.unwrap();
    assert!(asked.lock().unwrap().is_empty());
    // A proxy that is down is told, and not gone around.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let world = World::reaching(&[("*", &format!("http://{closed}"))]).await;
    let e = world.images.pull(&format!("{}/x:1", plain.host), None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Unavailable, "{}", e.chain());
    tasks.token().cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_that_are_down_or_may_not_be_asked() {
    let image = simple("x");
    let registry = Registry::start();
    registry.push(&image, "x:1");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let silent = Fake::start(Arc::new(|_: &Seen| Answer::Silent)).await;
    let content = Fake::serving(image.clone(), |_| None).await;
    let world = World::new().await;
    let hosts = |mirrors: &str| {
        world.hosts("r.example", &format!("server = 'http://{}'\n{mirrors}", registry.host));
    };
    // One that is down, one that says nothing: the next one is asked.
    hosts(&format!("[host.'http://{closed}']\n[host.'http://{}']\n", silent.host));
    world.images.pull("r.example/x:1", None).await.unwrap();
    world.images.remove("r.example/x:1").await.unwrap();
    // A mirror for content alone is never asked what a tag means; its headers and path are as configured.
    hosts(&format!(
        "[host.'http://{0}/base']\ncapabilities = ['pull']\noverride_path = true\n[host.'http://{0}/base'.header]\nX-Key = 'secret'\n",
        content.host
    ));
    world.images.pull("r.example/x:1", None).await.unwrap();
    let seen = content.seen.lock().unwrap().clone();
    assert!(!seen.is_empty() && seen.iter().all(|s| s.path.starts_with("/base/x/blobs/")), "{seen:?}");
    assert!(seen.iter().all(|s| s.header("x-key").as_deref() == Some("secret")), "{seen:?}");
    world.images.remove("r.example/x:1").await.unwrap();
    // Nobody may be asked.
    world.hosts("r.example", &format!("server = 'http://{}'\ncapabilities = ['push']", registry.host));
    let e = world.images.pull("r.example/x:1", None).await.unwrap_err();
    assert!(
        e.kind() == Kind::FailedPrecondition && e.chain().contains("no host of registry r.example"),
        "{}",
        e.chain()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_keep_secrets_at_home() {
    let image = simple("x");
    let blob = image.layers[0].to_string();
    let elsewhere = Fake::serving(image.clone(), |_| None).await;
    let moved = |to: String| Answer::Full(307, vec![("Location".into(), to)], Vec::new());
    let (host, part) = (elsewhere.host.clone(), blob.clone());
    // Blobs are elsewhere, under a URL that is a secret itself; within the host a relative redirect keeps who we are.
    let home = Fake::serving(image.clone(), move |seen| {
        if seen.authorization.as_deref() != Some("Basic dTpw") {
            return Some(Answer::Full(401, vec![("WWW-Authenticate".into(), "Basic realm=x".into())], Vec::new()));
        }
        match () {
            () if seen.path.ends_with("/manifests/1") => Some(moved("/v2/x/manifests/moved".into())),
            () if seen.path.contains(&part) => Some(moved(format!("http://{host}/{part}?Signature=hunter2"))),
            () => None,
        }
    })
    .await;
    let world = World::new().await;
    let name = format!("{}/x:1", home.host);
    world.hosts(&home.host, "[header]\nX-Key = 'hunter2'");
    world.images.pull(&name, auth("u", "p")).await.unwrap();
    let there = elsewhere.seen.lock().unwrap().clone();
    assert!(there.len() == 1 && there[0].authorization.is_none() && there[0].header("x-key").is_none(), "{there:?}");
    world.images.remove(&name).await.unwrap();

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (to, words) in [
        (format!("http://{closed}/b?Signature=hunter2"), "connection failed"),
        ("http://far.example/b?Signature=hunter2".into(), ""),
        ("file:///etc/passwd".into(), "a redirect from http to file"),
        ("//".into(), "redirect"),
        (format!("/v2/x/blobs/{blob}"), "more than 5 redirects"),
    ] {
        let (part, shown) = (blob.clone(), to.clone());
        let home = Fake::serving(image.clone(), move |s| s.path.contains(&part).then(|| moved(to.clone()))).await;
        let world = World::new().await;
        let e = world.images.pull(&format!("{}/x:1", home.host), None).await.unwrap_err();
        assert!(e.chain().contains(words) && !format!("{e:?}").contains("hunter2"), "{shown}: {}", e.chain());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn overloaded_ones_name_a_date_or_nothing() {
    for (status, wait) in [(503, Some("date")), (429, None), (502, None), (504, Some("0"))] {
        let busy = AtomicUsize::new(0);
        let fake = Fake::serving(simple("x"), move |seen| {
            let first = seen.path.contains("/manifests/") && busy.fetch_add(1, Ordering::SeqCst) == 0;
            first.then(|| {
                let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
                let value = wait.map(|w| if w == "date" { httpdate::fmt_http_date(soon) } else { w.to_owned() });
                let headers = value.map(|v| ("Retry-After".to_owned(), v)).into_iter().collect();
                Answer::Full(status, headers, Vec::new())
            })
        })
        .await;
        let world = World::new().await;
        world.images.pull(&format!("{}/x:1", fake.host), None).await.unwrap();
        assert_eq!(fake.count("/manifests/"), 2, "{status}");
    }
}

// ------------------------------------------------------------------------------------------ what comes through

/// Layers as `how` makes them of these archives: blob and media type.
fn image_of(layers: &[Vec<u8>], docker: bool, how: impl Fn(&[u8]) -> (Vec<u8>, &'static str)) -> Built {
    let mut image = build(layers, "amd64", false);
    for old in &image.layers {
        image.blobs.remove(old.as_str());
    }
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest).unwrap();
    image.layers.clear();
    for (n, tar) in layers.iter().enumerate() {
        let (blob, kind) = how(tar);
        let digest = digest_of(&blob);
        manifest["layers"][n] = serde_json::json!({"mediaType": kind, "digest": digest, "size": blob.len()});
        image.blobs.insert(digest.to_string(), blob);
        image.layers.push(digest);
    }
    if docker {
        manifest["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json".into();
        manifest["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json".into();
    }
    image.manifest = manifest.to_string().into_bytes();
    image
}

/// zstd:chunked is zstd in frames, with what it knows of them in a frame that other readers skip.
fn chunked(tar: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = tar.chunks(700).flat_map(|piece| zstd::encode_all(piece, 3).unwrap()).collect();
    out.extend([0x50, 0x2a, 0x4d, 0x18, 20, 0, 0, 0]);
    out.extend(b"a table of contents.");
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_of_every_kind() {
    let base = layer(&[Item::dir("etc"), Item::file("etc/name", b"base"), Item::file("etc/gone", b"x")]);
    let nothing = layer(&[]);
    let top = layer(&[Item::file("etc/.wh.gone", b""), Item::file("etc/top", b"top")]);
    let layers = [base, nothing, Vec::new(), top];
    type How = fn(&[u8]) -> (Vec<u8>, &'static str);
    let kinds: [(&str, bool, How); 6] = [
        ("plain", false, |t| (t.to_vec(), "application/vnd.oci.image.layer.v1.tar")),
        ("gzip", false, |t| (gzip(t), "application/vnd.oci.image.layer.v1.tar+gzip")),
        ("zstd", false, |t| (zstd::encode_all(t, 19).unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")),
        ("zstd:chunked", false, |t| (chunked(t), "application/vnd.oci.image.layer.v1.tar+zstd")),
        ("docker's gzip", true, |t| (gzip(t), "application/vnd.docker.image.rootfs.diff.tar.gzip")),
        ("docker's plain", true, |t| (t.to_vec(), "application/vnd.docker.image.rootfs.diff.tar")),
    ];
    for (name, docker, how) in kinds {
        let image = image_of(&layers, docker, how);
        let fake = Fake::serving(image.clone(), |_| None).await;
        let world = World::new().await;
        let got = world.images.pull(&format!("{}/x:1", fake.host), None).await;
        let got = got.unwrap_or_else(|e| panic!("{name}: {}", e.chain()));
        assert_eq!((got.chains.len(), &got.id), (4, &image.config), "{name}");
        rooted(&world, &got.chains, |root| {
            assert_eq!(root.read_file("etc/name", 10).unwrap(), b"base", "{name}");
            assert_eq!(root.read_file("etc/top", 10).unwrap(), b"top", "{name}");
            assert!(root.read_file("etc/gone", 10).is_err(), "{name}");
        })
        .await;
    }
    // From a real registry, as skopeo makes Docker's own kind of them.
    let registry = Registry::start();
    registry.push_with(&simple("v2s2"), "x:1", &["--format", "v2s2"]);
    let world = World::new().await;
    world.images.pull(&format!("{}/x:1", registry.host), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_the_variant_that_this_machine_runs() {
    let other = build(&[layer(&[Item::file("other", b"x")])], "s390x", false);
    let mine = simple("mine");
    let attestation = br#"{"schemaVersion":2,"artifactType":"application/x"}"#.to_vec();
    let entry = |bytes: &[u8], architecture: &str, variant: &str| {
        serde_json::json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest_of(bytes), "size": bytes.len(),
            "platform": {"os": "linux", "architecture": architecture, "variant": variant}})
    };
    let mut about = entry(&attestation, "unknown", "");
    about["annotations"] = serde_json::json!({"vnd.docker.reference.type": "attestation-manifest"});
    let entries = [
        entry(&other.manifest, "s390x", ""),
        entry(&attestation, "amd64", "v9"),
        about,
        entry(&mine.manifest, "amd64", ""),
    ];
    for kind in ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"]
    {
        let index =
            serde_json::json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).to_string().into_bytes();
        let (top, digest) = (index.clone(), mine.digest().to_string());
        let fake = Fake::serving(mine.clone(), move |seen| {
            (seen.path.contains("/manifests/") && !seen.path.contains(&digest)).then(|| Answer::ok(&top))
        })
        .await;
        let world = World::new().await;
        let got = world.images.pull(&format!("{}/x:1", fake.host), None).await.unwrap();
        assert_eq!(got.id, mine.config);
        // The index's digest is the image's, by which it is found and needs no registry any more.
        let name = format!("{}/x@{}", fake.host, digest_of(&index));
        assert_eq!(got.repo_digests, std::slice::from_ref(&name));
        let asked = fake.count("");
        world.images.pull(&name, None).await.unwrap();
        assert_eq!(fake.count(""), asked);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_an_image() {
    let registry = Registry::start();
    let image = simple("x");
    for name in ["a:1", "a:2", "b/c:latest"] {
        registry.push(&image, name);
    }
    let world = World::new().await;
    let at = |name: &str| format!("{}/{name}", registry.host);
    let id = world.images.pull(&at("a:1"), None).await.unwrap().id.clone();
    let before: Vec<_> =
        std::fs::read_dir(world.path("overlay/layers")).unwrap().map(|e| e.unwrap().file_name()).collect();
    for name in ["a:2", "b/c"] {
        assert_eq!(world.images.pull(&at(name), None).await.unwrap().id, id);
    }
    // A tag beside a digest is decoration, also one that never was.
    let digest = image.digest();
    let decorated = world.images.pull(&at(&format!("a:no-such-tag@{digest}")), None).await.unwrap();
    assert_eq!(decorated.repo_tags, [at("a:1"), at("a:2"), at("b/c:latest")]);
    assert_eq!(decorated.repo_digests.len(), 2, "{:?}", decorated.repo_digests);
    assert!(world.images.resolve(&at("a:no-such-tag")).is_none());
    // Retagged here, it is the same image with the same layers; the name goes with another image.
    world.images.tag(&id, "mine.example/app:1").await.unwrap();
    registry.push(&simple("other"), "a:2");
    let other = world.images.pull(&at("a:2"), None).await.unwrap();
    assert_ne!(other.id, id);
    let still = world.images.resolve("mine.example/app:1").unwrap();
    assert_eq!((&still.id, &still.repo_tags), (&id, &vec![at("a:1"), at("b/c:latest"), "mine.example/app:1".into()]));
    let after: Vec<_> =
        std::fs::read_dir(world.path("overlay/layers")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(before.iter().all(|l| after.contains(l)));
    // Pinned it is until somebody ends that, also by another name and after a restart; the store's owner may remove it.
    world.images.set_pinned(&id, true).await.unwrap();
    let world = world.restart().await;
    assert!(world.images.pull(&at("a:1"), None).await.unwrap().pinned);
    // One name is removed, all are gone; the other image stays.
    world.images.remove("mine.example/app:1").await.unwrap();
    for name in [at("a:1"), at("b/c:latest"), at(&format!("a@{digest}")), id.to_string(), "mine.example/app:1".into()] {
        assert!(world.images.resolve(&name).is_none(), "{name}");
    }
    assert_eq!(world.images.list().len(), 1);
    world.images.remove("mine.example/app:1").await.unwrap();
}

/// What file systems keep, through a registry and into a container's root.
#[tokio::test(flavor = "multi_thread")]
async fn everything_of_a_file_arrives() {
    let tree = tempfile::tempdir().unwrap();
    let at = |name: &str| tree.path().join(name);
    let long = format!("{}/{}", "d".repeat(200), "f".repeat(250));
    std::fs::create_dir(at(&"d".repeat(200))).unwrap();
    std::fs::write(at(&long), b"long").unwrap();
    let sparse = std::fs::File::create(at("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"end", 30_000_000).unwrap();
    std::fs::write(at("ping"), b"#!").unwrap();
    let capability = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".as_slice();
    std::os::unix::fs::chown(at("ping"), Some(3), Some(4)).unwrap();
    std::fs::set_permissions(at("ping"), std::fs::Permissions::from_mode(0o2755)).unwrap();
    xattr::set(at("ping"), "security.capability", capability).unwrap();
    xattr::set(at("ping"), "user.note", b"a\nb\0").unwrap();
    std::fs::hard_link(at("ping"), at("ping6")).unwrap();
    let time = rustix::fs::Timespec { tv_sec: 981_173_106, tv_nsec: 123_456_789 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, at("ping"), &times, rustix::fs::AtFlags::empty()).unwrap();
    let tar = at("../layer-of-test.tar").parent().unwrap().join(format!("{}.tar", ContainerId::new()));
    run(
        "/usr/bin/tar",
        &[
            "--format=pax",
            "--xattrs",
            "--xattrs-include=*",
            "-S",
            "-C",
            tree.path().to_str().unwrap(),
            "-cf",
            tar.to_str().unwrap(),
            ".",
        ],
    );
    let data = std::fs::read(&tar).unwrap();
    std::fs::remove_file(&tar).unwrap();
    let registry = Registry::start();
    registry.push(&build(&[data], "amd64", true), "x:1");
    let world = World::new().await;
    let image = world.images.pull(&format!("{}/x:1", registry.host), None).await.unwrap();
    assert!(image.size < 1_000_000, "{} bytes: holes are none", image.size);
    rooted(&world, &image.chains, |root| {
        let file = |name: &str| std::fs::File::from(root.open_at(name, OFlags::RDONLY, Mode::empty()).unwrap());
        let meta = file("ping").metadata().unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid(), meta.nlink()), (0o2755, 3, 4, 2));
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (981_173_106, 123_456_789));
        assert_eq!(meta.ino(), file("ping6").metadata().unwrap().ino());
        use xattr::FileExt as _;
        assert_eq!(file("ping").get_xattr("security.capability").unwrap().as_deref(), Some(capability));
        assert_eq!(file("ping").get_xattr("user.note").unwrap().as_deref(), Some(b"a\nb\0".as_slice()));
        assert_eq!(root.read_file(&long, 10).unwrap(), b"long");
        let sparse = file("sparse").metadata().unwrap();
        assert!(sparse.len() == 30_000_003 && sparse.blocks() * 512 < 100_000, "{} blocks", sparse.blocks());
    })
    .await;
}

/// Memory of this process and of those that it has started to unpack, in KiB, without pages of programs: those can be read again.
fn memory() -> u64 {
    let us = std::process::id().to_string();
    let mut sum = 0;
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)).unwrap_or("");
        let own = path.file_name().and_then(|n| n.to_str()) == Some(us.as_str());
        // Of the registry's processes, which are children, too, nothing is counted.
        let unpacker = || std::fs::read(path.join("cmdline")).is_ok_and(|c| c.windows(6).any(|w| w == b"-layer"));
        if own || (parent == us && unpacker()) {
            let rollup = std::fs::read_to_string(path.join("smaps_rollup")).unwrap_or_default();
            let pss = rollup
                .lines()
                .find_map(|l| l.strip_prefix("Pss_Anon:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            sum += pss.unwrap_or(0);
        }
    }
    sum
}

/// Three layers at once, each with the largest window that there may be, and larger than all the memory that there is for them.
#[tokio::test(flavor = "multi_thread")]
async fn no_image_takes_more_than_64_mib() {
    let registry = Registry::start();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = || {
        let mut data = Vec::with_capacity(40 << 20);
        while data.len() < 40 << 20 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            data.extend(state.to_le_bytes());
        }
        data
    };
    let layers: Vec<Vec<u8>> = (0..3).map(|n| layer(&[Item::file(&format!("f{n}"), &noise())])).collect();
    let wide = |tar: &[u8]| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(25).unwrap();
        encoder.include_contentsize(false).unwrap();
        std::io::Write::write_all(&mut encoder, tar).unwrap();
        (encoder.finish().unwrap(), "application/vnd.oci.image.layer.v1.tar+zstd")
    };
    registry.push(&image_of(&layers, false, wide), "x:1");
    drop(layers);
    // Given back, so that what comes is seen.
    // SAFETY: malloc_trim(3) may be called at any time.
    #[allow(unsafe_code)]
    unsafe {
        libc::malloc_trim(0);
    }
    let world = World::new().await;
    let idle = memory();
    let (images, name) = (world.images.clone(), format!("{}/x:1", registry.host));
    let pull = async move { images.pull(&name, None).await.unwrap() };
    let mut pull = std::pin::pin!(pull);
    let (mut peak, mut looks) = (0, 0);
    let image = loop {
        match tokio::time::timeout(std::time::Duration::from_millis(20), &mut pull).await {
            Ok(image) => break image,
            Err(_) => (peak, looks) = (peak.max(memory()), looks + 1),
        }
    };
    assert!(image.size >= 120 << 20 && looks >= 10, "{} bytes, {looks} looks", image.size);
    let taken = peak.saturating_sub(idle);
    assert!(taken > 32 << 10 && taken <= 64 << 10, "{taken} KiB over {idle}");
}

/// What is there is never fetched again: not by another image that shares it, not after a pull that failed half-way.
#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_here_are_not_fetched_again() {
    let shared: Vec<Vec<u8>> = (0..3).map(|n| layer(&[Item::file(&format!("s{n}"), b"x")])).collect();
    let one = build(&[shared.clone(), vec![layer(&[Item::file("one", b"1")])]].concat(), "amd64", false);
    let two = build(&[shared, vec![layer(&[Item::file("two", b"2")])]].concat(), "amd64", false);
    let first = Fake::serving(one.clone(), |_| None).await;
    let world = World::new().await;
    world.images.pull(&format!("{}/one:1", first.host), None).await.unwrap();
    let last = two.layers[3].to_string();
    let broken = Arc::new(AtomicUsize::new(0));
    let (part, times) = (last.clone(), broken.clone());
    let second = Fake::serving(two.clone(), move |seen| {
        (seen.path.contains(&part) && times.fetch_add(1, Ordering::SeqCst) == 0).then(|| Answer::status(500))
    })
    .await;
    let name = format!("{}/two:1", second.host);
    assert!(world.images.pull(&name, None).await.is_err());
    world.images.pull(&name, None).await.unwrap();
    for layer in &two.layers[..3] {
        assert_eq!(second.count(layer.as_str()), 0, "{layer}");
    }
    assert_eq!(second.count(&last), 2);
    // Removed while the other image needs them, the shared ones stay.
    world.images.remove(&name).await.unwrap();
    assert_eq!(world.counts(), (4, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_of_other_tools_keep_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("app");
    write_layout(&folder, &[(simple("x"), Some("latest"))]);
    let world = World::new().await;
    let path = camino::Utf8PathBuf::from_path_buf(folder).unwrap();
    // A tag alone is no name of an image on Docker's hub.
    let got = world.images.load(&ImageSource::OciLayout(path.clone(), None), None).await.unwrap();
    assert_eq!(got[0].repo_tags, ["localhost/app:latest"]);
    let got =
        world.images.load(&ImageSource::OciLayout(path, Some("latest".into())), Some("a.example/b:1")).await.unwrap();
    assert_eq!(got[0].repo_tags, ["a.example/b:1", "localhost/app:latest"]);
}
