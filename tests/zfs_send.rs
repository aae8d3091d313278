//! `image send` and `image recv` between two daemons, each with a pool of zfs-fuse of its own: whole images, what is
//! new since a common layer, layers that the other side has from elsewhere, and streams that are cut or damaged. zfs-fuse can't
//! go on inside of a layer: it says so and begins anew (`tests/node/guest-zfs` has the other case).
//!
//! Run by `cargo test --test zfs_send`, as root. A crash leaves nothing: see `support`.

#![allow(clippy::disallowed_methods)] // tests start programs and write files plainly

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::Digest as _;
use support::node::{Node, Options, good, lxcri};
use support::{daemon_program, describe, given, isolated, wait_for};

/// A second daemon beside the node's own, with its own folders and pool.
struct Other {
    daemon: Child,
    socket: PathBuf,
}

impl Other {
    fn start(node: &Node) -> Self {
        let dir = node.dir.display().to_string();
        let text = std::fs::read_to_string(node.dir.join("config.toml")).expect("config.toml");
        let text = ["cri.sock", "local.sock", "lib", "run"]
            .iter()
            .fold(text, |t, name| t.replace(&format!("\"{dir}/{name}\""), &format!("\"{dir}/other/{name}\"")));
        let text = text.replace("tank/lxcri", "other/lxcri");
        support::run(Command::new("truncate").args(["-s", "1G", "/tmp/pool/other"]));
        let pool = ["create", "-O", "mountpoint=none", "-O", "atime=off", "other", "/tmp/pool/other"];
        support::run(Command::new("/usr/sbin/zpool").args(pool));
        let (config, socket) = (node.dir.join("other.toml"), node.dir.join("other/local.sock"));
        for folder in ["other/lib", "other/run"] {
            std::fs::create_dir_all(node.dir.join(folder)).expect("a folder");
        }
        std::fs::write(&config, text).expect("other.toml");
        let log = || File::options().create(true).append(true).open(node.log_file()).expect("the log");
        let mut command = Command::new(daemon_program());
        command.args(["serve", "--config"]).arg(&config).stdin(Stdio::null()).stdout(log()).stderr(log());
        let daemon = command.spawn().expect("the other daemon");
        let other = Self { daemon, socket };
        wait_for("the other daemon", Duration::from_secs(60), || lxcri(&other.socket, &["images"]).0.then_some(()));
        other
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// The bytes that `image send` writes.
fn sent(socket: &Path, args: &[&str]) -> Vec<u8> {
    let mut command = Command::new(daemon_program());
    let out = command.arg("--local-socket").arg(socket).args(["image", "send"]).args(args).output().expect("send");
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

fn received(socket: &Path, file: &Path, stream: &[u8]) -> (bool, String) {
    std::fs::write(file, stream).expect("a file");
    let mut command = Command::new(daemon_program());
    command.arg("--local-socket").arg(socket).args(["image", "recv"]).stdin(File::open(file).expect("the file"));
    let out = command.output().expect("recv");
    (out.status.success(), describe(&out))
}

/// The stream with its first layer as one that goes on at `token`.
fn going_on(stream: &[u8], token: &[u8]) -> Vec<u8> {
    let header = "lxcri-image-1\n".len();
    let length = u32::from_be_bytes(stream[header + 1..header + 5].try_into().expect("four bytes")) as usize;
    let layer = header + 5 + length;
    assert_eq!(&stream[layer..layer + 9], b"L\0\0\0\x04\0\0\0\0");
    let mut changed = stream[..layer].to_vec();
    changed.push(b'R');
    changed.extend((4 + token.len() as u32).to_be_bytes());
    changed.extend([0; 4]);
    changed.extend(token);
    changed.extend(&stream[layer + 9..]);
    changed
}

/// The stream with another size of its layers in its header.
fn of_size(stream: &[u8], bytes: &str) -> Vec<u8> {
    let header = "lxcri-image-1\n".len();
    let length = u32::from_be_bytes(stream[header + 1..header + 5].try_into().expect("four bytes")) as usize;
    let (said, rest) = stream[header + 5..].split_at(length);
    let mut said: Value = serde_json::from_slice(said).expect("JSON");
    for layer in said["layers"].as_array_mut().expect("layers") {
        layer["bytes"] = bytes.parse::<u64>().expect("a number").into();
    }
    let said = said.to_string();
    [&stream[..=header], &(said.len() as u32).to_be_bytes(), said.as_bytes(), rest].concat()
}

fn digest(data: &[u8]) -> String {
    sha2::Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

/// A layout that holds the layout `from` with one more layer, which has one more file.
fn with_layer(from: &Path, to: &Path, name: &str) {
    with_layer_of(from, to, name, None);
}

/// The same with a file's content.
fn with_layer_of(from: &Path, to: &Path, name: &str, content: Option<&Path>) {
    let blob = |root: &Path, d: &str| root.join("blobs/sha256").join(d.trim_start_matches("sha256:"));
    let read = |d: &Value| -> Value {
        let bytes = std::fs::read(blob(from, d["digest"].as_str().expect("a digest"))).expect("a blob");
        serde_json::from_slice(&bytes).expect("JSON")
    };
    support::run(Command::new("cp").arg("-r").arg(from).arg(to));
    let work = to.with_extension("work");
    std::fs::create_dir_all(work.join("added")).expect("a folder");
    let content = content.map_or_else(|| format!("{name}\n").into(), |path| std::fs::read(path).expect("its content"));
    std::fs::write(work.join("added").join(name), content).expect("a file");
    let tar = work.join("layer.tar");
    support::run(Command::new("tar").arg("-C").arg(&work).arg("-cf").arg(&tar).arg(format!("added/{name}")));
    let put = |bytes: &[u8]| {
        std::fs::write(blob(to, &digest(bytes)), bytes).expect("a blob");
        json!({"digest": format!("sha256:{}", digest(bytes)), "size": bytes.len()})
    };
    let index: Value = serde_json::from_slice(&std::fs::read(from.join("index.json")).expect("index")).expect("JSON");
    let mut manifest = read(&index["manifests"][0]);
    let mut config = read(&manifest["config"]);
    let mut layer = put(&std::fs::read(&tar).expect("the layer"));
    layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
    config["rootfs"]["diff_ids"].as_array_mut().expect("diff ids").push(layer["digest"].clone());
    manifest["layers"].as_array_mut().expect("layers").push(layer);
    let mut described = put(config.to_string().as_bytes());
    described["mediaType"] = manifest["config"]["mediaType"].clone();
    manifest["config"] = described;
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json".into();
    let mut entry = put(manifest.to_string().as_bytes());
    entry["mediaType"] = manifest["mediaType"].clone();
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    std::fs::write(to.join("index.json"), index.to_string()).expect("index.json");
}

#[test]
fn images_go_from_node_to_node() {
    isolated("images_go_from_node_to_node", || {
        let node = Node::start(Options { zfs: true, pool_size: "1G".into(), ..Options::default() });
        let (a, other) = (node.local_socket(), Other::start(&node));
        let b = other.socket.clone();
        let base = given("LXCRI_IMAGES").join("oci/busybox");
        let (one, two) = (node.dir.join("one"), node.dir.join("two"));
        with_layer(&base, &one, "one");
        with_layer(&one, &two, "two");
        let load = |socket: &Path, layout: &Path, name: &str| {
            good(socket, &["pull", &format!("oci:{}", layout.display()), "--as", name]);
        };
        load(&a, &base, "t/base:1");
        load(&a, &one, "t/one:1");
        load(&a, &two, "t/two:1");
        let file = node.dir.join("stream");

        // Cut anywhere, or with one bit changed: nothing is to be seen, and what was whole stays for the next try.
        let whole = sent(&a, &["t/one:1"]);
        let (taken, said) = received(&b, &file, &going_on(&whole, b"1-abc-def"));
        assert!(!taken && said.contains("nothing of it is here that this stream could go on with"), "{said}");
        let (taken, said) = received(&b, &file, &of_size(&whole, "18446744073709551615"));
        assert!(!taken && said.contains("a layer of more than"), "{said}");
        for cut in [0, 5, 40, whole.len() / 2, whole.len() - 40, whole.len() - 1] {
            let (good, said) = received(&b, &file, &whole[..cut]);
            assert!(!good && said.contains("too early"), "cut at {cut}: {said}");
        }
        for at in [3, 100, whole.len() / 3, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 4;
            let (good, said) = received(&b, &file, &damaged);
            assert!(!good, "damaged at {at}: {said}");
        }
        assert_eq!(good(&b, &["images"]).lines().count(), 1);
        // zfs-fuse keeps no beginnings: none is offered, and whoever has one is sent all.
        let said = good(&b, &["image", "have"]);
        assert!(!said.contains(" part "), "{said}");
        let part =
            good(&a, &["image", "have"]).lines().map(|l| format!("{} part 1-ab\n", &l[..71])).collect::<String>();
        let told = node.dir.join("part");
        std::fs::write(&told, part).expect("what is there in part");
        let again = sent(&a, &["t/one:1", "--have", told.to_str().expect("UTF-8")]);
        // Not to the byte: how many frames it takes is a matter of time.
        assert!(again.len() > whole.len() / 10 * 9, "{} of {}", again.len(), whole.len());
        let log = std::fs::read_to_string(node.log_file()).expect("the log");
        assert!(log.contains("sent from its beginning") && log.contains("resumable streams"), "the log says why");
        good(&b, &["storage", "check", "--repair"]);
        let (taken, said) = received(&b, &file, &whole);
        assert!(taken && said.contains("docker.io/t/one:1"), "{said}");
        let names = |socket: &Path| good(socket, &["images"]);
        assert!(names(&b).contains("docker.io/t/one:1"));
        let look = ["run", "--rm", "--host-network", "t/one:1", "sh", "-c", "cat /added/*; ls -l /bin/sh"];
        assert_eq!(good(&b, &look), good(&a, &look));

        // What is new since an image that the other side has from here.
        let new = sent(&a, &["t/two:1", "--since", "t/one:1"]);
        assert!(new.len() < whole.len() / 10, "{} of {}", new.len(), whole.len());
        let (taken, said) = received(&b, &file, &new);
        assert!(taken && said.contains("docker.io/t/two:1"), "{said}");
        let told = good(&b, &["run", "--rm", "--host-network", "t/two:1", "sh", "-c", "cat /added/*"]);
        assert_eq!(told, "one\ntwo");

        // The other way round, to a node that has the base from elsewhere: what it has is told, and left out.
        for name in ["t/two:1", "t/one:1", "t/base:1"] {
            node.crictl().run(&["rmi", name]);
        }
        wait_for("their layers to go", Duration::from_secs(60), || {
            let (_, said) = lxcri(&a, &["storage", "check"]);
            (said.contains("0 layers") && !said.contains("destroyed")).then_some(())
        });
        load(&a, &base, "t/base:1");
        let (taken, said) = received(&a, &file, &sent(&b, &["t/two:1"]));
        assert!(!taken && said.contains("can't be received"), "{said}");
        let have = node.dir.join("have");
        std::fs::write(&have, good(&a, &["image", "have"])).expect("have");
        let stream = sent(&b, &["t/two:1", "--have", have.to_str().expect("UTF-8")]);
        let (taken, said) = received(&a, &file, &stream);
        assert!(taken, "{said}");
        let told = good(&a, &["run", "--rm", "--host-network", "t/two:1", "sh", "-c", "cat /added/*; ls /bin/sh"]);
        assert_eq!(told, "one\ntwo\n/bin/sh");

        for (args, words) in [
            (["image", "send", "nothing:1"].as_slice(), "not here"),
            (&["image", "send"], "an image is needed"),
            (&["image", "send", "t/two:1", "--since", "nothing:1"], "not here"),
            (&["image", "have", "x"], "takes no arguments"),
        ] {
            let (good, said) = lxcri(&a, args);
            assert!(!good && said.contains(words), "{args:?}: {said}");
        }
        for socket in [&a, &b] {
            wait_for("a clean store", Duration::from_secs(60), || {
                let (good, said) = lxcri(socket, &["storage", "check"]);
                (good && said.contains("zfs: clean") && !said.contains("being destroyed")).then_some(())
            });
        }
    });
}

/// Whoever receives a layer and gets nothing more does not keep others from it.
#[test]
fn a_stream_that_stands_still_is_ended() {
    isolated("a_stream_that_stands_still_is_ended", || {
        let lines = [String::new(), String::new(), "progress_timeout = 3".into()];
        let node = Node::start(Options { zfs: true, pool_size: "1G".into(), more_lines: lines, ..Options::default() });
        let socket = node.local_socket();
        let base = format!("oci:{}", given("LXCRI_IMAGES").join("oci/busybox").display());
        good(&socket, &["pull", &base, "--as", "t/base:1"]);
        let stream = sent(&socket, &["t/base:1"]);
        node.crictl().run(&["rmi", "t/base:1"]);
        wait_for("its layers to go", Duration::from_secs(60), || {
            let (_, said) = lxcri(&socket, &["storage", "check"]);
            (said.contains("0 layers") && !said.contains("destroyed")).then_some(())
        });
        let mut command = Command::new(daemon_program());
        command.arg("--local-socket").arg(&socket).args(["image", "recv"]).stdin(Stdio::piped());
        let mut client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("recv");
        let mut input = client.stdin.take().expect("its input");
        std::io::Write::write_all(&mut input, &stream[..stream.len() / 2]).expect("half a stream");
        // It waits for who is at the layer, and then makes it itself.
        good(&socket, &["pull", &base, "--as", "t/base:1"]);
        let out = client.wait_with_output().expect("recv");
        let said = describe(&out);
        assert!(!out.status.success() && said.contains("stands still: nothing came for 3 s"), "{said}");
        drop(input);
        good(&socket, &["run", "--rm", "--host-network", "t/base:1", "true"]);
    });
}

/// The stream with another one of ZFS in the place of its only layer's.
fn of_zfs(stream: &[u8], raw: &[u8]) -> Vec<u8> {
    let header = "lxcri-image-1\n".len();
    let length = u32::from_be_bytes(stream[header + 1..header + 5].try_into().expect("four bytes")) as usize;
    let layer = header + 5 + length;
    let mut made = stream[..layer + 9].to_vec();
    let mut frame = |kind: u8, content: &[u8]| {
        made.push(kind);
        made.extend((content.len() as u32).to_be_bytes());
        made.extend(content);
        sha2::Sha256::digest(&made)
    };
    for piece in raw.chunks(256 << 10) {
        frame(b'D', piece);
    }
    let all = frame(b'E', &sha2::Sha256::digest(raw));
    frame(b'Z', &all);
    made
}

#[test]
fn properties_of_a_stream_are_refused() {
    isolated("properties_of_a_stream_are_refused", || {
        let node = Node::start(Options { zfs: true, pool_size: "1G".into(), ..Options::default() });
        let socket = node.local_socket();
        let base = format!("oci:{}", given("LXCRI_IMAGES").join("oci/busybox").display());
        good(&socket, &["pull", &base, "--as", "t/base:1"]);
        let stream = sent(&socket, &["t/base:1"]);
        let zfs = |args: &[&str]| Command::new("/usr/sbin/zfs").args(args).output().expect("zfs").stdout;
        let listed = zfs(&["list", "-H", "-o", "name", "-t", "snapshot", "-r", "tank/lxcri/layers"]);
        let ready = String::from_utf8(listed).expect("names").trim().to_owned();
        support::run(Command::new("/usr/sbin/zfs").args(["set", "exec=off", ready.trim_end_matches("@ready")]));
        let (plain, with) = (zfs(&["send", &ready]), zfs(&["send", "-p", &ready]));
        node.crictl().run(&["rmi", "t/base:1"]);
        let gone = || {
            wait_for("its layers to go", Duration::from_secs(60), || {
                let (_, said) = lxcri(&socket, &["storage", "check"]);
                (said.contains("0 layers") && !said.contains("destroyed")).then_some(())
            });
        };
        gone();
        let file = node.dir.join("stream");
        let (taken, said) = received(&socket, &file, &of_zfs(&stream, &with));
        assert!(!taken && said.contains("the stream has the property"), "{said}");
        gone();
        let (taken, said) = received(&socket, &file, &of_zfs(&stream, &plain));
        assert!(taken, "{said}");
    });
}

/// A `zfs send` that makes nothing has one of few turns no longer than it may.
#[test]
fn a_send_that_makes_nothing_is_ended() {
    isolated("a_send_that_makes_nothing_is_ended", || {
        let program = "#!/bin/sh\n[ $1 != send ] || [ ! -e /tmp/hang ] || exec sleep 1234\nexec /usr/sbin/zfs \"$@\"\n";
        std::fs::create_dir_all("/tmp/bin").expect("folder");
        std::fs::write("/tmp/bin/zfs", program).expect("a program");
        support::run(Command::new("chmod").args(["755", "/tmp/bin/zfs"]));
        let node = Node::start(Options {
            zfs: true,
            pool_size: "1G".into(),
            zfs_programs: ["/tmp/bin/zfs", "/usr/sbin/zpool"].map(String::from),
            more_lines: [String::new(), String::new(), "progress_timeout = 6".into()],
            ..Options::default()
        });
        let socket = node.local_socket();
        let base = format!("oci:{}", given("LXCRI_IMAGES").join("oci/busybox").display());
        good(&socket, &["pull", &base, "--as", "t/base:1"]);
        std::fs::write("/tmp/hang", "").expect("a file");
        let send = || {
            let mut command = Command::new(daemon_program());
            command.arg("--local-socket").arg(&socket).args(["image", "send", "t/base:1"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("send")
        };
        let hanging = || {
            let all = Command::new("ps").args(["-eo", "args"]).output().expect("ps").stdout;
            String::from_utf8_lossy(&all).lines().filter(|l| *l == "sleep 1234").count()
        };
        // Who leaves is noticed at once, who waits is told.
        let mut leaves = send();
        wait_for("it to hang", Duration::from_secs(20), || (hanging() == 1).then_some(()));
        leaves.kill().expect("the end of a client");
        leaves.wait().expect("its end");
        wait_for("its end to be noticed", Duration::from_secs(5), || (hanging() == 0).then_some(()));
        let said = describe(&send().wait_with_output().expect("send"));
        assert!(said.contains("nothing came of a layer for 6 s"), "{said}");
        assert_eq!(hanging(), 0);
        std::fs::remove_file("/tmp/hang").expect("the file");
        assert!(!sent(&socket, &["t/base:1"]).is_empty());
    });
}

/// Clients that take nothing give their places back, and are told why when they take something.
#[test]
fn a_client_that_takes_nothing_gives_its_place_back() {
    isolated("a_client_that_takes_nothing_gives_its_place_back", || {
        let lines = [String::new(), String::new(), "progress_timeout = 3".into()];
        let node = Node::start(Options { zfs: true, pool_size: "1G".into(), more_lines: lines, ..Options::default() });
        let socket = node.local_socket();
        let base = given("LXCRI_IMAGES").join("oci/busybox");
        let layout = node.dir.join("large");
        // More than all queues and pipes on the way hold.
        let mut random = vec![0; 32 << 20];
        std::io::Read::read_exact(&mut File::open("/dev/urandom").expect("urandom"), &mut random).expect("bytes");
        std::fs::write(node.dir.join("random"), random).expect("a file");
        with_layer_of(&base, &layout, "large", Some(&node.dir.join("random")));
        good(&socket, &["pull", &format!("oci:{}", layout.display()), "--as", "t/large:1"]);
        let whole = sent(&socket, &["t/large:1"]).len();
        assert!(whole > 32 << 20, "{whole}");
        // As many as may send at once.
        let send = || {
            let mut command = Command::new(daemon_program());
            command.arg("--local-socket").arg(&socket).args(["image", "send", "t/large:1"]);
            let mut client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("send");
            // It has its turn when something comes.
            let mut output = client.stdout.take().expect("its output");
            std::io::Read::read_exact(&mut output, &mut vec![0; 2 << 20]).expect("the beginning");
            (client, output)
        };
        let idle: Vec<_> = (0..4).map(|_| send()).collect();
        let begun = std::time::Instant::now();
        assert!(sent(&socket, &["t/large:1"]).len() > 32 << 20);
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        // The others began before, and no more than a moment: nobody is waited for any more by now.
        wait_for("their time to be over", Duration::from_secs(10), || {
            (begun.elapsed() > Duration::from_secs(4)).then_some(())
        });
        for (client, mut output) in idle {
            let mut rest = Vec::new();
            std::io::Read::read_to_end(&mut output, &mut rest).expect("the rest");
            assert!(rest.len() < 16 << 20, "{}", rest.len());
            let said = describe(&client.wait_with_output().expect("send"));
            assert!(said.contains("stands still: nothing was taken for 3 s"), "{said}");
        }
    });
}
