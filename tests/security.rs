//! Who may talk to the daemon, what others can see of it, and that secrets stay where they belong: marked ones are planted
//! wherever a secret can come in, and looked for in all that comes out.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use k8s_cri::v1 as cri;
use support::client::{Client, block_on, container, create_request, image_spec, pod};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, streams, wait_for};

const NOBODY: u32 = 65534;

/// Runs as a user without any power, on a thread of its own.
fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let id = rustix::thread::Uid::from_raw(NOBODY);
            rustix::thread::set_thread_res_uid(id, id, id).unwrap();
            work()
        });
        thread.join().unwrap()
    })
}

/// All files below `folder` that one can get at: sockets and readable files.
fn reachable(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => reachable(&path, found),
            Ok(meta) if meta.is_file() && std::fs::File::open(&path).is_ok() => found.push(path),
            Ok(_) if UnixStream::connect(&path).is_ok() => found.push(path),
            _ => {}
        }
    }
}

/// Whether the server keeps the connection: it sends its first frame, or hangs up.
fn is_served(socket: &Path) -> bool {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The preface of HTTP/2 and an empty SETTINGS.
    let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    stream.read(&mut [0; 9]).is_ok_and(|n| n > 0)
}

#[test]
fn sockets_and_state_are_roots() {
    isolated("sockets_and_state_are_roots", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let id = crictl.create(&pod, "p", "c", BUSYBOX, "sleep 1000");
        crictl.run(&["start", &id]);
        let info: serde_json::Value = serde_json::from_str(&crictl.run(&["info"])).unwrap();
        let conditions = info["status"]["conditions"].as_array().unwrap();
        let confined = conditions.iter().find(|c| c["type"] == "UnpackingConfined").unwrap();
        assert_eq!(confined["status"], true, "{confined}");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        for socket in [node.socket(), node.local_socket()] {
            assert_eq!((mode(&socket), std::fs::metadata(&socket).unwrap().uid()), (0o600, 0), "{}", socket.display());
        }
        assert_eq!(mode(&node.dir.join("lib")), 0o700);
        for folder in ["run/pods", "run/console", "run/crun"] {
            assert_eq!(mode(&node.dir.join(folder)), 0o700, "{folder}");
        }
        // To be passed to a root file system inside of a user namespace, not to be listed.
        assert_eq!(mode(&node.dir.join("run")), 0o711);
        let seen = as_nobody(|| {
            let mut seen = Vec::new();
            for folder in ["lib", "run"].map(|f| node.dir.join(f)) {
                reachable(&folder, &mut seen);
            }
            seen.extend([node.socket(), node.local_socket()].into_iter().filter(|s| UnixStream::connect(s).is_ok()));
            seen
        });
        assert_eq!(seen, Vec::<PathBuf>::new());
        // A mode that somebody loosened does not open the local socket, which can do what root can.
        std::fs::set_permissions(node.local_socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(is_served(&node.local_socket()));
        assert!(!as_nobody(|| is_served(&node.local_socket())));
        let log = std::fs::read_to_string(node.log_file()).unwrap();
        assert!(log.contains("a connection to the local socket was refused uid=65534"), "{log}");
        crictl.run(&["rmp", "-f", &pod]);
    });
}

#[test]
fn a_crash_leaves_no_core_file() {
    isolated("a_crash_leaves_no_core_file", || {
        let folder = Path::new("/tmp/cores");
        std::fs::create_dir_all(folder).unwrap();
        std::env::set_current_dir(folder).unwrap();
        let hard = rustix::process::getrlimit(rustix::process::Resource::Core).maximum;
        let all = rustix::process::Rlimit { current: hard, maximum: hard };
        rustix::process::setrlimit(rustix::process::Resource::Core, all).unwrap();
        let cores = || std::fs::read_dir(folder).unwrap().count();
        // What others leave shows that the machine would.
        let _ = Command::new("/bin/sh").args(["-c", "kill -ABRT $$"]).status().unwrap();
        let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
        assert_eq!(cores(), 1, "this machine leaves no core files here ({pattern}): nothing can be told");
        let node = Node::start(Options::default());
        let pid = rustix::process::Pid::from_raw(node.daemon_pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::ABORT).unwrap();
        wait_for("the daemon's end", Duration::from_secs(30), || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", node.daemon_pid())).ok()?;
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')).then_some(())
        });
        assert_eq!(cores(), 1);
    });
}

