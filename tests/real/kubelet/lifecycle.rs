//! Pods' lives: controllers, init and sidecar containers, restarts and their reasons, hooks, deletion.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::ctx::{Ctx, LONG, NGINX, PODTOOL, container, is_ready, pod, pod_with, shell, with};
use super::harness::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    ("cron_job", cron_job),
    ("crash_loop_back_off", crash_loop),
    ("deployment_rolls_over", deployment),
    ("daemon_set", daemon_set),
    ("job_completes_or_gives_up", job),
    ("init_and_sidecar_containers", init_and_sidecar),
    ("restart_policies_and_exit_codes", restart_policies),
    ("out_of_memory", out_of_memory),
    ("images_and_commands_that_are_not_there", not_there),
    ("hooks_and_graceful_deletion", hooks_and_deletion),
    ("termination_messages", termination_messages),
];

fn workload(kind: &str, name: &str, spec: Value, pod_spec: Value) -> Value {
    let labels = json!({"app": name});
    let template =
        json!({"metadata": {"labels": labels}, "spec": with(json!({"terminationGracePeriodSeconds": 1}), pod_spec)});
    let spec = with(json!({"selector": {"matchLabels": labels}, "template": template}), spec);
    json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn deployment(ctx: &Ctx) {
    let web = json!({"name": "web", "image": NGINX, "env": [{"name": "VERSION", "value": "1"}],
        "readinessProbe": {"httpGet": {"port": 80}, "periodSeconds": 1}});
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}});
    ctx.apply(&[workload(
        "Deployment",
        "web",
        json!({"replicas": 3, "strategy": strategy}),
        json!({"containers": [web]}),
    )]);
    ctx.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]);
    let version = |p: &Value| p["spec"]["containers"][0]["env"][0]["value"].as_str().unwrap_or_default().to_owned();
    let all_are = |wanted: &str| {
        ctx.wait(&format!("three pods of version {wanted}"), LONG, || {
            let pods = ctx.pods("app=web");
            (pods.len() == 3 && pods.iter().all(|p| is_ready(p) && version(p) == wanted)).then_some(())
        });
    };
    all_are("1");
    ctx.kubectl(&["set", "env", "deployment/web", "VERSION=2"]);
    ctx.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]);
    all_are("2");
    ctx.kubectl(&["rollout", "undo", "deployment/web"]);
    ctx.kubectl(&["rollout", "status", "deployment/web", "--timeout=120s"]);
    all_are("1");
    ctx.kubectl(&["scale", "deployment/web", "--replicas=0"]);
    ctx.wait("no pods", LONG, || ctx.get("pods")?["items"].as_array()?.is_empty().then_some(()));
}

fn daemon_set(ctx: &Ctx) {
    ctx.apply(&[workload("DaemonSet", "each", json!({}), json!({"containers": [shell("c", "sleep 1000")]}))]);
    ctx.kubectl(&["rollout", "status", "daemonset/each", "--timeout=120s"]);
    let nodes: Vec<String> = ctx.cluster.nodes().iter().map(|n| n.plan.name.clone()).collect();
    let mut on: Vec<_> =
        ctx.pods("app=each").iter().map(|p| p["spec"]["nodeName"].as_str().unwrap_or("").to_owned()).collect();
    on.sort();
    assert_eq!(on, nodes);
}

