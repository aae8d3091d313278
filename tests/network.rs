//! Pod networks with the real CNI plugins of the system, and with small hostile ones.
//!
//! Each test runs on a thread with mount, network, IPC and UTS namespaces of its own: bridges, iptables rules, pins and
//! leases vanish with that thread, whether the test passes or not, and the host's network is never touched.
#![allow(unsafe_code)] // unshare(2) for the test's thread
#![allow(missing_docs)]
#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking, too

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use proxmox_lxcri::core::error::Kind;
use proxmox_lxcri::core::ids::PodId;
use proxmox_lxcri::core::ports::{NetworkRequest, PodNetwork};
use proxmox_lxcri::core::spec::{PortMapping, Protocol};
use proxmox_lxcri::integrations::cni::{BRIDGE, Cni, CniConfig, DEFAULT_SUBNET, embedded_conflist};
use proxmox_lxcri::integrations::netns::{NamespacePins, Wanted, in_netns};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

const PLUGINS: &str = "/usr/lib/cni";

/// A world of its own: /run and /var/lib are empty, the only interface is `lo`, which is up.
struct World {
    dir: Utf8PathBuf,
    pins: NamespacePins,
}

fn in_world<F: Future<Output = ()>>(body: impl FnOnce(World) -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        let all = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        // SAFETY: the descriptor table stays shared.
        unsafe { rustix::thread::unshare_unsafe(all) }.unwrap();
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        for folder in ["/run", "/var/lib"] {
            rustix::mount::mount("test", folder, "tmpfs", MountFlags::empty(), None).unwrap();
        }
        let dir = Utf8PathBuf::from("/run/lxcri");
        for folder in ["conf", "plugins"] {
            std::fs::create_dir_all(dir.join(folder)).unwrap();
        }
        let pins = NamespacePins::new("/run/netns", &dir);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(body(World { dir, pins }));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

impl World {
    fn config(&self) -> CniConfig {
        CniConfig {
            conf_dirs: vec![self.dir.join("conf")],
            plugin_dirs: vec![self.dir.join("plugins"), PLUGINS.into()],
            plugin_timeout: Duration::from_secs(20),
            ..CniConfig::new(self.dir.join("cache"))
        }
    }

    fn cni(&self) -> Arc<Cni> {
        Cni::new(self.config())
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.join(name);
        let temporary = self.dir.join("new");
        let mut file = std::fs::File::create(&temporary).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(0o755)).unwrap();
        drop(file);
        std::fs::rename(temporary, path).unwrap();
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.join(name)).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    /// Attachments and what else there is; a result counts with its attachment, without which there must be none.
    fn cached(&self) -> usize {
        let files: Vec<_> =
            std::fs::read_dir(self.dir.join("cache")).into_iter().flatten().map(|f| f.unwrap().path()).collect();
        let (results, others): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|f| f.extension().is_some_and(|e| e == "result"));
        assert_eq!(results.iter().find(|r| !r.with_extension("json").try_exists().unwrap()), None);
        others.len()
    }

    /// A plugin that logs each call and does what files beside it say: `NAME.fail-VERB`, `NAME.hang-VERB` and
    /// `NAME.say-VERB` (its output).
    fn fake(&self, name: &str) {
        let script = r#"#!/bin/sh
d=/run/lxcri/plugins n=${0##*/} v=$CNI_COMMAND hang=0
# Before the log: a test that has seen a call there may take the file away.
[ -e $d/$n.hang-$v ] && hang=1
printf '%s %s netns=%s if=%s args=%s\n' "$n" "$v" "$CNI_NETNS" "$CNI_IFNAME" "$CNI_ARGS" >> $d/log
cat > $d/$n.$v.in
[ $hang = 1 ] && sleep 100
[ -e $d/$n.fail-$v ] && { cat $d/$n.fail-$v; echo "stderr of $n" >&2; exit 1; }
[ -e $d/$n.say-$v ] && { cat $d/$n.say-$v; exit 0; }
[ $v = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}]}'
exit 0
"#;
        self.write(&format!("plugins/{name}"), script);
    }

    /// Calls of the fake plugins since the last look: "a ADD, b ADD".
    fn calls(&self) -> String {
        let log = self.read("plugins/log");
        let _ = std::fs::remove_file(self.dir.join("plugins/log"));
        log.lines().map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
    }

    /// A chain of fake plugins.
    fn chain(&self, version: &str, plugins: &[&str]) {
        let list: Vec<String> = plugins.iter().map(|p| format!(r#"{{"type":"{p}"}}"#)).collect();
        let text = format!(r#"{{"cniVersion":"{version}","name":"fake","plugins":[{}]}}"#, list.join(","));
        self.write("conf/10-fake.conflist", &text);
        plugins.iter().for_each(|p| self.fake(p));
    }

    async fn pod(&self) -> NetworkRequest {
        let pod = PodId::new();
        let wanted = Wanted { net: true, ..Wanted::default() };
        let netns = self.pins.create(&pod, wanted).await.unwrap().net.unwrap();
        NetworkRequest {
            pod,
            name: "web".into(),
            namespace: "default".into(),
            uid: "u-1".into(),
            netns,
            port_mappings: Vec::new(),
            ingress_bps: 0,
            egress_bps: 0,
            dns: None,
            cgroup_path: String::new(),
        }
    }
}

fn leases(folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.retain(|n| n.parse::<IpAddr>().is_ok());
    names.sort();
    names
}

/// Says "hi" to the first caller of `port` inside the pod.
async fn greeter(netns: &Utf8Path, address: IpAddr, port: u16) -> std::thread::JoinHandle<()> {
    let listener = in_netns(netns, move || TcpListener::bind((address, port)).unwrap()).await.unwrap();
    std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"hi").unwrap())
}

