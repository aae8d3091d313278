//! The life of pods through the real crictl: every verb that a person uses, logs and exit codes compared with what the
//! programs in the containers did, a small image and one of many layers.
//!
//! Run by `cargo test --test crictl_life`, as root. A crash leaves nothing: see `support`.

mod support;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use support::crictl::{BIG, BUSYBOX, container_config, pod_config, read_log, stream_lines};
use support::node::{Node, Options};
use support::{describe, isolated, snapshot, wait_for};

fn log_path(node: &Node, pod: &str, container: &str) -> PathBuf {
    node.pod_logs(pod).join(container).join("0.log")
}

/// Ids of what `crictl ps -a`, `pods` or `images` lists under `key`.
fn ids(list: &Value, key: &str) -> Vec<String> {
    list[key].as_array().into_iter().flatten().filter_map(|e| e["id"].as_str().map(str::to_owned)).collect()
}

#[test]
fn every_verb_from_pull_to_removal() {
    isolated("every_verb_from_pull_to_removal", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();

        let version = crictl.run(&["version"]);
        assert!(version.contains("RuntimeName:") && version.contains("RuntimeApiVersion:  v1"), "{version}");
        let info = crictl.json(&["info"]);
        for condition in info["status"]["conditions"].as_array().expect("conditions") {
            assert_eq!(condition["status"], true, "{condition}");
        }

        let before = snapshot::take(&node);
        let pulled = crictl.run(&["pull", BUSYBOX]);
        assert!(pulled.contains("sha256:"), "{pulled}");
        let images = crictl.json(&["images"]);
        let [image] = images["images"].as_array().expect("images").as_slice() else { panic!("one image: {images}") };
        assert_eq!(image["repoTags"], serde_json::json!([BUSYBOX]));
        assert!(image["repoDigests"][0].as_str().is_some_and(|d| d.contains("@sha256:")), "{image}");
        let size: u64 = image["size"].as_str().and_then(|s| s.parse().ok()).unwrap_or_default();
        assert!(size > 100_000, "{image}");
        let inspected = crictl.json(&["inspecti", BUSYBOX]);
        assert_eq!(inspected["status"]["id"], image["id"]);
        wait_for("the image file system's usage", Duration::from_secs(30), || {
            let fs = crictl.json(&["imagefsinfo"]);
            let used = fs["status"]["imageFilesystems"][0]["usedBytes"]["value"].as_str()?;
            used.parse::<u64>().ok().filter(|bytes| *bytes >= size)
        });

        let pod = crictl.run_pod("p1");
        let pods = crictl.json(&["pods"]);
        assert_eq!(pods["items"][0]["id"], pod.as_str());
        assert_eq!(pods["items"][0]["state"], "SANDBOX_READY");
        let inspected = crictl.json(&["inspectp", &pod]);
        let status = &inspected["status"];
        assert_eq!(status["metadata"]["name"], "p1");
        assert_eq!(status["labels"]["app"], "test");
        assert_eq!(status["annotations"]["note"], "kept as it is");
        let ip = status["network"]["ip"].as_str().expect("an address").to_owned();
        assert!(ip.starts_with("10.88."), "{status}");

        let script = "trap 'echo bye; exit 0' TERM; echo out $GREETING; echo err >&2; hostname; i=0; \
                      while :; do sleep 0.05; done";
        let id = crictl.create(&pod, "p1", "c1", BUSYBOX, script);
        assert_eq!(crictl.container_state(&id), "CONTAINER_CREATED");
        crictl.run(&["start", &id]);
        assert_eq!(crictl.container_state(&id), "CONTAINER_RUNNING");
        assert_eq!(ids(&crictl.json(&["ps"]), "containers"), [id.as_str()]);
        wait_for("three lines in the log", Duration::from_secs(20), || {
            (read_log(&log_path(&node, "p1", "c1")).len() >= 3).then_some(())
        });
        let shown = crictl.output(&["logs", &id]);
        assert!(shown.status.success(), "{}", describe(&shown));
        assert_eq!(String::from_utf8_lossy(&shown.stdout), "out hello\np1\n");
        assert_eq!(String::from_utf8_lossy(&shown.stderr), "err\n");

        // exec: output, both streams, exit codes
        assert_eq!(crictl.run(&["exec", "-s", &id, "echo", "in here"]), "in here");
        let failed = crictl.output(&["exec", "-s", &id, "sh", "-c", "echo o; echo e >&2; exit 7"]);
        let said = describe(&failed);
        assert!(!failed.status.success() && said.contains("7") && said.contains("o") && said.contains("e"), "{said}");
        let address = crictl.run(&["exec", "-s", &id, "ip", "-o", "-4", "address", "show", "eth0"]);
        assert!(address.contains(&ip), "{address} lacks {ip}");

        crictl.run(&["stop", "-t", "10", &id]);
        let status = crictl.wait_exit(&id);
        assert_eq!((&status["exitCode"], &status["reason"]), (&0.into(), &"Completed".into()), "{status}");
        let log = read_log(&log_path(&node, "p1", "c1"));
        assert_eq!(stream_lines(&log, "stdout"), ["out hello", "p1", "bye"]);
        assert_eq!(stream_lines(&log, "stderr"), ["err"]);
        assert!(log.iter().all(|l| l.full), "{log:?}");
        assert!(ids(&crictl.json(&["ps"]), "containers").is_empty());
        assert_eq!(ids(&crictl.json(&["ps", "-a"]), "containers"), [id.as_str()]);

        crictl.run(&["rm", &id]);
        assert!(ids(&crictl.json(&["ps", "-a"]), "containers").is_empty());
        crictl.run(&["stopp", &pod]);
        assert_eq!(crictl.json(&["pods"])["items"][0]["state"], "SANDBOX_NOTREADY");
        crictl.run(&["stopp", &pod]);
        crictl.run(&["rmp", &pod]);
        assert!(ids(&crictl.json(&["pods"]), "items").is_empty());
        crictl.run(&["rmi", BUSYBOX]);
        assert!(ids(&crictl.json(&["images"]), "images").is_empty());

        // The bridge stays, as bridges do; all else is as before.
        let mut before = before;
        before.entry("interfaces").or_default().push("lxcri-t0".into());
        snapshot::assert_back_to(&before, &node);
    });
}

