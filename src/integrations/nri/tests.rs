//! Plugins that are faked at the wire: what they may answer, and not.

use std::sync::Mutex;

use super::mux::{self, Message, Reader};
use super::wire::{
    ConfigureResponse, ContainerUpdate, FailurePolicy, LinuxContainerUpdate, LinuxMemory, LinuxResources,
    OptionalInt64, RegisterPluginRequest, Request, Response, StateChangeEvent, Status, SynchronizeRequest,
    SynchronizeResponse,
};
use super::*;
use crate::core::ids::{ContainerId, Digest, PodId};
use crate::core::records::ResolvedUser;
use crate::core::spec::{ContainerConfig, Owner, SandboxConfig};
use crate::core::state::{ContainerPhase, PodPhase};

/// What a plugin says to a call; None: nothing, ever.
type Answers = dyn Fn(&str, &[u8]) -> Option<Result<Vec<u8>, i32>> + Send + Sync;

#[derive(Default)]
struct FakeHost {
    pods: Vec<Arc<PodRecord>>,
    containers: Vec<Arc<ContainerRecord>>,
    set: Mutex<Vec<NewLimits>>,
}

#[async_trait]
impl PluginHost for FakeHost {
    fn state(&self) -> (Vec<Arc<PodRecord>>, Vec<Arc<ContainerRecord>>) {
        (self.pods.clone(), self.containers.clone())
    }
    async fn set_limits(&self, wanted: &NewLimits) -> Result<()> {
        self.set.lock().expect("not poisoned").push(wanted.clone());
        Ok(())
    }
}

struct Bench {
    nri: Arc<Nri>,
    host: Arc<FakeHost>,
    tasks: TaskSet,
}

impl Bench {
    fn new(host: FakeHost, required: &[&str]) -> Self {
        let config = NriConfig {
            plugin_dir: "/nowhere".into(),
            plugin_config_dir: "/nowhere".into(),
            socket: None,
            registration_timeout: Duration::from_millis(300),
            request_timeout: Duration::from_millis(300),
            required: required.iter().map(ToString::to_string).collect(),
            handlers: vec!["crun"],
        };
        let (tasks, host) = (TaskSet::new("test"), Arc::new(host));
        let nri = Nri::new(config, tasks.clone());
        let _ = nri.host.set(host.clone());
        Self { nri, host, tasks }
    }

    /// Connects a plugin; whether it was admitted.
    async fn connect(&self, index: &str, answers: Box<Answers>) -> Result<()> {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let payload =
            RegisterPluginRequest { plugin_name: "fake".into(), plugin_idx: index.into(), ..Default::default() };
        self.tasks.spawn_cancellable("plugin", async move {
            let (read, mut write) = theirs.into_split();
            let (service, method) = ("nri.pkg.api.v1alpha1.Runtime".to_owned(), "RegisterPlugin".to_owned());
            let request = Request { service, method, payload: payload.encode_to_vec(), timeout_nano: 0 };
            let body = request.encode_to_vec().into();
            let first = Message { connection: mux::RUNTIME, stream: 1, kind: mux::REQUEST, body };
            mux::write(&mut write, &first).await.expect("written");
            let mut reader = Reader::new(read);
            while let Ok(message) = reader.next().await {
                if message.kind != mux::REQUEST {
                    continue;
                }
                let request = Request::decode(message.body).expect("a request");
                let response = match answers(&request.method, &request.payload) {
                    None => continue,
                    Some(Ok(payload)) => Response { status: None, payload },
                    Some(Err(code)) => {
                        let status = Some(Status { code, message: "as it likes".into() });
                        Response { status, payload: Vec::new() }
                    }
                };
                let body = response.encode_to_vec().into();
                let answer = Message { connection: mux::PLUGIN, stream: message.stream, kind: mux::RESPONSE, body };
                if mux::write(&mut write, &answer).await.is_err() {
                    break;
                }
            }
        });
        self.nri.admit(ours, None).await.map(drop)
    }

    async fn count(&self) -> usize {
        self.nri.plugins.read().await.iter().filter(|p| !p.connection.is_closed()).count()
    }
}

fn pod(handler: &str) -> PodRecord {
    PodRecord {
        id: PodId::new(),
        owner: Owner::Cri,
        handler: handler.into(),
        config: SandboxConfig::default(),
        created_at: 1,
        boot_id: String::new(),
        phase: PodPhase::Ready,
        resources: Vec::new(),
        facts: None,
    }
}