/// Where `marker` is found below `folder`, read as bytes; what can't be read is no secret's place.
fn holders(folder: &Path, marker: &[u8], found: &mut BTreeSet<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        let Ok(meta) = std::fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            holders(&path, marker, found);
        } else if meta.is_file() && meta.len() < 64 << 20 {
            let data = std::fs::read(&path).unwrap_or_default();
            if data.windows(marker.len()).any(|w| w == marker) {
                found.insert(path);
            }
        }
    }
}

#[test]
fn secrets_stay_where_they_belong() {
    isolated("secrets_stay_where_they_belong", || {
        let mut node = Node::prepare(Options::default());
        // The most that can be logged, of all parts.
        let config = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&config).unwrap();
        let level = text.lines().find(|l| l.starts_with("level = ")).unwrap().to_owned();
        std::fs::write(&config, text.replace(&level, "level = \"trace\"")).unwrap();
        // Headers of a registry's hosts.toml.
        let folder = node.dir.join("certs.d/secret.test");
        std::fs::create_dir_all(&folder).unwrap();
        let hosts = format!(
            "[host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n  [host.\"http://{0}\".header]\n    authorization = \"Bearer SECRET-hosts-header\"\n",
            node.registry_address
        );
        std::fs::write(folder.join("hosts.toml"), hosts).unwrap();
        node.start_daemon();
        let mut said = String::new();
        let mut running = String::new();
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            c.pull(BUSYBOX).await;
            // Credentials, where they fit, where they do not, and where nobody answers.
            for image in ["secret.test/e2e-test-images/busybox:1.29-2", "secret.test/no/such:1", "unreachable.test/x:1"]
            {
                for auth in [
                    cri::AuthConfig {
                        username: "user".into(),
                        password: "SECRET-password".into(),
                        ..Default::default()
                    },
                    cri::AuthConfig { auth: "dXNlcjpTRUNSRVQtcGFzc3dvcmQ=".into(), ..Default::default() },
                    cri::AuthConfig { identity_token: "SECRET-identity".into(), ..Default::default() },
                    cri::AuthConfig { registry_token: "SECRET-registry-token".into(), ..Default::default() },
                    // No base64: the error must not repeat it.
                    cri::AuthConfig { auth: "SECRET-password in the clear".into(), ..Default::default() },
                ] {
                    let pull = cri::PullImageRequest {
                        image: Some(image_spec(image)),
                        auth: Some(auth),
                        ..Default::default()
                    };
                    said += &format!("{:?}\n", c.images.pull_image(pull).await.map(|a| a.into_inner()));
                }
            }
            // Values of the environment, in containers that run, that can't run, and that are refused.
            let config = pod("p", &node.dir.join("logs"));
            let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
            let pod_id = c.runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
            let with_env = |name: &str, script: &str| {
                let mut config = container(name, BUSYBOX, script);
                config.envs.push(cri::KeyValue { key: "TOKEN".into(), value: "SECRET-env".into() });
                config
            };
            let mut none = with_env("none", "");
            none.command = vec!["/no/such/program".into()];
            let mut bad = with_env("bad", "true");
            bad.envs.push(cri::KeyValue { key: "BAD\0NAME".into(), value: "SECRET-env\0".into() });
            let mut user = with_env("user", "true");
            user.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_username = "nobody-knows".into();
            for config_of in [with_env("runs", "while sleep 1; do :; done"), none, bad, user] {
                let created = c.runtime.create_container(create_request(&pod_id, config_of, &config)).await;
                said += &format!("{created:?}\n");
                let Ok(created) = created else { continue };
                let id = created.into_inner().container_id;
                let start = cri::StartContainerRequest { container_id: id.clone() };
                let started = c.runtime.start_container(start).await;
                said += &format!("{started:?}\n");
                for verbose in [false, true] {
                    let status = cri::ContainerStatusRequest { container_id: id.clone(), verbose };
                    said += &format!("{:?}\n", c.runtime.container_status(status).await);
                }
                if started.is_ok() {
                    running = id;
                }
            }
            let status = cri::StatusRequest { verbose: true };
            said += &format!("{:?}\n", c.runtime.status(status).await);
            let list = cri::ListContainersRequest::default();
            said += &format!("{:?}\n", c.runtime.list_containers(list).await);
        });
        // What is typed into a container, by a stream, and what it says to whom asked.
        let crictl = node.crictl();
        let echo = streams::fed(&crictl, &["exec", "-i", &running, "cat"], b"SECRET-stdin\n".to_vec());
        assert_eq!(String::from_utf8_lossy(&echo.stdout), "SECRET-stdin\n", "{echo:?}");
        assert_eq!(crictl.run(&["exec", "-s", &running, "/bin/sh", "-c", "echo $TOKEN"]), "SECRET-env");
        node.crash_daemon();
        assert_eq!(crictl.run(&["exec", "-s", &running, "/bin/sh", "-c", "echo $TOKEN"]), "SECRET-env");

        assert!(!said.contains("SECRET-"), "{said}");
        let mut found = BTreeSet::new();
        for folder in ["lib", "run", "logs"].map(|f| node.dir.join(f)) {
            holders(&folder, b"SECRET-", &mut found);
        }
        holders(Path::new("/var/lib/cni"), b"SECRET-", &mut found);
        // The bundle on the tmpfs, which the OCI runtime reads, and what it keeps of it.
        let allowed = |path: &Path| {
            let run = path.strip_prefix(node.dir.join("run")).ok().and_then(Path::to_str).unwrap_or_default();
            run.starts_with("pods/") && run.ends_with("/config.json") || run.starts_with("crun/")
        };
        let bundles = found.iter().filter(|p| allowed(p)).count();
        let others: Vec<_> = found.iter().filter(|p| !allowed(p)).collect();
        assert!(others.is_empty() && bundles > 0, "{others:?}, {bundles} bundles");
        // Neither the log of the daemon at its loudest, nor what anybody can see of the processes.
        let log = std::fs::read_to_string(node.log_file()).unwrap();
        let line = log.lines().find(|l| l.contains("SECRET-") || l.contains("dXNlcjpTRUNSRVQ"));
        assert!(line.is_none() && log.contains("TRACE"), "{line:?}");
        for process in std::fs::read_dir("/proc").unwrap().flatten().map(|e| e.path()) {
            let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&line).contains("SECRET-"), "{}", String::from_utf8_lossy(&line));
        }
        crictl.run(&["rmp", "-fa"]);
    });
}