#[test]
fn exit_codes_signals_and_streams() {
    isolated("exit_codes_signals_and_streams", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("codes");
        // name, script, exit code, reason
        let cases = [
            ("zero", "exit 0", 0, "Completed"),
            ("seven", "echo to stdout; echo to stderr >&2; exit 7", 7, "Error"),
            ("killed", "kill -9 $$", 137, "Error"),
            ("terminated", "kill -15 $$", 143, "Error"),
        ];
        for (name, script, code, reason) in cases {
            // The shell is not PID 1 of the container, whom signals of its own namespace don't end.
            let id = crictl.create(&pod, "codes", name, BUSYBOX, &format!("sh -c '{script}'; exit $?"));
            crictl.run(&["start", &id]);
            let status = crictl.wait_exit(&id);
            assert_eq!(status["exitCode"], code, "{name}: {status}");
            assert_eq!(status["reason"], reason, "{name}: {status}");
            let time = |key: &str| status[key].as_str().unwrap_or_default().to_owned();
            assert!(time("createdAt") <= time("startedAt") && time("startedAt") <= time("finishedAt"), "{status}");
        }
        let log = read_log(&log_path(&node, "codes", "seven"));
        assert_eq!(stream_lines(&log, "stdout"), ["to stdout"]);
        assert_eq!(stream_lines(&log, "stderr"), ["to stderr"]);

        // Stopped from outside: a program that does not listen is killed when its time is up, at once with 0.
        for (name, timeout, script, code) in [
            ("deaf", "1", "trap '' TERM; while :; do sleep 0.1; done", 137),
            ("at-once", "0", "trap 'exit 5' TERM; while :; do sleep 0.1; done", 137),
            ("listens", "30", "trap 'exit 5' TERM; while :; do sleep 0.1; done", 5),
        ] {
            let script = format!("echo ready; {script}");
            let id = crictl.create(&pod, "codes", name, BUSYBOX, &script);
            crictl.run(&["start", &id]);
            wait_for("the container's first word", Duration::from_secs(20), || {
                (!read_log(&log_path(&node, "codes", name)).is_empty()).then_some(())
            });
            crictl.run(&["stop", "-t", timeout, &id]);
            assert_eq!(crictl.wait_exit(&id)["exitCode"], code, "{name}");
        }

        // A long line is cut into records with tag P, bytes are kept; output without a newline at its end is kept too.
        let id =
            crictl.create(&pod, "codes", "long", BUSYBOX, "head -c 50000 /dev/zero | tr '\\0' x; echo; printf end");
        crictl.run(&["start", &id]);
        crictl.wait_exit(&id);
        let log = read_log(&log_path(&node, "codes", "long"));
        assert_eq!(stream_lines(&log, "stdout"), ["x".repeat(50_000), "end".to_owned()]);
        assert!(log.iter().any(|l| !l.full), "no record with tag P");

        // Much output at the very end is all there.
        let id = crictl.create(&pod, "codes", "flood", BUSYBOX, "seq 1 20000");
        crictl.run(&["start", &id]);
        crictl.wait_exit(&id);
        let lines = stream_lines(&read_log(&log_path(&node, "codes", "flood")), "stdout");
        assert_eq!(lines, (1..=20_000).map(|n| n.to_string()).collect::<Vec<_>>());
    });
}