fn greeting(to: impl std::net::ToSocketAddrs) -> String {
    let to = to.to_socket_addrs().unwrap().next().unwrap();
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_embedded_network_connects_pods_and_host_ports() {
    in_world(|world| async move {
        let text = embedded_conflist(&[PLUGINS.into()], DEFAULT_SUBNET).unwrap();
        assert!(text.contains("portmap"), "{text}");
        let cni = Cni::new(CniConfig { embedded: Some(text), ..world.config() });
        cni.status().await.unwrap();
        let mut one = world.pod().await;
        one.port_mappings =
            vec![PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: 18080, host_ip: None }];
        let two = world.pod().await;
        let (ip_one, ip_two) = tokio::join!(cni.add(&one), cni.add(&two));
        let (ip_one, ip_two) = (ip_one.unwrap().ips, ip_two.unwrap().ips);
        assert!(ip_one.len() == 1 && ip_two.len() == 1 && ip_one != ip_two, "{ip_one:?} {ip_two:?}");
        assert!(ip_one[0].to_string().starts_with("10.213."), "{ip_one:?}");

        // From the host, from the other pod, and through the host port.
        let gateway: IpAddr = "10.213.0.1".parse().unwrap();
        let here = greeter(&one.netns, ip_one[0], 80).await;
        assert_eq!(greeting((ip_one[0], 80)), "hi");
        here.join().unwrap();
        let here = greeter(&one.netns, ip_one[0], 80).await;
        let target = ip_one[0];
        assert_eq!(in_netns(&two.netns, move || greeting((target, 80))).await.unwrap(), "hi");
        here.join().unwrap();
        let here = greeter(&one.netns, ip_one[0], 80).await;
        assert_eq!(greeting((gateway, 18080)), "hi");
        here.join().unwrap();

        cni.check(&one).await.unwrap();
        // Again, and from another daemon: the same address, nothing new.
        assert_eq!(cni.add(&one).await.unwrap().ips, ip_one);
        let next = Cni::new(CniConfig { embedded: None, ..world.config() });
        assert_eq!(next.add(&one).await.unwrap().ips, ip_one);
        assert_eq!(leases("/var/lib/cni/networks/lxcri").len(), 2);
        // That daemon has no configuration any more; the attachment brings its own.
        next.del(&one).await.unwrap();
        next.del(&one).await.unwrap();
        assert!(cni.check(&one).await.is_err());
        assert_eq!(leases("/var/lib/cni/networks/lxcri"), [ip_two[0].to_string()]);
        assert!(TcpStream::connect_timeout(&(gateway, 18080).into(), Duration::from_millis(500)).is_err());

        // The second pod's namespace is gone before DEL: the lease is freed all the same.
        world.pins.unpin(&two.pod).await.unwrap();
        cni.del(&two).await.unwrap();
        assert_eq!((leases("/var/lib/cni/networks/lxcri").len(), world.cached()), (0, 0));
        world.pins.unpin(&one.pod).await.unwrap();
        assert!(std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains(BRIDGE));
    });
}

