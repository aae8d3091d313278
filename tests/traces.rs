//! Traces: a collector (the real OTLP service by the crate of its protocol) gets spans of a kubelet's calls, from the call to crun,
//! as parts of the kubelet's own trace; and nothing where the kubelet does not trace.
//!
//! Run by `make test`, as root. A crash leaves nothing: see `support`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start tasks as they like

mod support;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_cri::v1::{
    CreateContainerRequest, ExecSyncRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    VersionRequest,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::{Span, status::StatusCode};
use support::client::{self, Client};
use support::crictl::BUSYBOX;
use support::node::{Node, Options};
use support::{isolated, wait_for};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What was received: spans, each with the service's name.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let attributes = of_resource.resource.unwrap_or_default().attributes;
            let service = attributes.into_iter().find(|a| a.key == "service.name").and_then(|a| a.value?.value);
            let Some(Value::StringValue(service)) = service else { panic!("no service.name") };
            let spans = of_resource.scope_spans.into_iter().flat_map(|s| s.spans);
            self.0.lock().unwrap().extend(spans.map(|s| (service.clone(), s)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    fn all(&self) -> Vec<(String, Span)> {
        self.0.lock().unwrap().clone()
    }

    /// The first span of that name in the trace, and those above it, up to the one whose parent is the caller's.
    fn path(&self, trace: [u8; 16], name: &str) -> Vec<Span> {
        let all: HashMap<Vec<u8>, Span> =
            self.all().into_iter().filter(|(_, s)| s.trace_id == trace).map(|(_, s)| (s.span_id.clone(), s)).collect();
        let named = all.values().filter(|s| s.name == name);
        let Some(mut span) = named.min_by_key(|s| s.start_time_unix_nano) else { return Vec::new() };
        let mut path = vec![span.clone()];
        while let Some(parent) = all.get(&span.parent_span_id) {
            path.push(parent.clone());
            span = parent;
        }
        path
    }
}

const CALLER: [u8; 8] = [0xca, 0x11, 0xe4, 0, 0, 0, 0, 1];

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A request within the caller's trace, as the kubelet's client sends it.
fn traced<T>(message: T, trace: [u8; 16], sampled: bool) -> Request<T> {
    let mut request = Request::new(message);
    let header = format!("00-{}-{}-0{}", hex(&trace), hex(&CALLER), u8::from(sampled));
    request.metadata_mut().insert("traceparent", header.parse().unwrap());
    request
}

#[test]
fn a_collector_gets_what_the_kubelet_traces() {
    isolated("a_collector_gets_what_the_kubelet_traces", || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let collector = Collector::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let service = TraceServiceServer::new(collector.clone());
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        // The log is as quiet as can be: what it shows and what is traced are two things.
        let more_config = format!("[tracing]\nendpoint = \"http://{address}\"\n");
        let mut node = Node::start(Options { handler: "crun".into(), more_config, ..Options::default() });

        let (made, unsampled) = ([7; 16], [8; 16]);
        let pod = client::pod("p", &node.dir.join("logs"));
        let (socket, config) = (node.socket(), client::container("c", BUSYBOX, "exec sleep 4321"));
        runtime.block_on(async {
            let mut client = Client::connect(&socket).await;
            client.pull(BUSYBOX).await;
            let run = RunPodSandboxRequest { config: Some(pod.clone()), ..Default::default() };
            let id = client.runtime.run_pod_sandbox(traced(run, made, true)).await.unwrap().into_inner().pod_sandbox_id;
            let create =
                CreateContainerRequest { pod_sandbox_id: id.clone(), config: Some(config), sandbox_config: Some(pod) };
            let create = traced(create, made, true);
            let container_id = client.runtime.create_container(create).await.unwrap().into_inner().container_id;
            let start = StartContainerRequest { container_id: container_id.clone() };
            client.runtime.start_container(traced(start, made, true)).await.unwrap();
            let exec = ExecSyncRequest { container_id: "none".into(), cmd: vec!["x".into()], timeout: 1 };
            client.runtime.exec_sync(traced(exec, made, true)).await.expect_err("no such container");
            // One whose caller does not trace, and one of a caller that knows of no traces.
            client.runtime.version(traced(VersionRequest::default(), unsampled, false)).await.unwrap();
            client.runtime.version(VersionRequest::default()).await.unwrap();
            let remove = RemovePodSandboxRequest { pod_sandbox_id: id };
            client.runtime.remove_pod_sandbox(traced(remove, made, true)).await.unwrap();
        });

        let arrives = |name: &str| {
            let path = wait_for(name, Duration::from_secs(20), || {
                let path = collector.path(made, name);
                // Its parents end later, and may be in a later message.
                path.last().is_some_and(|top| top.parent_span_id == CALLER).then_some(path)
            });
            path.iter().map(|s| s.name.clone()).collect::<Vec<_>>()
        };
        let service = "runtime.v1.RuntimeService";
        assert_eq!(arrives("crun create"), ["crun create", "create container", &format!("{service}/CreateContainer")]);
        assert_eq!(
            arrives("monitor start"),
            ["monitor start", "start container", &format!("{service}/StartContainer")]
        );
        assert_eq!(arrives("bridge").last().unwrap(), &format!("{service}/RunPodSandbox"), "the network's plugin");
        arrives(&format!("{service}/RemovePodSandbox"));
        let failed = wait_for("the failed call", Duration::from_secs(20), || {
            collector.path(made, &format!("{service}/ExecSync")).into_iter().next()
        });
        assert_eq!(failed.status.clone().unwrap_or_default().code(), StatusCode::Error);
        let code = failed.attributes.iter().find(|a| a.key == "rpc.grpc.status_code").unwrap().value.clone().unwrap();
        assert_eq!(code.value, Some(Value::IntValue(5)), "NOT_FOUND");
        let all = collector.all();
        assert!(all.iter().all(|(service, _)| service == "proxmox-lxcri"));
        assert!(all.iter().all(|(_, s)| s.trace_id == made), "nobody has traced the others");
        assert!(all.iter().all(|(_, s)| s.end_time_unix_nano >= s.start_time_unix_nano));
        node.stop_daemon();
    });
}

/// A CA and a certificate of its own for 127.0.0.1, with its key: PEM.
fn authority(folder: &std::path::Path, name: &str) -> (String, String) {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
    let key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, name);
    std::fs::write(folder.join(format!("{name}.pem")), ca.self_signed(&key).unwrap().pem()).unwrap();
    let (issuer, own) = (Issuer::new(ca, key), KeyPair::generate().unwrap());
    let leaf = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&own, &issuer).unwrap();
    (leaf.pem(), own.serialize_pem())
}