#[test]
fn containers_share_the_pods_processes_when_asked() {
    isolated("containers_share_the_pods_processes_when_asked", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        // crictl's own examples ask for nothing, which means the pod's PID namespace.
        let mut pod_config = pod_config("shared", &node.pod_logs("shared"));
        pod_config["linux"] = serde_json::json!({"cgroup_parent": "/tests"});
        let pod_file = crictl.file("pod-shared", &pod_config);
        let pod = crictl.run(&["runp", &pod_file]);
        let create = |name: &str, script: &str| {
            let mut config = container_config(name, BUSYBOX, script);
            config["linux"] = serde_json::json!({});
            crictl.run(&["create", "--no-pull", &pod, &crictl.file(name, &config), &pod_file])
        };
        let sleeper = create("sleeper", "exec sleep 4321");
        crictl.run(&["start", &sleeper]);
        let looker = create("looker", "ps -o pid,args; [ $$ != 1 ]");
        crictl.run(&["start", &looker]);
        assert_eq!(crictl.wait_exit(&looker)["exitCode"], 0);
        let seen = stream_lines(&read_log(&log_path(&node, "shared", "looker")), "stdout");
        assert!(seen.iter().any(|l| l.contains("sleep 4321")), "{seen:?}");
        crictl.run(&["stop", "-t", "1", &sleeper]);
        assert_eq!(crictl.wait_exit(&sleeper)["exitCode"], 143);
        assert_eq!(crictl.json(&["pods"])["items"][0]["state"], "SANDBOX_READY");
        crictl.run(&["stopp", &pod]);
        crictl.run(&["rmp", &pod]);
    });
}

#[test]
fn an_image_of_many_layers_is_whole() {
    isolated("an_image_of_many_layers_is_whole", || {
        let node = Node::start(Options::default());
        let crictl = node.crictl();
        crictl.run(&["pull", BIG]);
        let images = crictl.json(&["images"]);
        let size: u64 = images["images"][0]["size"].as_str().and_then(|s| s.parse().ok()).unwrap_or_default();
        assert!(size > 100_000_000, "{images}");
        let pod = crictl.run_pod("big");
        // Every file that must be there by its content, every one that must not be there by its absence, modes and links.
        let script = "pwd; echo $BIG; sha256sum -c -s /big/SHA256SUMS && echo all there; \
            while read f; do [ ! -e \"$f\" ] || echo \"there: $f\"; done < /big/ABSENT; \
            stat -c '%a %F' /big/set-uid /big/empty /big/third /big/folder-then-file /big/file-then-folder; \
            [ /big/first -ef /big/second ] && echo one file; ls -A /big/opaque; find / -xdev -name '.wh.*'; \
            echo written > /big/usr0/new && cat /big/usr0/new && echo again >> /big/first && cat /big/first";
        let id = crictl.create(&pod, "big", "check", BIG, script);
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
        let lines = stream_lines(&read_log(&log_path(&node, "big", "check")), "stdout");
        let expected = [
            "/big",
            "yes",
            "all there",
            "4755 regular file",
            "700 directory",
            "777 symbolic link",
            "644 regular file",
            "755 directory",
            "one file",
            "new",
            "written",
            "linked",
            "again",
        ];
        assert_eq!(lines, expected);

        // What one container writes the next one does not see.
        let id = crictl.create(&pod, "big", "second", BIG, "[ ! -e /big/usr0/new ] && cat /big/second");
        crictl.run(&["start", &id]);
        assert_eq!(crictl.wait_exit(&id)["exitCode"], 0);
        assert_eq!(stream_lines(&read_log(&log_path(&node, "big", "second")), "stdout"), ["linked"]);
        // A second pull has nothing to do.
        crictl.run(&["pull", BIG]);
        crictl.run(&["rmp", "-f", &pod]);
        crictl.run(&["rmi", "--all"]);
    });
}