fn job_of(name: &str, spec: Value, script: &str) -> Value {
    let template = json!({"spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [shell("c", script)]}});
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": with(json!({"template": template}), spec)})
}

fn job(ctx: &Ctx) {
    ctx.apply(&[
        job_of(
            "counts",
            json!({"completions": 4, "parallelism": 2, "completionMode": "Indexed"}),
            "echo index $JOB_COMPLETION_INDEX",
        ),
        job_of("fails", json!({"backoffLimit": 1}), "exit 9"),
    ]);
    ctx.kubectl(&["wait", "--for=condition=complete", "job/counts", "--timeout=120s"]);
    let mut said: Vec<String> = ctx
        .pods("job-name=counts")
        .iter()
        .map(|p| ctx.logs(&[p["metadata"]["name"].as_str().expect("a name")]))
        .collect();
    said.sort();
    assert_eq!(said, ["index 0\n", "index 1\n", "index 2\n", "index 3\n"]);
    ctx.kubectl(&["wait", "--for=condition=failed", "job/fails", "--timeout=120s"]);
    let pods = ctx.pods("job-name=fails");
    assert_eq!(pods.len(), 2, "{pods:?}");
    for p in &pods {
        assert_eq!(container(p, "c")["state"]["terminated"]["exitCode"], 9, "{p}");
    }
}

fn cron_job(ctx: &Ctx) {
    let template = job_of("x", json!({}), "echo it is time")["spec"].clone();
    ctx.apply(&[json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "every-minute"},
        "spec": {"schedule": "* * * * *", "jobTemplate": {"spec": template}}})]);
    ctx.wait("a job that ran at its minute", LONG, || {
        let jobs = ctx.get("apis/batch/v1 jobs")?;
        jobs["items"].as_array()?.iter().any(|j| j["status"]["succeeded"] == 1).then_some(())
    });
}

fn init_and_sidecar(ctx: &Ctx) {
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let part = |name: &str, script: &str| with(shell(name, script), json!({"volumeMounts": mount}));
    let sidecar = with(
        part(
            "sidecar",
            "trap 'echo ended >> /shared/log; exit 0' TERM; echo sidecar >> /shared/log; touch /shared/up; while :; do sleep 0.1; done",
        ),
        json!({"restartPolicy": "Always", "startupProbe": {"exec": {"command": ["test", "-e", "/shared/up"]}, "periodSeconds": 1}}),
    );
    let spec = json!({
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 10,
        "volumes": [{"name": "shared", "hostPath": {"path": format!("/tmp/{}", ctx.ns), "type": "DirectoryOrCreate"}}],
        "initContainers": [part("one", "echo one >> /shared/log"), sidecar, part("two", "echo two >> /shared/log")],
        "containers": [part("main", "echo main >> /shared/log; exit 0")],
    });
    ctx.apply(&[pod_with("p", spec)]);
    let done = ctx.phase("p", "Succeeded");
    let log = std::fs::read_to_string(format!("/tmp/{}/log", ctx.ns)).expect("the log");
    assert_eq!(log, "one\nsidecar\ntwo\nmain\nended\n");
    assert_eq!(container(&done, "one")["state"]["terminated"]["reason"], "Completed", "{done}");
    assert_eq!(container(&done, "sidecar")["state"]["terminated"]["exitCode"], 0, "{done}");
    // An init container that fails holds the pod back and is tried again.
    let spec = json!({"initContainers": [part("bad", "exit 4")], "volumes": [{"name": "shared", "emptyDir": {}}],
        "containers": [shell("never", "echo never")]});
    ctx.apply(&[pod_with("held", spec)]);
    ctx.wait_pod("held", "an init container that was tried again", |p| {
        let bad = container(p, "bad");
        bad["restartCount"].as_i64() >= Some(1) && bad["lastState"]["terminated"]["exitCode"] == 4
    });
    assert!(container(&ctx.pod("held"), "never")["state"]["waiting"].is_object());
}

