//! Images in containers, on a real node: packed from the registry, taken and run with the registry gone, through our own
//! command line and through crictl.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use camino::Utf8Path;

use super::support::crictl::{BUSYBOX, read_log, stream_lines};
use super::support::node::{Node, Options};
use super::support::{daemon_program, describe, isolated, wait_for};

fn local(node: &Node, args: &[&str]) -> Output {
    let mut command = Command::new(daemon_program());
    command.arg("--config").arg(node.dir.join("config.toml")).args(args);
    command.output().expect("our own program")
}

fn good(node: &Node, args: &[&str]) -> String {
    let out = local(node, args);
    assert!(out.status.success(), "{args:?}: {}", describe(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn bad(node: &Node, args: &[&str], why: &str) {
    let out = local(node, args);
    let said = describe(&out);
    assert!(!out.status.success() && said.contains(why), "{args:?}: not {why:?} in {said}");
}

fn path(node: &Node, name: &str) -> String {
    node.dir.join(name).to_str().expect("UTF-8").to_owned()
}

/// Ends the registry: nothing can be fetched any more.
fn cut_off(node: &mut Node) {
    node.stop_registry();
    let (pulled, said) = node.crictl().try_run(&["pull", BUSYBOX]);
    assert!(!pulled, "the registry still answers: {said}");
}

fn node(more: &str) -> Node {
    let config =
        format!("[images.bfc]\nenabled = true\ndirectories = [\"/tmp/node/none\", \"/tmp/node/bfc\"]\n{more}\n");
    let node = Node::start(Options { more_config: config, ..Options::default() });
    std::fs::create_dir_all(node.dir.join("bfc/team")).expect("the folder for containers");
    node
}

#[test]
fn images_start_from_containers_without_a_registry() {
    isolated("images::images_start_from_containers_without_a_registry", || {
        let mut node = node("pinned = true");
        let file = |name: &str| format!("/tmp/node/bfc/{name}");
        let (busybox, demo, team, many) =
            (file("busybox.bfc"), file("demo@1.bfc"), file("team/app@2.bfc"), file("x.bfc"));
        // From the registry, by its digests; twice the same bytes.
        let said = good(&node, &["bfc", "pack", BUSYBOX, &busybox]);
        let digest = said.split(' ').next().expect("a digest").to_owned();
        assert!(digest.starts_with("sha256:") && said.contains(BUSYBOX), "{said}");
        bad(&node, &["bfc", "pack", BUSYBOX, &busybox], "is there already");
        good(&node, &["bfc", "pack", "-f", "-q", BUSYBOX, &demo]);
        let bytes = |path: &str| std::fs::read(path).expect("a container");
        assert!(bytes(&busybox) == bytes(&demo), "packed twice, the bytes differ");
        good(&node, &["bfc", "pack", &format!("bfc:{busybox}"), "--as", "registry.example/team/app:2", &team]);
        good(&node, &["bfc", "pack", BUSYBOX, "registry.k8s.io/e2e-test-images/nginx:1.14-2", &many]);
        let short = file("short.bfc");
        good(&node, &["bfc", "pack", &format!("bfc:{busybox}"), "--as", "short:1", &short]);
        let list = good(&node, &["bfc", "list", "-l", &many]);
        assert_eq!(list.matches("index.json").count(), 1, "{list}");
        // Layers are stored as they are, manifests compressed.
        let info = good(&node, &["bfc", "info", &busybox, "index.json"]);
        assert!(info.contains("Compression: zstd"), "{info}");
        assert!(good(&node, &["bfc", "verify", "--deep", &many]).contains("sound"));
        // A layout in the container's only folder is packed like one at its root.
        let (layout, nested, again) = (path(&node, "layout"), file("nested.bfc"), file("again@1.bfc"));
        std::fs::create_dir(&layout).expect("mkdir");
        good(&node, &["bfc", "extract", "-k", "-C", &layout, &busybox]);
        good(&node, &["bfc", "create", &nested, &layout]);
        good(&node, &["bfc", "pack", &format!("bfc:{nested}"), "--as", "registry.example/again:1", &again]);
        cut_off(&mut node);
        let crictl = node.crictl();

        // The content is in no store yet: what starts now comes out of the container.
        assert_eq!(crictl.json(&["images"])["images"].as_array().map(Vec::len), Some(0));
        let out = local(&node, &["run", "--rm", &format!("bfc:{busybox}"), "sh", "-c", "echo from a file; exit 3"]);
        assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(3), &b"from a file\n"[..]), "{}", describe(&out));
        crictl.run(&["rmi", BUSYBOX]);

        // A name in short is the one in full; a key is for containers alone.
        for name in ["short:1", "docker.io/library/short:1"] {
            let out = local(&node, &["run", "--rm", "--host-network", &format!("bfc:{short}:{name}"), "echo", "named"]);
            assert_eq!(out.stdout, b"named\n", "{}", describe(&out));
        }
        bad(&node, &["run", "--keyfile", "/etc/passwd", "no/such:1"], "are for containers");
        crictl.run(&["pull", "bfc.local/library/short:1"]);
        crictl.run(&["rmi", "short:1"]);

        // As the kubelet asks: by tag in NAME.bfc, in NAME@TAG.bfc, in a folder, inside any container, by digest.
        let tag = BUSYBOX.rsplit(':').next().expect("a tag");
        for reference in [
            "bfc.local/demo:1".to_owned(),
            format!("bfc.local/busybox:{tag}"),
            format!("bfc.local/busybox@{digest}"),
            "bfc.local/team/app:2".to_owned(),
            "bfc.local/e2e-test-images/nginx:1.14-2".to_owned(),
            "bfc.local/again:1".to_owned(),
        ] {
            crictl.run(&["pull", &reference]);
            let image = crictl.json(&["inspecti", &reference]);
            assert_eq!(image["status"]["pinned"], true, "{reference}: {image}");
        }
        let used = crictl.json(&["inspecti", "bfc.local/demo:1"]);
        let digests = used["status"]["repoDigests"].to_string();
        assert!(digests.contains(&format!("bfc.local/demo@{digest}")), "{digests}");
        let pod = crictl.run_pod("p");
        let id = crictl.create(&pod, "p", "c", "bfc.local/demo:1", "echo started; cat /etc/passwd | wc -l");
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
        let log = node.pod_logs("p").join("c/0.log");
        let lines = wait_for("the log", Duration::from_secs(20), || {
            Some(stream_lines(&read_log(&log), "stdout")).filter(|l| l.len() == 2)
        });
        assert_eq!(lines[0], "started");

        // What is not there, by name; and nothing is asked of a network.
        for (reference, why) in [
            ("bfc.local/demo:9", "no container in"),
            ("bfc.local/none:1", "no container in"),
            ("bfc.local/../etc:1", ""),
            // Names that no file can have.
            (&format!("bfc.local/{}:{}", "n".repeat(200), "t".repeat(100)), "no container in"),
            ("bfc.local/busybox.bfc/below:1", "no container in"),
            (
                "bfc.local/busybox@sha256:0000000000000000000000000000000000000000000000000000000000000000",
                "no container in",
            ),
        ] {
            let (pulled, said) = crictl.try_run(&["pull", reference]);
            assert!(!pulled && said.contains(why), "{reference}: {said}");
        }
        // A bad file among the others hides none of them, and is told when nothing is found.
        std::fs::write(node.dir.join("bfc/broken.bfc"), "not a container").expect("a file");
        crictl.run(&["pull", "bfc.local/e2e-test-images/nginx:1.14-2"]);
        let (_, said) = crictl.try_run(&["pull", "bfc.local/none:1"]);
        assert!(said.contains("broken.bfc"), "{said}");
        // A blob that is not what its digest says.
        let mut changed = bytes(&demo);
        let at = changed.len() / 2;
        changed[at] ^= 1;
        std::fs::write(node.dir.join("bfc/changed@1.bfc"), changed).expect("a file");
        for image in crictl.json(&["images"])["images"].as_array().into_iter().flatten() {
            let (pod_gone, id) = (crictl.try_run(&["rmp", "-f", &pod]), image["id"].as_str().unwrap_or_default());
            assert!(pod_gone.0 || crictl.json(&["pods"])["items"].as_array().is_some_and(Vec::is_empty));
            crictl.run(&["rmi", id]);
        }
        let (pulled, said) = crictl.try_run(&["pull", "bfc.local/changed:1"]);
        assert!(!pulled, "{said}");
        assert_eq!(crictl.json(&["images"])["images"].as_array().map(Vec::len), Some(0));
        crictl.run(&["pull", "bfc.local/demo:1"]);
    });
}

#[test]
fn keys_plain_root_file_systems_and_policy() {
    isolated("images::keys_plain_root_file_systems_and_policy", || {
        let mut node = node("key_file = \"/tmp/node/key\"");
        let file = |name: &str| format!("/tmp/node/bfc/{name}");
        for (name, content) in [("key", &[5; 32][..]), ("other", &[6; 32]), ("password", b"a password\n")] {
            super::private(Utf8Path::from_path(&node.dir.join(name)).expect("UTF-8"), content);
        }
        let (sealed, by_password) = (file("sealed@1.bfc"), file("word.bfc"));
        let (key, other, password) = (path(&node, "key"), path(&node, "other"), path(&node, "password"));
        good(&node, &["bfc", "pack", "-k", &key, BUSYBOX, &sealed]);
        good(&node, &["bfc", "pack", "--password-file", &password, BUSYBOX, &by_password]);
        cut_off(&mut node);
        let crictl = node.crictl();
        // The configured key; another one; a password; what the daemon can't open as this program does.
        bad(&node, &["bfc", "import", "-K", "/dev/null", &sealed], "not a regular file");
        bad(&node, &["bfc", "import", "-K", &other, &sealed], "can't be decrypted");
        bad(&node, &["bfc", "import", &by_password], "can't be decrypted");
        assert_eq!(crictl.json(&["images"])["images"].as_array().map(Vec::len), Some(0));
        crictl.run(&["pull", "bfc.local/sealed:1"]);
        assert_ne!(crictl.json(&["inspecti", "bfc.local/sealed:1"])["status"]["pinned"], true);
        crictl.run(&["rmi", "bfc.local/sealed:1"]);
        let import = ["bfc", "import", "--password-file", &password, "--tag", "my/own:1", "--pin", &by_password];
        assert!(good(&node, &import).contains("docker.io/my/own:1"));
        assert_eq!(crictl.json(&["inspecti", "docker.io/my/own:1"])["status"]["pinned"], true);
        let log = std::fs::read_to_string(node.log_file()).expect("the log");
        assert!(!log.contains("a password"), "the password is in the log");

        // A plain root file system: an image with a warning.
        let root = node.dir.join("rootfs");
        std::fs::create_dir_all(root.join("bin")).expect("mkdir");
        std::fs::create_dir_all(root.join("etc")).expect("mkdir");
        for folder in ["dev", "proc", "sys", "tmp", "a-long-name/".repeat(12).trim_end_matches('/')] {
            std::fs::create_dir_all(root.join(folder)).expect("mkdir");
        }
        std::fs::copy(busybox_program(), root.join("bin/busybox")).expect("busybox");
        std::os::unix::fs::symlink("busybox", root.join("bin/sh")).expect("symlink");
        std::fs::write(root.join("etc/motd"), "plain\n").expect("a file");
        std::fs::write(root.join("a-long-name/".repeat(12)).join("file"), "deep\n").expect("a file");
        std::os::unix::fs::chown(root.join("etc/motd"), Some(1234), Some(1234)).expect("chown");
        let plain = file("plain.bfc");
        good(&node, &["bfc", "create", "-c", "zstd", &plain, root.to_str().expect("UTF-8")]);
        let script = format!(
            "busybox cat /etc/motd; busybox stat -c %u:%g /etc/motd; busybox cat {}file",
            "/a-long-name".repeat(12) + "/"
        );
        // Whoever names a key does not want what anybody can have made.
        bad(&node, &["bfc", "import", "-K", &key, &plain], "is not encrypted, though a key is given");
        let out = local(&node, &["run", "--rm", "-e", "PATH=/bin", &format!("bfc:{plain}"), "/bin/sh", "-c", &script]);
        let said = describe(&out);
        assert_eq!(String::from_utf8_lossy(&out.stdout), "plain\n0:0\ndeep\n", "{said}");
        assert!(said.contains("plain root file system"), "{said}");
        crictl.run(&["pull", "bfc.local/plain:latest"]);
        let neither = file("neither.bfc");
        good(&node, &["bfc", "create", &neither, &key]);
        bad(&node, &["bfc", "import", &neither], "neither an OCI image layout nor a root file system");

        // Refused by policy, and switched off.
        let config = node.dir.join("config.toml");
        let text = std::fs::read_to_string(&config).expect("config");
        node.stop_daemon();
        std::fs::write(&config, text.replace("key_file", "plain_rootfs = \"refuse\"\nkey_file")).expect("config");
        node.start_daemon();
        bad(&node, &["bfc", "import", "--tag", "other:1", &plain], "images.bfc.plain_rootfs refuses");
        let (pulled, said) = crictl.try_run(&["pull", "bfc.local/plain:latest"]);
        assert!(!pulled && said.contains("refuses"), "{said}");
        node.stop_daemon();
        std::fs::write(&config, text.replace("enabled = true", "enabled = false")).expect("config");
        node.start_daemon();
        let (pulled, said) = crictl.try_run(&["pull", "bfc.local/sealed:1"]);
        assert!(!pulled && said.contains("images.bfc.enabled"), "{said}");
    });
}

/// The environment's busybox is linked statically.
fn busybox_program() -> &'static Path {
    let candidates = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new);
    candidates.into_iter().find(|p| p.exists()).expect("busybox in the environment")
}
