//! Volumes of all kinds, and what is seen when they change.

use serde_json::{Value, json};

use super::ctx::{BUSYBOX, Ctx, LONG, PODTOOL, container, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("config_map_secret_projected_with_updates", config_and_secret),
    ("downward_api", downward),
    ("empty_dir", empty_dir),
    ("host_path", host_path),
    ("local_persistent_volume", local_pv),
    ("image_volume", image_volume),
];

fn mounts(of: &[(&str, &str)]) -> Value {
    json!({"volumeMounts": of.iter().map(|(name, path)| json!({"name": name, "mountPath": path})).collect::<Vec<_>>()})
}

fn config_and_secret(ctx: &Ctx) {
    ctx.apply(&[
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm"}, "data": {"a": "one", "b": "two"}}),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"password": "hush"}}),
    ]);
    let c = with(
        shell("c", "sleep 1000"),
        json!({
            "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "a"}}}],
            "envFrom": [{"secretRef": {"name": "s"}}],
            "volumeMounts": [
                {"name": "cm", "mountPath": "/cm"}, {"name": "s", "mountPath": "/s", "readOnly": true},
                {"name": "all", "mountPath": "/all"}, {"name": "cm", "mountPath": "/one-file", "subPath": "a"},
            ],
        }),
    );
    let all = json!({"sources": [
        {"configMap": {"name": "cm", "items": [{"key": "b", "path": "sub/b"}]}}, {"secret": {"name": "s"}},
        {"serviceAccountToken": {"path": "token", "audience": "somebody"}},
    ]});
    let spec = json!({"securityContext": {"fsGroup": 2345}, "containers": [c], "volumes": [
        {"name": "cm", "configMap": {"name": "cm"}}, {"name": "s", "secret": {"secretName": "s", "defaultMode": 0o400}},
        {"name": "all", "projected": all}]});
    ctx.apply(&[pod_with("p", spec)]);
    ctx.ready("p");
    let said = ctx.exec("p", "echo $A $password; cat /cm/a; echo; cat /s/password; echo; cat /all/sub/b; echo; wc -c < /all/token; cat /one-file; echo; stat -L -c '%a %g' /s/password; ls /var/run/secrets/kubernetes.io/serviceaccount; touch /s/x 2> /dev/null || echo read-only");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(&lines[..4], ["one hush", "one", "hush", "two"], "{said}");
    assert!(lines[4].parse::<usize>().is_ok_and(|n| n > 500), "no token: {said}");
    assert_eq!(&lines[5..], ["one", "440 2345", "ca.crt", "namespace", "token", "read-only"], "{said}");
    ctx.kubectl(&["patch", "configmap", "cm", "-p", r#"{"data":{"a":"three"}}"#]);
    ctx.kubectl(&["patch", "secret", "s", "-p", r#"{"stringData":{"password":"whisper"}}"#]);
    ctx.wait("the new values", LONG, || {
        let now = ctx.exec("p", "cat /cm/a; echo; cat /s/password; echo; cat /all/password; echo; cat /one-file");
        // A sub-path is bound once and does not follow.
        (now == "three\nwhisper\nwhisper\none").then_some(())
    });
    assert_eq!(container(&ctx.pod("p"), "c")["restartCount"], 0);
    // Demanded and absent: the pod waits; optional: it does not.
    ctx.apply(&[
        pod_with("waits", json!({"containers": [with(shell("c", "sleep 1000"), mounts(&[("v", "/v")]))], "volumes": [{"name": "v", "configMap": {"name": "later"}}]})),
        pod_with("optional", json!({"containers": [with(shell("c", "sleep 1000"), mounts(&[("v", "/v")]))], "volumes": [{"name": "v", "configMap": {"name": "never", "optional": true}}]})),
    ]);
    ctx.ready("optional");
    assert_eq!(ctx.pod("waits")["status"]["phase"], "Pending");
    ctx.apply(&[json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later"}, "data": {"k": "v"}})]);
    ctx.ready("waits");
}

fn downward(ctx: &Ctx) {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let c = with(
        shell("c", "sleep 1000"),
        json!({
            "resources": {"limits": {"memory": "64Mi", "cpu": "250m"}},
            "env": [field("NAME", "metadata.name"), field("NS", "metadata.namespace"), field("IP", "status.podIP"),
                field("NODE", "spec.nodeName"), field("HOST", "status.hostIP"),
                {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}}],
            "volumeMounts": [{"name": "d", "mountPath": "/d"}],
        }),
    );
    let items = json!([{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "memory", "resourceFieldRef": {"containerName": "c", "resource": "limits.memory", "divisor": "1Mi"}}]);
    ctx.apply(&[pod_with(
        "p",
        json!({"containers": [c], "volumes": [{"name": "d", "downwardAPI": {"items": items}}]}),
    )]);
    let p = ctx.ready("p");
    let expected = format!(
        "p {} {} {} {} 250 64 app=\"p\"",
        ctx.ns,
        p["status"]["podIP"].as_str().unwrap_or(""),
        p["spec"]["nodeName"].as_str().unwrap_or(""),
        p["status"]["hostIP"].as_str().unwrap_or("")
    );
    assert_eq!(ctx.exec("p", "echo $NAME $NS $IP $NODE $HOST $CPU $(cat /d/memory) $(cat /d/labels)"), expected);
    ctx.kubectl(&["label", "pod", "p", "more=yes"]);
    ctx.wait("the new label", LONG, || ctx.exec("p", "cat /d/labels").contains("more=\"yes\"").then_some(()));
}

fn empty_dir(ctx: &Ctx) {
    let both = mounts(&[("disk", "/disk"), ("memory", "/memory")]);
    let spec = json!({
        "securityContext": {"fsGroup": 3000, "runAsUser": 1000},
        "containers": [with(shell("a", "[ -e /disk/f ] || { echo from-a > /disk/f; exit 1; }; sleep 1000"), both.clone()), with(shell("b", "sleep 1000"), both)],
        "volumes": [{"name": "disk", "emptyDir": {}}, {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}}],
    });
    ctx.apply(&[pod_with("p", spec)]);
    // Container `a` ends once: the volume outlives it.
    let p = ctx
        .wait_pod("p", "Ready after a restart", |p| super::ctx::is_ready(p) && container(p, "a")["restartCount"] == 1);
    let uid = p["metadata"]["uid"].as_str().expect("a uid").to_owned();
    assert_eq!(
        ctx.exec("p -c b", "cat /disk/f; stat -c %g /disk; df -m /memory | tail -1 | awk '{print $2}'"),
        "from-a\n3000\n8"
    );
    let out = ctx.output(&["exec", "p", "-c", "b", "--", "sh", "-c", "head -c 20000000 /dev/zero > /memory/f"]);
    assert!(!out.status.success(), "the limit of a volume in memory is none");
    ctx.kubectl(&["delete", "pod", "p", "--wait=true"]);
    let folder = ctx.cluster.nodes()[0].dir.join("kubelet/pods").join(uid);
    ctx.wait("the volumes' end", LONG, || (!folder.exists()).then_some(()));
}

fn host_path(ctx: &Ctx) {
    let dir = format!("/tmp/{}", ctx.ns);
    std::fs::create_dir_all(format!("{dir}/sub")).expect("a folder");
    std::fs::write(format!("{dir}/file"), "on the node").expect("a file");
    let mount = |name: &str, path: &str, more: Value| with(json!({"name": name, "mountPath": path}), more);
    let c = with(
        shell("c", "sleep 1000"),
        json!({"securityContext": {"privileged": true}, "volumeMounts": [
            mount("dir", "/dir", json!({})), mount("file", "/etc/a-file", json!({"readOnly": true})),
            mount("dir", "/ro", json!({"readOnly": true})), mount("dir", "/strict", json!({"readOnly": true, "recursiveReadOnly": "Enabled", "mountPropagation": "None"})),
            mount("dir", "/both", json!({"mountPropagation": "Bidirectional"})), mount("dir", "/expr", json!({"subPathExpr": "$(WHERE)"}))],
            "env": [{"name": "WHERE", "value": "sub"}]}),
    );
    let volumes = json!([{"name": "dir", "hostPath": {"path": dir, "type": "Directory"}}, {"name": "file", "hostPath": {"path": format!("{dir}/file"), "type": "File"}}]);
    ctx.apply(&[pod_with("p", json!({"containers": [c], "volumes": volumes}))]);
    ctx.ready("p");
    assert_eq!(ctx.exec("p", "cat /etc/a-file; echo; echo here > /dir/new; cat /ro/new; touch /ro/x 2> /dev/null || echo ro; touch /expr/in-sub; touch /strict/x 2> /dev/null || echo strict"), "on the node\nhere\nro\nstrict");
    assert_eq!(std::fs::read_to_string(format!("{dir}/new")).expect("the pod's file"), "here\n");
    assert!(std::fs::exists(format!("{dir}/sub/in-sub")).expect("a look"));
    // A mount that the pod makes reaches the node.
    ctx.exec("p", "mkdir -p /both/mnt; mount -t tmpfs tmpfs /both/mnt; echo in > /both/mnt/f");
    assert_eq!(std::fs::read_to_string(format!("{dir}/mnt/f")).expect("the pod's mount"), "in\n");
    ctx.exec("p", "umount /both/mnt");
}

fn local_pv(ctx: &Ctx) {
    let node = ctx.cluster.nodes()[0].plan.name.clone();
    let dir = format!("/tmp/pv-{}", ctx.ns);
    std::fs::create_dir_all(&dir).expect("a folder");
    let class = format!("local-{}", ctx.ns);
    let term = json!({"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]});
    ctx.apply(&[
        json!({"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": class}, "provisioner": "kubernetes.io/no-provisioner", "volumeBindingMode": "WaitForFirstConsumer"}),
        json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": class}, "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"],
            "storageClassName": class, "persistentVolumeReclaimPolicy": "Retain", "local": {"path": dir}, "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}}}}),
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "claim"}, "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": class, "resources": {"requests": {"storage": "1Gi"}}}}),
    ]);
    let user = |name: &str, script: &str| {
        pod_with(
            name,
            json!({"restartPolicy": "Never", "containers": [with(shell("c", script), mounts(&[("v", "/v")]))], "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "claim"}}]}),
        )
    };
    ctx.apply(&[user("writes", "echo kept > /v/f")]);
    ctx.phase("writes", "Succeeded");
    ctx.apply(&[user("reads", "cat /v/f")]);
    ctx.phase("reads", "Succeeded");
    assert_eq!(ctx.logs(&["reads"]), "kept\n");
    ctx.kubectl(&["delete", "pod", "writes", "reads", "--wait=true"]);
    ctx.kubectl(&["delete", "pvc", "claim", "--wait=true"]);
    ctx.kubectl(&["delete", "pv", &class, "--wait=true"]);
}

/// Beside another volume's sub-path, which the kubelet then tells twice.
fn image_volume(ctx: &Ctx) {
    let c = json!({"name": "c", "image": BUSYBOX, "command": ["sh", "-c", "ls /tool; ls -d /in-image/passwd; touch /part/x && ls /part; touch /tool/x 2> /dev/null || echo read-only; sleep 1000"],
        "volumeMounts": [{"name": "tool", "mountPath": "/tool"}, {"name": "box", "mountPath": "/in-image", "subPath": "etc"}, {"name": "dir", "mountPath": "/part", "subPath": "a/b"}]});
    let volumes = json!([{"name": "dir", "emptyDir": {}}, {"name": "tool", "image": {"reference": PODTOOL, "pullPolicy": "IfNotPresent"}}, {"name": "box", "image": {"reference": BUSYBOX}}]);
    ctx.apply(&[pod_with("p", json!({"containers": [c], "volumes": volumes}))]);
    ctx.ready("p");
    let said = ctx.wait("its log", LONG, || Some(ctx.logs(&["p"])).filter(|l| l.contains("read-only")));
    assert_eq!(said, "podtool\n/in-image/passwd\nx\nread-only\n");
}