fn restart_policies(ctx: &Ctx) {
    let once = |name: &str, policy: &str, script: &str| {
        let c = with(shell("c", script), json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        pod_with(name, json!({"restartPolicy": policy, "containers": [c], "volumes": [{"name": "v", "emptyDir": {}}]}))
    };
    ctx.apply(&[
        once("never-bad", "Never", "exit 7"),
        once("never-good", "Never", "exit 0"),
        once("on-failure", "OnFailure", "[ -e /v/f ] && exit 0; touch /v/f; exit 5"),
        once("always", "Always", "[ -e /v/f ] && sleep 1000; touch /v/f; exit 0"),
    ]);
    let ended = |p: &Value| {
        let t = &container(p, "c")["state"]["terminated"];
        (t["exitCode"].as_i64().unwrap_or(-1), t["reason"].as_str().unwrap_or("").to_owned())
    };
    assert_eq!(ended(&ctx.phase("never-bad", "Failed")), (7, "Error".into()));
    assert_eq!(ended(&ctx.phase("never-good", "Succeeded")), (0, "Completed".into()));
    let tried = ctx.phase("on-failure", "Succeeded");
    assert_eq!(
        (ended(&tried), &container(&tried, "c")["restartCount"]),
        ((0, "Completed".into()), &json!(1)),
        "{tried}"
    );
    let again = ctx.wait_pod("always", "running a second time", |p| {
        container(p, "c")["restartCount"] == 1 && container(p, "c")["state"]["running"].is_object()
    });
    assert_eq!(container(&again, "c")["lastState"]["terminated"]["reason"], "Completed", "{again}");
    // What has ended stays as it is: the kubelet does not run it again.
    assert_eq!(container(&ctx.pod("never-bad"), "c")["restartCount"], 0);
}

fn crash_loop(ctx: &Ctx) {
    ctx.apply(&[pod_with("p", json!({"containers": [shell("c", "echo going; exit 42")]}))]);
    let p = ctx.wait_pod("p", "CrashLoopBackOff after two restarts", |p| {
        let c = container(p, "c");
        c["state"]["waiting"]["reason"] == "CrashLoopBackOff" && c["restartCount"].as_i64() >= Some(2)
    });
    let last = &container(&p, "c")["lastState"]["terminated"];
    assert_eq!((&last["exitCode"], &last["reason"]), (&json!(42), &json!("Error")), "{p}");
    assert!(last["startedAt"].as_str() <= last["finishedAt"].as_str(), "{last}");
    assert_eq!(ctx.logs(&["p", "--previous"]), "going\n");
}

fn out_of_memory(ctx: &Ctx) {
    let eater =
        json!({"name": "c", "image": PODTOOL, "args": ["eat", "300"], "resources": {"limits": {"memory": "40Mi"}}});
    let child = with(
        shell("c", "head -c 200000000 /dev/zero | tail; echo survived; exit 3"),
        json!({"resources": {"limits": {"memory": "40Mi"}}}),
    );
    ctx.apply(&[
        pod_with("init-is-killed", json!({"restartPolicy": "Never", "containers": [eater]})),
        pod_with("child-is-killed", json!({"restartPolicy": "Never", "containers": [child]})),
    ]);
    let p = ctx.phase("init-is-killed", "Failed");
    let t = &container(&p, "c")["state"]["terminated"];
    assert_eq!((&t["exitCode"], &t["reason"]), (&json!(137), &json!("OOMKilled")), "{p}");
    ctx.phase("child-is-killed", "Failed");
}

fn not_there(ctx: &Ctx) {
    let image = json!({"name": "c", "image": "registry.k8s.io/lxcri/nothing:1"});
    let command = json!({"name": "c", "image": super::ctx::BUSYBOX, "command": ["/no/such/program"]});
    ctx.apply(&[
        pod_with("image", json!({"containers": [image]})),
        pod_with("never", json!({"containers": [{"name": "c", "image": "registry.k8s.io/lxcri/nothing:2", "imagePullPolicy": "Never"}]})),
        pod_with("command", json!({"restartPolicy": "Never", "containers": [command]})),
    ]);
    let reason = |p: &Value| container(p, "c")["state"]["waiting"]["reason"].as_str().unwrap_or("").to_owned();
    ctx.wait_pod("image", "ImagePullBackOff", |p| reason(p) == "ImagePullBackOff");
    ctx.wait_pod("never", "ErrImageNeverPull", |p| reason(p) == "ErrImageNeverPull");
    let p = ctx.wait_pod("command", "an error that is shown", |p| {
        container(p, "c")["state"]["terminated"]["reason"] == "StartError" || reason(p).ends_with("ContainerError")
    });
    let state = container(&p, "c")["state"].to_string();
    assert!(state.contains("/no/such/program"), "{state}");
}

fn hooks_and_deletion(ctx: &Ctx) {
    let folder = format!("/tmp/{}", ctx.ns);
    let volume = json!([{"name": "v", "hostPath": {"path": folder, "type": "DirectoryOrCreate"}}]);
    let mount = json!([{"name": "v", "mountPath": "/v"}]);
    let sh = |s: &str| json!({"exec": {"command": ["sh", "-c", s]}});
    let polite = with(
        shell(
            "c",
            "trap 'echo term >> /v/log; sleep 0.5; echo bye >> /v/log; exit 0' TERM; touch /v/up; while :; do sleep 0.1; done",
        ),
        json!({"volumeMounts": mount, "lifecycle": {"postStart": sh("echo post-start >> /v/log"), "preStop": sh("echo pre-stop >> /v/log; sleep 1; echo pre-stop-done >> /v/log")}}),
    );
    let deaf = with(shell("c", "trap '' TERM; while :; do sleep 1; done"), json!({}));
    ctx.apply(&[
        pod_with("polite", json!({"terminationGracePeriodSeconds": 30, "containers": [polite], "volumes": volume})),
        pod_with("deaf", json!({"terminationGracePeriodSeconds": 4, "containers": [deaf]})),
    ]);
    ctx.ready("polite");
    ctx.ready("deaf");
    ctx.wait("the trap", LONG, || std::fs::exists(format!("{folder}/up")).ok()?.then_some(()));
    let start = Instant::now();
    ctx.kubectl(&["delete", "pod", "polite", "--wait=true", "--timeout=60s"]);
    assert!(start.elapsed() < Duration::from_secs(25), "waited for the grace period's end: {:?}", start.elapsed());
    let log = std::fs::read_to_string(format!("{folder}/log")).expect("the log");
    assert_eq!(log, "post-start\npre-stop\npre-stop-done\nterm\nbye\n");
    let start = Instant::now();
    ctx.kubectl(&["delete", "pod", "deaf", "--wait=true", "--timeout=60s"]);
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(4), "killed within its grace period, after {took:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    // At once.
    ctx.apply(&[pod_with("forced", json!({"terminationGracePeriodSeconds": 300, "containers": [shell("c", "trap '' TERM; while :; do sleep 1; done")]}))]);
    ctx.ready("forced");
    ctx.kubectl(&["delete", "pod", "forced", "--grace-period=0", "--force", "--timeout=30s"]);
    // The sandbox itself goes with the kubelet's next collection.
    ctx.wait("the container's end", LONG, || {
        let label = format!("io.kubernetes.pod.namespace={}", ctx.ns);
        let all = ctx.cluster.nodes()[0].crictl_json(&["ps", "--label", &label]);
        all["containers"].as_array().is_none_or(Vec::is_empty).then_some(())
    });
}

fn termination_messages(ctx: &Ctx) {
    let fallback =
        with(shell("c", "echo the last words; exit 1"), json!({"terminationMessagePolicy": "FallbackToLogsOnError"}));
    ctx.apply(&[
        pod("file", "echo from the file > /dev/termination-log; exit 1"),
        pod_with("log", json!({"restartPolicy": "Never", "containers": [fallback]})),
    ]);
    let message = |p: &Value| container(p, "c")["state"]["terminated"]["message"].as_str().unwrap_or("").to_owned();
    assert_eq!(message(&ctx.phase("file", "Failed")), "from the file\n");
    assert_eq!(message(&ctx.phase("log", "Failed")), "the last words\n");
}