fn container(pod: &PodRecord, name: &str) -> ContainerRecord {
    ContainerRecord {
        id: ContainerId::new(),
        pod: pod.id.clone(),
        config: ContainerConfig { name: name.into(), ..Default::default() },
        image_id: format!("sha256:{}", "0".repeat(64)).parse::<Digest>().expect("a digest"),
        image_ref: String::new(),
        phase: ContainerPhase::Running,
        created_at: 1,
        started_at: 2,
        finished_at: 0,
        exit: None,
        user: ResolvedUser::default(),
        log_path: None,
        stop_signal: 15,
        pid: 7,
        pid_start_time: 0,
        cannot_run: None,
        quota: 0,
        restore: false,
    }
}

fn configured(policy: Option<FailurePolicy>) -> Vec<u8> {
    ConfigureResponse { events: 0, failure_policy: policy }.encode_to_vec()
}

#[tokio::test]
async fn who_does_not_answer_is_closed_unless_it_asked_for_more() {
    for (fail_request, keep_connected) in [(false, false), (true, false), (false, true), (true, true)] {
        let bench = Bench::new(FakeHost::default(), &[]);
        let policy = FailurePolicy { fail_request, keep_connected };
        let answers = move |method: &str, _: &[u8]| match method {
            "Configure" => Some(Ok(configured(Some(policy)))),
            "Synchronize" => Some(Ok(Vec::new())),
            _ => None,
        };
        bench.connect("10", Box::new(answers)).await.expect("admitted");
        let told = bench.nri.pod(PodMoment::Run, &pod("crun")).await;
        assert_eq!(told.is_err(), fail_request, "{told:?}");
        assert_eq!(bench.count().await, usize::from(keep_connected));
        bench.tasks.shutdown().await;
    }
}

#[tokio::test]
async fn a_plugin_of_before_gets_changes_of_state() {
    let bench = Bench::new(FakeHost::default(), &[]);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let log = heard.clone();
    let answers = move |method: &str, payload: &[u8]| match method {
        "Configure" => Some(Ok(configured(None))),
        "Synchronize" => Some(Ok(Vec::new())),
        "StateChange" => {
            let event = StateChangeEvent::decode(payload).expect("an event").event();
            log.lock().expect("not poisoned").push(format!("{event:?}"));
            Some(Ok(Vec::new()))
        }
        other => {
            log.lock().expect("not poisoned").push(other.to_owned());
            Some(Err(12))
        }
    };
    bench.connect("10", Box::new(answers)).await.expect("admitted");
    let pod = pod("crun");
    for _ in 0..2 {
        bench.nri.pod(PodMoment::Run, &pod).await.expect("told");
    }
    bench.nri.container(ContainerMoment::Started, &pod, &container(&pod, "c")).await.expect("told");
    bench.nri.update_pod(&pod, &Resources::default(), &Resources::default()).await.expect("it does not know that");
    let heard = heard.lock().expect("not poisoned").clone();
    let wanted = [
        "RunPodSandbox",
        "RunPodSandbox",
        "RunPodSandbox",
        "PostStartContainer",
        "PostStartContainer",
        "UpdatePodSandbox",
    ];
    assert_eq!(heard, wanted, "the own call is tried once");
    bench.tasks.shutdown().await;
}

#[tokio::test]
async fn much_is_told_in_parts_and_of_our_handlers_alone() {
    let (ours, other) = (pod("crun"), pod("proxmox-vm"));
    let (mut first, mut second) = (container(&ours, "first"), container(&ours, "second"));
    for c in [&mut first, &mut second] {
        c.config.annotations.insert("big".into(), "x".repeat(SYNC_BYTES - 1000));
    }
    let foreign = container(&other, "foreign");
    let host = FakeHost {
        containers: [&first, &second, &foreign].map(|c| Arc::new(c.clone())).to_vec(),
        pods: [&ours, &other].map(|p| Arc::new(p.clone())).to_vec(),
        ..Default::default()
    };
    let bench = Bench::new(host, &[]);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (log, wanted) = (heard.clone(), second.id.to_string());
    let answers = move |method: &str, payload: &[u8]| match method {
        "Configure" => Some(Ok(configured(None))),
        _ => {
            let asked = SynchronizeRequest::decode(payload).expect("a request");
            let names: Vec<_> = asked.containers.iter().map(|c| c.name.clone()).collect();
            log.lock().expect("not poisoned").push((asked.pods.len(), names, asked.more));
            let limit = Some(OptionalInt64 { value: 5 << 20 });
            let memory = Some(LinuxMemory { limit, ..Default::default() });
            let linux = LinuxContainerUpdate { resources: Some(LinuxResources { memory, ..Default::default() }) };
            let update = ContainerUpdate { container_id: wanted.clone(), linux: Some(linux), ignore_failure: false };
            let update = if asked.more { Vec::new() } else { vec![update] };
            Some(Ok(SynchronizeResponse { update, more: asked.more }.encode_to_vec()))
        }
    };
    bench.connect("10", Box::new(answers)).await.expect("admitted");
    let name = |n: &str| vec![n.to_owned()];
    let heard = heard.lock().expect("not poisoned").clone();
    assert_eq!(heard, [(1, name("first"), true), (0, name("second"), false)]);
    let set = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            if let Some(set) = bench.host.set.lock().expect("not poisoned").first().cloned() {
                return set;
            }
            tokio::task::yield_now().await;
        }
    });
    let set = set.await.expect("set");
    assert_eq!((set.container, set.resources.memory_limit), (second.id.to_string(), 5 << 20));
    bench.tasks.shutdown().await;
}