#[test]
fn dual_stack_in_every_version() {
    in_world(|world| async move {
        for (version, bridge) in [("0.3.1", "br3"), ("0.4.0", "br4"), ("1.0.0", "br1")] {
            let text = format!(
                r#"{{"cniVersion":"{version}","name":"dual{bridge}","type":"bridge","bridge":"{bridge}","isGateway":true,
                "ipam":{{"type":"host-local","ranges":[[{{"subnet":"10.9.0.0/24"}}],[{{"subnet":"fd00:9::/64"}}]]}}}}"#
            );
            world.write("conf/10-dual.conf", &text);
            let cni = world.cni();
            let pod = world.pod().await;
            let ips: Vec<String> = cni.add(&pod).await.unwrap().ips.iter().map(IpAddr::to_string).collect();
            assert_eq!(ips, ["10.9.0.2", "fd00:9::2"], "{version}");
            cni.check(&pod).await.unwrap();
            assert_eq!(leases(&format!("/var/lib/cni/networks/dual{bridge}")).len(), 2);
            cni.del(&pod).await.unwrap();
            assert_eq!(leases(&format!("/var/lib/cni/networks/dual{bridge}")).len(), 0);
            world.pins.unpin(&pod.pod).await.unwrap();
        }
    });
}

#[test]
fn leases_of_dead_pods_are_freed_by_gc() {
    in_world(|world| async move {
        let text = embedded_conflist(&[PLUGINS.into()], "10.7.0.0/29").unwrap();
        let config = CniConfig { embedded: Some(text), ..world.config() };
        let (alive, dead, netns_gone) = (world.pod().await, world.pod().await, world.pod().await);
        let old = Cni::new(config.clone());
        for pod in [&alive, &dead, &netns_gone] {
            old.add(pod).await.unwrap();
        }
        // Connected by this process: not to be touched, whatever the list says.
        old.gc(&[]).await.unwrap();
        assert_eq!(world.cached(), 3);
        world.pins.unpin(&netns_gone.pod).await.unwrap();
        world.write("cache/notes.txt", "not ours");
        world.write("cache/.tmp-1-1-x", "half a write");
        let broken = PodId::new();
        world.write(&format!("cache/{broken}.json"), "{");
        // What a power loss may leave: half a result, and one whose pod is gone.
        world.write(&format!("cache/{}.result", dead.pod), "{");
        world.write(&format!("cache/{}.result", PodId::new()), "{}");
        let next = Cni::new(config);
        next.gc(std::slice::from_ref(&alive.pod)).await.unwrap();
        next.gc(std::slice::from_ref(&alive.pod)).await.unwrap();
        assert_eq!(leases("/var/lib/cni/networks/lxcri").len(), 1);
        next.check(&alive).await.unwrap();
        assert_eq!(next.check(&dead).await.unwrap_err().kind(), Kind::FailedPrecondition);
        assert_eq!(world.cached(), 3, "alive, notes, and the broken one moved aside");
        assert_eq!(world.read(&format!("cache/{broken}.json.bad")), "{");
        // A subnet of six addresses is not used up by pods that come and go.
        for _ in 0..8 {
            let pod = world.pod().await;
            next.add(&pod).await.unwrap();
            next.del(&pod).await.unwrap();
            world.pins.unpin(&pod.pod).await.unwrap();
        }
    });
}

