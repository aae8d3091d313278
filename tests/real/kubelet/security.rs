//! securityContext, sysctls, namespaces shared with pods and node.

use serde_json::{Value, json};

use super::ctx::{BUSYBOX, Ctx, LONG, container, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("security_context_users_and_groups", users),
    ("security_context_capabilities_and_privileges", privileges),
    ("seccomp_profiles", seccomp),
    ("sysctls", sysctls),
    ("shared_namespaces_and_host_names", namespaces),
    ("user_namespaces", user_namespaces),
];

fn secured(name: &str, script: &str, context: Value) -> Value {
    let c = with(shell("c", script), json!({"securityContext": context}));
    pod_with(name, json!({"containers": [c]}))
}

fn users(ctx: &Ctx) {
    let spec = json!({
        "securityContext": {"runAsUser": 1234, "runAsGroup": 2345, "supplementalGroups": [3456], "fsGroup": 4567, "runAsNonRoot": true, "supplementalGroupsPolicy": "Strict"},
        "containers": [shell("c", "sleep 1000"), with(shell("own", "sleep 1000"), json!({"securityContext": {"runAsUser": 99}}))],
    });
    ctx.apply(&[
        pod_with("p", spec),
        pod_with("root-refused", json!({"securityContext": {"runAsNonRoot": true}, "containers": [shell("c", "sleep 1000")]})),
        pod_with("from-image", json!({"containers": [{"name": "c", "image": "registry.k8s.io/k8s-staging-cri-tools/test-image-user-uid-group:latest", "command": ["sleep", "1000"]}]})),
    ]);
    let p = ctx.ready("p");
    assert_eq!(ctx.exec("p -c c", "id -u; id -g; id -G"), "1234\n2345\n2345 3456 4567");
    assert_eq!(ctx.exec("p -c own", "id -u; id -g"), "99\n2345");
    let user = &container(&p, "c")["user"]["linux"];
    assert_eq!((&user["uid"], &user["gid"]), (&json!(1234), &json!(2345)), "{user}");
    ctx.ready("from-image");
    // The kubelet hands the image's user on as a number, without its group.
    assert_eq!(ctx.exec("from-image", "id -u"), "1003");
    let refused = ctx.wait_pod("root-refused", "refused", |p| {
        container(p, "c")["state"]["waiting"]["reason"] == "CreateContainerConfigError"
    });
    assert!(
        container(&refused, "c")["state"]["waiting"]["message"].as_str().is_some_and(|m| m.contains("runAsNonRoot")),
        "{refused}"
    );
}

fn privileges(ctx: &Ctx) {
    ctx.apply(&[
        secured("caps", "sleep 1000", json!({"capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]}})),
        secured("no-new", "sleep 1000", json!({"allowPrivilegeEscalation": false})),
        secured("read-only", "sleep 1000", json!({"readOnlyRootFilesystem": true})),
        secured("privileged", "sleep 1000", json!({"privileged": true})),
        secured("plain", "sleep 1000", json!({})),
    ]);
    ["caps", "no-new", "read-only", "privileged", "plain"].iter().for_each(|p| drop(ctx.ready(p)));
    // CAP_NET_ADMIN is number 12.
    assert_eq!(ctx.exec("caps", "grep CapEff /proc/1/status"), "CapEff:\t0000000000001000");
    assert_eq!(ctx.exec("no-new", "grep NoNewPrivs /proc/1/status"), "NoNewPrivs:\t1");
    assert_eq!(ctx.exec("plain", "grep NoNewPrivs /proc/1/status"), "NoNewPrivs:\t0");
    assert_eq!(ctx.exec("read-only", "touch /x 2> /dev/null || echo ro"), "ro");
    assert_eq!(
        ctx.exec("privileged", "mkdir /m; mount -t tmpfs t /m && echo mounted; ls /dev | wc -l").lines().next(),
        Some("mounted")
    );
    assert_eq!(ctx.exec("plain", "mkdir /m; mount -t tmpfs t /m 2> /dev/null || echo refused; echo x > /proc/sysrq-trigger 2> /dev/null || echo ro"), "refused\nro");
}

fn seccomp(ctx: &Ctx) {
    let dir = ctx.cluster.nodes()[0].dir.join("kubelet/seccomp");
    std::fs::create_dir_all(&dir).expect("the kubelet's folder of profiles");
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]});
    std::fs::write(dir.join("no-mkdir.json"), profile.to_string()).expect("a profile");
    let of = |name: &str, profile: Value| secured(name, "sleep 1000", json!({"seccompProfile": profile}));
    ctx.apply(&[
        of("default", json!({"type": "RuntimeDefault"})),
        of("unconfined", json!({"type": "Unconfined"})),
        of("local", json!({"type": "Localhost", "localhostProfile": "no-mkdir.json"})),
        of("missing", json!({"type": "Localhost", "localhostProfile": "no-such.json"})),
    ]);
    ["default", "unconfined", "local"].iter().for_each(|p| drop(ctx.ready(p)));
    let mode = |p: &str| ctx.exec(p, "grep Seccomp: /proc/1/status");
    assert_eq!((mode("default"), mode("unconfined")), ("Seccomp:\t2".into(), "Seccomp:\t0".into()));
    assert_eq!(
        ctx.exec("local", "mkdir /x 2>&1 || true"),
        "mkdir: can't create directory '/x': Operation not supported"
    );
    ctx.wait_pod("missing", "an error", |p| {
        container(p, "c")["state"]["waiting"]["reason"].as_str().is_some_and(|r| r.contains("Create"))
    });
}