#[test]
fn a_collector_with_tls_has_to_prove_who_it_is() {
    isolated("a_collector_with_tls_has_to_prove_who_it_is", || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let folder = std::path::Path::new("/tmp");
        let (certificate, key) = authority(folder, "right");
        authority(folder, "wrong");
        let collector = Collector::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let identity = tonic::transport::Identity::from_pem(certificate, key);
        let tls = tonic::transport::ServerTlsConfig::new().identity(identity);
        let mut server = tonic::transport::Server::builder().tls_config(tls).unwrap();
        let service = TraceServiceServer::new(collector.clone());
        runtime.spawn(server.add_service(service).serve_with_incoming(TcpListenerStream::new(listener)));
        let calls = |node: &Node, trace: [u8; 16]| {
            let socket = node.socket();
            runtime.block_on(async {
                let mut client = Client::connect(&socket).await;
                client.runtime.version(traced(VersionRequest::default(), trace, true)).await.unwrap();
            });
        };
        let name = "runtime.v1.RuntimeService/Version";
        for (ca, trace, arrives) in [("wrong", [1; 16], false), ("right", [2; 16], true)] {
            let more_config = format!("[tracing]\nendpoint = \"https://{address}\"\nca_file = \"/tmp/{ca}.pem\"\n");
            let mut node = Node::start(Options { more_config, ..Options::default() });
            calls(&node, trace);
            if arrives {
                wait_for("the call's span", Duration::from_secs(20), || {
                    (!collector.path(trace, name).is_empty()).then_some(())
                });
            }
            // What waits is sent, or not, before the daemon has ended.
            node.stop_daemon();
            assert_eq!(!collector.path(trace, name).is_empty(), arrives, "{ca}");
        }
    });
}

/// A collector that is away costs nobody anything.
#[test]
fn a_collector_that_is_away_is_missed_by_nobody() {
    isolated("a_collector_that_is_away_is_missed_by_nobody", || {
        let more_config = "[tracing]\nendpoint = \"http://127.0.0.1:9\"\nsampling_per_million = 1000000\n".to_owned();
        let mut node = Node::start(Options { more_config, ..Options::default() });
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let pod = crictl.run_pod("p");
        let container = crictl.create(&pod, "p", "c", BUSYBOX, "exit 3");
        crictl.run(&["start", &container]);
        assert_eq!(crictl.wait_exit(&container)["exitCode"], 3);
        crictl.run(&["rmp", "-f", &pod]);
        // Within the time that a daemon's end may take.
        node.stop_daemon();
    });
}