#[test]
fn a_failing_add_is_taken_back_and_named() {
    in_world(|world| async move {
        world.chain("1.0.0", &["first", "second"]);
        let cni = world.cni();
        let pod = world.pod().await;
        world.write(
            "plugins/second.fail-ADD",
            r#"{"cniVersion":"1.0.0","code":999,"msg":"no luck","details":"at all"}"#,
        );
        let e = cni.add(&pod).await.unwrap_err();
        assert_eq!(e.chain(), r#"network "fake": ADD of plugin "second" failed: no luck; at all"#);
        assert_eq!((world.calls().as_str(), world.cached()), ("first ADD, second ADD, second DEL, first DEL", 0));

        world.write("plugins/second.fail-ADD", r#"{"code":11,"msg":"later"}"#);
        assert_eq!(cni.add(&pod).await.unwrap_err().kind(), Kind::Unavailable);
        // Words that are no JSON: the status and standard error are shown.
        world.write("plugins/second.fail-ADD", "panic");
        let e = cni.add(&pod).await.unwrap_err().chain();
        assert!(e.contains("exit status: 1") && e.contains("stderr of second"), "{e}");
        world.remove("plugins/second.fail-ADD");

        world.write("plugins/second.say-ADD", "Segmentation fault");
        let e = cni.add(&pod).await.unwrap_err().chain();
        assert!(e.contains(r#"plugin "second" succeeded but its result can't be used: not JSON"#), "{e}");
        world.write("plugins/second.say-ADD", "{}");
        let e = cni.add(&pod).await.unwrap_err().chain();
        assert_eq!(e, r#"network "fake" gave the pod no address"#);
        world.calls();

        // Taking back fails, too: everything was asked, and the attachment is kept for later.
        world.write("plugins/second.fail-DEL", r#"{"code":100,"msg":"busy"}"#);
        assert!(cni.add(&pod).await.unwrap_err().chain().contains("no address"));
        assert_eq!((world.calls().as_str(), world.cached()), ("first ADD, second ADD, second DEL, first DEL", 1));
        assert!(cni.del(&pod).await.unwrap_err().chain().contains("busy"));
        assert_eq!(world.calls(), "second DEL", "what points to the address goes first");
        assert!(cni.gc(&[]).await.unwrap_err().chain().contains("busy"));
        world.calls();
        world.remove("plugins/second.fail-DEL");
        cni.gc(&[]).await.unwrap();
        assert_eq!((world.calls().as_str(), world.cached()), ("second DEL, first DEL", 0));

        // Not even started: the program is gone.
        world.remove("plugins/first");
        let e = cni.add(&pod).await.unwrap_err();
        assert!(e.kind() == Kind::Unavailable && e.chain().contains(r#"no plugin "first""#), "{e:?}");
    });
}

#[test]
fn a_hanging_plugin_is_killed() {
    in_world(|world| async move {
        world.chain("1.0.0", &["slow"]);
        let cni = Cni::new(CniConfig { plugin_timeout: Duration::from_millis(300), ..world.config() });
        let pod = world.pod().await;
        world.write("plugins/slow.hang-ADD", "");
        let start = Instant::now();
        let e = cni.add(&pod).await.unwrap_err();
        assert!(e.kind() == Kind::DeadlineExceeded && e.chain().contains(r#"plugin "slow""#), "{e:?}");
        assert!(start.elapsed() < Duration::from_secs(10));
        assert_eq!((world.calls().as_str(), world.cached()), ("slow ADD, slow DEL", 0));

        // A caller that goes away in the middle leaves an attachment that the next one takes back first.
        let cni = world.cni();
        tokio::select! {
            r = cni.add(&pod) => panic!("{r:?}"),
            () = async { while world.read("plugins/log").is_empty() { tokio::task::yield_now().await } } => {}
        }
        assert_eq!(world.cached(), 1);
        world.remove("plugins/slow.hang-ADD");
        cni.add(&pod).await.unwrap();
        assert_eq!(world.calls(), "slow ADD, slow DEL, slow ADD");
    });
}

#[test]
fn every_verb_that_hangs_is_killed_and_holds_up_no_other_pod() {
    in_world(|world| async move {
        world.chain("1.1.0", &["one"]);
        world.write("plugins/one.say-ADD", r#"{"cniVersion":"1.1.0","ips":[{"address":"10.1.2.3/24"}]}"#);
        let short = Cni::new(CniConfig { plugin_timeout: Duration::from_millis(300), ..world.config() });
        let pod = world.pod().await;
        short.add(&pod).await.unwrap();
        for verb in ["STATUS", "CHECK", "GC", "DEL"] {
            world.write(&format!("plugins/one.hang-{verb}"), "");
            let begun = Instant::now();
            let said = match verb {
                "STATUS" => short.status().await.unwrap_err().message,
                "CHECK" => short.check(&pod).await.unwrap_err().chain(),
                "GC" => short.gc(&[]).await.unwrap_err().chain(),
                _ => short.del(&pod).await.unwrap_err().chain(),
            };
            assert!(said.contains(&format!("{verb} of plugin \"one\"")) && said.contains("killed"), "{said}");
            assert!(begun.elapsed() < Duration::from_secs(10), "{verb}: {:?}", begun.elapsed());
            world.remove(&format!("plugins/one.hang-{verb}"));
        }
        short.del(&pod).await.unwrap();
        world.calls();

        // Pods do not wait for a GC that hangs.
        let cni = world.cni();
        world.write("plugins/one.hang-GC", "");
        let begun = Instant::now();
        let (gc, added) = tokio::join!(cni.gc(&[]), async {
            while !world.read("plugins/log").contains("one GC") {
                tokio::task::yield_now().await;
            }
            cni.add(&pod).await
        });
        added.unwrap();
        assert_eq!(gc.unwrap_err().kind(), Kind::Aborted);
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
        world.remove("plugins/one.hang-GC");

        // Nor for an ADD of another pod that a GC waits for.
        let (slow, other) = (world.pod().await, world.pod().await);
        world.calls();
        world.write("plugins/one.hang-ADD", "");
        let mut hung = std::pin::pin!(cni.add(&slow));
        tokio::select! {
            r = &mut hung => panic!("{r:?}"),
            () = async { while world.read("plugins/log").is_empty() { tokio::task::yield_now().await } } => {}
        }
        world.remove("plugins/one.hang-ADD");
        let begun = Instant::now();
        tokio::select! {
            biased;
            r = &mut hung => panic!("{r:?}"),
            r = cni.gc(&[]) => panic!("{r:?}"),
            added = async {
                tokio::time::sleep(Duration::from_millis(500)).await; // until GC looks for a moment without an ADD
                cni.add(&other).await
            } => drop(added.unwrap()),
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    });
}

#[test]
fn del_uses_what_add_used_and_ends_when_the_namespace_is_gone() {
    in_world(|world| async move {
        world.chain("0.4.0", &["old"]);
        let cni = world.cni();
        let pod = world.pod().await;
        cni.add(&pod).await.unwrap();
        let log = world.read("plugins/log");
        let id = &pod.pod;
        let args = format!(
            "args=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID=u-1"
        );
        assert!(log.contains(&args) && log.contains("if=eth0") && log.contains(pod.netns.as_str()), "{log}");

        world.chain("1.0.0", &["new"]);
        world.calls();
        cni.check(&pod).await.unwrap();
        world.write("plugins/old.fail-DEL", r#"{"code":100,"msg":"busy"}"#);
        assert!(cni.del(&pod).await.is_err());
        let input: serde_json::Value = serde_json::from_str(&world.read("plugins/old.DEL.in")).unwrap();
        assert_eq!((&input["cniVersion"], &input["prevResult"]["ips"][0]["version"]), (&"0.4.0".into(), &"4".into()));
        assert_eq!(world.calls(), "old CHECK, old DEL");

        // The namespace is gone: the pod may end, and what is left is tried again by garbage collection.
        world.pins.unpin(&pod.pod).await.unwrap();
        cni.del(&pod).await.unwrap();
        assert!(world.read("plugins/log").contains("old DEL netns= "));
        assert_eq!(world.cached(), 1);
        world.remove("plugins/old.fail-DEL");
        cni.gc(&[]).await.unwrap();
        assert_eq!(world.cached(), 0);
        world.calls();

        // No attachment: the present configuration, and no failure.
        world.write("plugins/new.fail-DEL", "");
        cni.del(&pod).await.unwrap();
        assert_eq!(world.calls(), "new DEL");
        let e = cni.add(&pod).await.unwrap_err();
        assert_eq!((e.kind(), world.calls().as_str()), (Kind::FailedPrecondition, ""));
        // An older version has neither CHECK nor a previous result in DEL.
        world.chain("0.3.1", &["older"]);
        let pod = world.pod().await;
        cni.add(&pod).await.unwrap();
        cni.check(&pod).await.unwrap();
        cni.del(&pod).await.unwrap();
        assert_eq!(world.calls(), "older ADD, older DEL");
        assert!(!world.read("plugins/older.DEL.in").contains("prevResult"));
    });
}

#[test]
fn status_follows_files_plugins_and_what_they_say() {
    in_world(|world| async move {
        let cni = world.cni();
        let e = cni.status().await.unwrap_err();
        assert_eq!(
            (e.reason.as_str(), e.message.as_str()),
            ("NetworkPluginNotReady", "no CNI configuration in /run/lxcri/conf")
        );
        let pod = world.pod().await;
        assert_eq!(cni.add(&pod).await.unwrap_err().kind(), Kind::Unavailable);
        cni.del(&pod).await.unwrap();
        world.write("conf/05-bad.conflist", "{");
        let e = cni.status().await.unwrap_err().message;
        assert!(e.contains("05-bad.conflist: not JSON"), "{e}");
        world.chain("1.0.0", &["one"]);
        cni.status().await.unwrap();
        world.remove("plugins/one");
        let e = cni.status().await.unwrap_err().message;
        assert!(e.contains(r#"no plugin "one" in /run/lxcri/plugins, /usr/lib/cni"#), "{e}");
        assert_eq!(world.calls(), "");

        // From 1.1.0 on plugins are asked, but not at every call.
        world.chain("1.1.0", &["one", "two"]);
        world.write("plugins/two.fail-STATUS", r#"{"code":50,"msg":"no daemon"}"#);
        let e = cni.status().await.unwrap_err().message;
        assert!(e.contains("no daemon"), "{e}");
        world.remove("plugins/two.fail-STATUS");
        for _ in 0..3 {
            cni.status().await.unwrap();
        }
        assert_eq!(world.calls(), "one STATUS, two STATUS, one STATUS, two STATUS");

        // GC tells plugins who is alive, pods connected since the list was made included.
        let other = PodId::new();
        world.write("plugins/one.say-ADD", r#"{"cniVersion":"1.1.0","ips":[{"address":"10.1.2.3/24"}]}"#);
        cni.add(&pod).await.unwrap();
        world.calls();
        cni.gc(std::slice::from_ref(&other)).await.unwrap();
        assert_eq!(world.calls(), "one GC, two GC");
        let input: serde_json::Value = serde_json::from_str(&world.read("plugins/two.GC.in")).unwrap();
        let mut valid: Vec<_> = input["cni.dev/valid-attachments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|a| a["containerID"].as_str().unwrap().to_owned())
            .collect();
        valid.sort();
        let mut expected = [other.to_string(), pod.pod.to_string()];
        expected.sort();
        assert_eq!(valid, expected);
    });
}