fn sysctls(ctx: &Ctx) {
    let of = |name: &str, key: &str, value: &str| {
        pod_with(
            name,
            json!({"restartPolicy": "Never", "securityContext": {"sysctls": [{"name": key, "value": value}]}, "containers": [shell("c", "sleep 1000")]}),
        )
    };
    ctx.apply(&[
        of("safe", "net.ipv4.ip_local_port_range", "20000 30000"),
        of("unsafe", "net.core.somaxconn", "77"),
        of("allowed", "kernel.msgmax", "4242"),
    ]);
    ctx.ready("safe");
    assert_eq!(ctx.exec("safe", "cat /proc/sys/net/ipv4/ip_local_port_range"), "20000\t30000");
    ctx.wait_pod("unsafe", "refused by the kubelet", |p| p["status"]["reason"] == "SysctlForbidden");
    ctx.ready("allowed");
    assert_eq!(ctx.exec("allowed", "cat /proc/sys/kernel/msgmax"), "4242");
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/msgmax").expect("the node's").trim(), "4242");
}

fn namespaces(ctx: &Ctx) {
    let two = || json!([shell("a", "sleep 11111"), shell("b", "sleep 22222")]);
    ctx.apply(&[
        pod_with("shared", json!({"shareProcessNamespace": true, "containers": two()})),
        pod_with("apart", json!({"containers": two()})),
        pod_with("host-pid", json!({"hostPID": true, "hostIPC": true, "containers": [shell("c", "sleep 33333")]})),
        pod_with("named", json!({"hostname": "box", "subdomain": "sub", "hostAliases": [{"ip": "192.0.2.77", "hostnames": ["friend"]}],
            "dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.53"], "searches": ["x.test"], "options": [{"name": "ndots", "value": "3"}]},
            "containers": [{"name": "c", "image": BUSYBOX, "command": ["sleep", "1000"], "workingDir": "/var", "tty": true, "stdin": true}]})),
    ]);
    ["shared", "apart", "host-pid", "named"].iter().for_each(|p| drop(ctx.ready(p)));
    assert!(ctx.exec("shared -c a", "ps").contains("sleep 22222"));
    assert!(!ctx.exec("apart -c a", "ps").contains("sleep 22222"));
    // Both containers of a pod share its IPC and network namespaces and its host name.
    let of = |pod: &str| ctx.exec(pod, "for n in ipc net uts; do readlink /proc/self/ns/$n; done");
    assert_eq!(of("apart -c a"), of("apart -c b"));
    assert!(ctx.exec("host-pid", "ps").contains("kubelet"), "does not see the node's processes");
    let ipc = std::fs::read_link("/proc/self/ns/ipc").expect("the node's");
    assert_eq!(ctx.exec("host-pid", "readlink /proc/self/ns/ipc"), ipc.to_string_lossy());
    assert_eq!(
        ctx.exec("named", "hostname; pwd; grep -c friend /etc/hosts; grep box /etc/hosts | wc -w"),
        "box\n/var\n1\n3"
    );
    assert_eq!(ctx.exec("named", "cat /etc/resolv.conf"), "search x.test\nnameserver 192.0.2.53\noptions ndots:3");
    // In a shared PID namespace, an ended container is one that has ended, and the pod goes on.
    // Its own container ends with it, and may take this exec along before that has said so.
    ctx.output(&["exec", "shared", "-c", "a", "--", "killall", "-9", "sleep"]);
    ctx.wait("both containers to run again", LONG, || {
        let p = ctx.pod("shared");
        (container(&p, "a")["restartCount"] == 1 && super::ctx::is_ready(&p)).then_some(())
    });
}

/// Root in the pod is nobody on the node; volumes are the pod's own all the same.
fn user_namespaces(ctx: &Ctx) {
    let c = |script: &str| {
        with(
            shell("c", script),
            json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "cm", "mountPath": "/cm"}]}),
        )
    };
    let volumes = json!([{"name": "v", "emptyDir": {}}, {"name": "cm", "configMap": {"name": "cm"}}]);
    ctx.apply(&[json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"k": "value"}})]);
    ctx.apply(&[
        pod_with(
            "one",
            json!({"hostUsers": false, "containers": [c("echo mine > /v/f; sleep 44444")], "volumes": volumes}),
        ),
        pod_with("two", json!({"hostUsers": false, "containers": [c("sleep 1000")], "volumes": volumes})),
    ]);
    ctx.ready("one");
    ctx.ready("two");
    let map = |p: &str| -> Vec<u64> {
        let text = ctx.exec(p, "cat /proc/self/uid_map");
        text.split_whitespace().map(|n| n.parse().expect("a number")).collect()
    };
    let (one, two) = (map("one"), map("two"));
    assert_eq!((one[0], one[2], one[1] % 65536), (0, 65536, 0), "{one:?}");
    assert_ne!(one[1], two[1], "two pods have the same ids");
    assert_eq!(ctx.exec("one", "id -u; stat -c %u /v/f; cat /v/f /cm/k; stat -L -c %u /cm/k"), "0\n0\nmine\nvalue0");
    let owner = std::fs::read_dir("/proc").expect("/proc").flatten().find_map(|e| {
        use std::os::unix::fs::MetadataExt;
        let line = std::fs::read_to_string(e.path().join("cmdline")).ok()?;
        (line == "sleep\0".to_owned() + "44444\0").then(|| e.metadata().ok().map(|m| u64::from(m.uid())))?
    });
    assert_eq!(owner, Some(one[1]), "the owner of the pod's process on the node");
    assert_eq!(ctx.exec("one", "hostname pwned 2> /dev/null; mount -t tmpfs t /mnt 2> /dev/null; echo $?"), "1");
}