#[test]
fn stream_tokens_can_not_be_guessed() {
    isolated("stream_tokens_can_not_be_guessed", || {
        let node = Node::start(Options::default());
        let (_, id) = streams::sleeper(&node.crictl());
        let mut tokens = BTreeSet::new();
        block_on(async {
            let mut c = Client::connect(&node.socket()).await;
            for _ in 0..200 {
                let exec = cri::ExecRequest {
                    container_id: id.clone(),
                    cmd: vec!["true".into()],
                    stdout: true,
                    ..Default::default()
                };
                let url = c.runtime.exec(exec).await.unwrap().into_inner().url;
                let token = url.rsplit('/').next().unwrap().to_owned();
                assert!(token.len() == 43 && token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
                tokens.insert(token);
            }
        });
        assert_eq!(tokens.len(), 200);
        // 256 bits: each of the 64 digits is about as frequent at each place (200 * 42 / 64 = 131 in all, 11 the deviation).
        let mut counts = std::collections::HashMap::new();
        tokens.iter().flat_map(|t| t.bytes().take(42)).for_each(|b| *counts.entry(b).or_insert(0_u32) += 1);
        assert_eq!(counts.len(), 64);
        assert!(counts.values().all(|n| (60..220).contains(n)), "{counts:?}");
        let log = std::fs::read_to_string(node.log_file()).unwrap();
        assert!(tokens.iter().all(|t| !log.contains(t.as_str())), "a token is in the log");
    });
}