#[tokio::test]
async fn strangers_are_not_admitted() {
    let bench = Bench::new(FakeHost::default(), &[]);
    let good = |method: &str, _: &[u8]| Some(Ok(if method == "Configure" { configured(None) } else { Vec::new() }));
    let told = bench.connect("1", Box::new(good)).await.expect_err("an index that is none").chain();
    assert!(told.contains("two digits"), "{told}");
    let events = ConfigureResponse { events: 1 << 20, ..Default::default() }.encode_to_vec();
    let told = bench.connect("10", Box::new(move |_, _| Some(Ok(events.clone())))).await.expect_err("events").chain();
    assert!(told.contains("0x100000"), "{told}");
    let told = bench.connect("10", Box::new(|_, _| Some(Err(2)))).await.expect_err("its own no").chain();
    assert!(told.contains("as it likes"), "{told}");
    let told = bench.connect("10", Box::new(|_, _| Some(Ok(vec![0xff])))).await.expect_err("no message").chain();
    assert!(told.contains("not understood"), "{told}");
    let (silent, _theirs) = UnixStream::pair().expect("a pair");
    let told = bench.nri.admit(silent, None).await.map(drop).expect_err("silent").chain();
    assert!(told.contains("not registered within 300 ms"), "{told}");
    assert_eq!(bench.count().await, 0);
    bench.tasks.shutdown().await;
}

#[tokio::test]
async fn updates_are_changed_and_conflicts_named() {
    let bench = Bench::new(FakeHost::default(), &[]);
    let pod = pod("crun");
    let it = container(&pod, "c");
    let answers = |memory: i64, id: String| {
        move |method: &str, payload: &[u8]| match method {
            "Configure" => Some(Ok(configured(None))),
            "UpdateContainer" if memory > 0 => {
                let asked = UpdateContainerRequest::decode(payload).expect("a request");
                let limit = asked.linux_resources.and_then(|r| r.memory?.limit).map_or(0, |l| l.value);
                let limit = Some(OptionalInt64 { value: limit + memory });
                let memory = Some(LinuxMemory { limit, ..Default::default() });
                let linux = LinuxContainerUpdate { resources: Some(LinuxResources { memory, ..Default::default() }) };
                let update = ContainerUpdate { container_id: id.clone(), linux: Some(linux), ignore_failure: false };
                Some(Ok(UpdateContainerResponse { update: vec![update], evict: Vec::new() }.encode_to_vec()))
            }
            _ => Some(Ok(Vec::new())),
        }
    };
    bench.connect("10", Box::new(answers(1 << 20, it.id.to_string()))).await.expect("admitted");
    let asked = Resources { memory_limit: 8 << 20, cpu_shares: 5, ..Default::default() };
    let (changed, others) = bench.nri.update(&pod, &it, &asked).await.expect("changed");
    assert_eq!((changed.memory_limit, changed.cpu_shares, others.len()), (9 << 20, 5, 0));
    bench.connect("20", Box::new(answers(1 << 20, it.id.to_string()))).await.expect("admitted");
    let told = bench.nri.update(&pod, &it, &asked).await.expect_err("a conflict").chain();
    assert!(told.contains("\"10-fake\" and \"20-fake\"") && told.contains("memory.limit"), "{told}");
    bench.tasks.shutdown().await;
}
