//! What a scenario works with: kubectl in a namespace of its own, and waiting for what the API says.

use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::{Cluster, condition};
use crate::support::describe;

/// The small shell image.
pub const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// A web server on port 80.
pub const NGINX: &str = "registry.k8s.io/e2e-test-images/nginx:1.14-2";
/// See `gomod/podtool`.
pub const PODTOOL: &str = "registry.k8s.io/lxcri/podtool:1";

/// As long as anything may take on a busy machine.
pub const LONG: Duration = Duration::from_secs(120);

/// A scenario's namespace in a cluster.
pub struct Ctx {
    pub cluster: Arc<Cluster>,
    pub ns: String,
}

impl Ctx {
    /// Makes the namespace and waits for its service account.
    pub fn new(cluster: Arc<Cluster>, ns: &str) -> Self {
        let ctx = Self { cluster, ns: ns.to_owned() };
        let made = ctx.cluster.kubectl().args(["create", "namespace", ns]).output().expect("kubectl");
        assert!(made.status.success(), "namespace {ns}: {}", describe(&made));
        ctx.wait("its service account", LONG, || {
            ctx.cluster.get(&format!("/api/v1/namespaces/{ns}/serviceaccounts/default"))?;
            ctx.cluster.get(&format!("/api/v1/namespaces/{ns}/configmaps/kube-root-ca.crt"))
        });
        ctx
    }

    /// Removes the namespace; does not wait for its end.
    pub fn close(&self) {
        let _ = self.cluster.kubectl().args(["delete", "namespace", &self.ns, "--wait=false"]).output();
    }

    /// kubectl in the namespace, not started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.cluster.kubectl();
        command.args(["-n", &self.ns]).args(args).stdin(Stdio::null());
        command
    }

    /// What kubectl did.
    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("kubectl")
    }

    /// What it printed; it must succeed.
    pub fn kubectl(&self, args: &[&str]) -> String {
        let out = self.output(args);
        assert!(out.status.success(), "kubectl {args:?}: {}", describe(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// The same with something on stdin.
    pub fn kubectl_with(&self, args: &[&str], stdin: &[u8]) -> String {
        use std::io::Write;
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("kubectl");
        let mut pipe = child.stdin.take().expect("stdin");
        let bytes = stdin.to_owned();
        let writer = std::thread::spawn(move || pipe.write_all(&bytes));
        let out = child.wait_with_output().expect("kubectl's output");
        let _ = writer.join();
        assert!(out.status.success(), "kubectl {args:?}: {}", describe(&out));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// A shell command in a pod's (first, or named by "pod -c container") container.
    pub fn exec(&self, pod: &str, script: &str) -> String {
        let mut args = vec!["exec"];
        args.extend(pod.split(' '));
        args.extend(["--", "sh", "-c", script]);
        self.kubectl(&args).trim_end().to_owned()
    }

    /// `kubectl apply` of objects; pods get the namespace's by `-n`.
    pub fn apply(&self, objects: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.kubectl_with(&["apply", "-f", "-"], list.to_string().as_bytes());
    }

    /// An object by its path below the namespace, like "pods/x" or "apis/apps/v1 deployments/x".
    pub fn get(&self, what: &str) -> Option<Value> {
        let (api, rest) = what.split_once(' ').unwrap_or(("api/v1", what));
        self.cluster.get(&format!("/{api}/namespaces/{}/{rest}", self.ns))
    }

    /// A pod that must be there.
    pub fn pod(&self, name: &str) -> Value {
        self.get(&format!("pods/{name}")).unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// Names of the pods that a label selector finds and that are not being deleted.
    pub fn pods(&self, selector: &str) -> Vec<Value> {
        let list = self.get(&format!("pods?labelSelector={}", selector.replace('=', "%3D"))).unwrap_or_default();
        let all = list["items"].as_array().cloned().unwrap_or_default();
        all.into_iter().filter(|p| p["metadata"]["deletionTimestamp"].is_null()).collect()
    }

    /// Waits for something.
    pub fn wait<T>(&self, what: &str, limit: Duration, mut found: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = found() {
                return value;
            }
            assert!(Instant::now() < deadline, "{}: waited {limit:?} in vain for {what}", self.ns);
            std::thread::sleep(Duration::from_millis(200)); // the poll of a condition with a deadline
        }
    }

    /// Waits until a pod is as wanted.
    pub fn wait_pod(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait(&format!("pod {name}: {what}"), LONG, || self.get(&format!("pods/{name}")).filter(|p| wanted(p)))
    }

    /// Waits until a pod is Ready.
    pub fn ready(&self, name: &str) -> Value {
        self.wait_pod(name, "Ready", is_ready)
    }

    /// Waits for a pod's phase.
    pub fn phase(&self, name: &str, phase: &str) -> Value {
        self.wait_pod(name, phase, |p| p["status"]["phase"] == phase)
    }

    /// Waits until a pod is gone from the API.
    pub fn gone(&self, name: &str) {
        self.wait(&format!("the end of pod {name}"), LONG, || {
            self.get(&format!("pods/{name}")).is_none().then_some(())
        });
    }

    /// A pod's or one container's log.
    pub fn logs(&self, args: &[&str]) -> String {
        let all: Vec<_> = ["logs"].iter().chain(args).copied().collect();
        self.kubectl(&all)
    }

    /// Prints what somebody wants to see of a namespace in which something went wrong.
    pub fn show(&self) {
        println!("--- namespace {}:", self.ns);
        for args in
            [&["get", "all", "-o", "wide"][..], &["describe", "pods"], &["get", "events", "--sort-by=.lastTimestamp"]]
        {
            let out = self.output(args);
            println!(
                "$ kubectl {}\n{}{}",
                args.join(" "),
                String::from_utf8_lossy(&out.stdout),
                String::from_utf8_lossy(&out.stderr)
            );
        }
        let pods = self.get("pods").unwrap_or_default();
        for pod in pods["items"].as_array().into_iter().flatten() {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            let out = self.output(&["logs", name, "--all-containers", "--prefix", "--tail=20"]);
            println!("$ kubectl logs {name}\n{}", String::from_utf8_lossy(&out.stdout));
        }
    }
}

/// Whether a pod's Ready condition is true.
pub fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready") == Some("True")
}

/// A pod that runs one container `c` with a shell script, forever unless it ends itself.
pub fn pod(name: &str, script: &str) -> Value {
    pod_with(name, json!({"restartPolicy": "Never", "containers": [shell("c", script)]}))
}

/// A pod of which the spec is given; it ends at once when it is deleted.
pub fn pod_with(name: &str, mut spec: Value) -> Value {
    if spec["terminationGracePeriodSeconds"].is_null() {
        spec["terminationGracePeriodSeconds"] = json!(1);
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec})
}

/// A container that runs a shell script.
pub fn shell(name: &str, script: &str) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sh", "-c", script]})
}

/// `a` with the keys of `b`.
pub fn with(mut a: Value, b: Value) -> Value {
    for (key, value) in b.as_object().into_iter().flatten() {
        a[key] = value.clone();
    }
    a
}

/// The status of a pod's container.
pub fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let lists = ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"];
    let all = lists.iter().flat_map(|l| pod["status"][*l].as_array().into_iter().flatten());
    all.into_iter().find(|c| c["name"] == name).unwrap_or(&Value::Null)
}
