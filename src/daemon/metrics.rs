//! The metrics' listener: `GET /metrics` in Prometheus' text format, on an address of its own, where `[metrics]` turns it on.
//!
//! Nobody has to say who he is: the address is this machine's own unless the operator says otherwise. What is counted is in
//! `core::metrics`; what there is (pods, images, storage) is measured when somebody asks, from memory. A few connections at a
//! time, each for a short while. A port that is taken is an error at the start.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::{EncodeLabelSet, prometheus_text};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::core::config;
use crate::core::engine::{Engine, Scope};
use crate::core::error::{Error, Result};
use crate::core::metrics::metrics;
use crate::utils::tasks::TaskSet;

/// Connections at a time.
const CONNECTIONS: usize = 8;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// After a failure to accept there is a pause.
const PAUSE: Duration = Duration::from_millis(200);
/// As Prometheus calls it.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Listens where the configuration says; None: nowhere.
pub(super) async fn listen(settings: &config::Metrics) -> Result<Option<TcpListener>> {
    if !settings.enabled {
        return Ok(None);
    }
    let address = settings.address;
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|e| Error::io(format!("metrics.address: listen on {address}"), e))?;
    if let Ok(bound) = listener.local_addr() {
        tracing::info!(address = %bound, "serving metrics");
    }
    Ok(Some(listener))
}

/// Answers until the set of tasks is shut down.
pub(super) async fn serve(listener: TcpListener, engine: Engine, tasks: TaskSet) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // Who comes when all are taken waits in the kernel's queue.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let engine = engine.clone();
                tasks.spawn_cancellable("metrics connection", async move {
                    let _place = place;
                    let _ = tokio::time::timeout(PATIENCE, connection(stream, engine)).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the metrics' listener can't accept");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, engine: Engine) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let answer = answer(&request, &engine);
        std::future::ready(Ok::<_, Infallible>(answer))
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a connection for metrics broke");
    }
}

fn answer(request: &Request<Incoming>, engine: &Engine) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| {
        let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
        *answer.status_mut() = status;
        answer
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => match text(engine) {
            Ok(text) => {
                let mut answer = Response::new(Full::new(Bytes::from(text)));
                answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(CONTENT_TYPE));
                answer
            }
            Err(error) => {
                tracing::error!(%error, "metrics can't be written");
                plain(StatusCode::INTERNAL_SERVER_ERROR, "metrics can't be written: see the log\n")
            }
        },
        (_, "/metrics") => plain(StatusCode::METHOD_NOT_ALLOWED, "GET /metrics\n"),
        _ => plain(StatusCode::NOT_FOUND, "GET /metrics\n"),
    }
}

/// Who made it and where in its life it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct OfPod {
    owner: String,
    handler: String,
    phase: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
struct OfContainer {
    phase: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfStorage {
    driver: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// A word as serde writes it: "notready".
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

fn counted<L: Ord + Clone + std::hash::Hash + Eq>(labels: impl Iterator<Item = L>) -> Family<L, Gauge> {
    let mut counts: BTreeMap<L, i64> = BTreeMap::new();
    labels.for_each(|l| *counts.entry(l).or_default() += 1);
    let family: Family<L, Gauge> = Family::default();
    for (labels, n) in counts {
        family.get_or_create(&labels).set(n);
    }
    family
}

fn gauge(value: u64) -> Gauge {
    let gauge: Gauge = Gauge::default();
    gauge.set(value.try_into().unwrap_or(i64::MAX));
    gauge
}

fn text(engine: &Engine) -> std::result::Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("proxmox_lxcri");
    metrics().register(&mut registry);
    let pods = engine.pods(Scope::Local);
    let of_pod = |p: &Arc<crate::core::records::PodRecord>| OfPod {
        owner: word(&p.owner),
        handler: p.handler.clone(),
        phase: word(&p.phase),
    };
    registry.register("pods", "Pods by who made them, handler and phase", counted(pods.iter().map(of_pod)));
    let monitors = pods.iter().filter(|p| engine.monitor_pid(&p.id).is_some()).count();
    registry.register("monitors", "Monitors that are connected", gauge(monitors as u64));
    let containers = engine.containers(Scope::Local);
    let of_container = |c: &Arc<crate::core::records::ContainerRecord>| OfContainer { phase: word(&c.phase) };
    registry.register("containers", "Containers by phase", counted(containers.iter().map(of_container)));
    registry.register("images", "Images that are listed", gauge(engine.images().list().len() as u64));
    let (_, used) = engine.images().usage();
    let labels = OfStorage { driver: engine.layers().driver().to_owned() };
    let storage: Family<OfStorage, Gauge> = Family::default();
    storage.get_or_create(&labels).set(used.bytes.try_into().unwrap_or(i64::MAX));
    registry.register_with_unit("storage_used", "What images and containers take", Unit::Bytes, storage);
    let ready: Family<OfStorage, Gauge> = Family::default();
    ready.get_or_create(&labels).set(i64::from(engine.layers().trouble().is_none()));
    registry.register("storage_ready", "1 where the store has no trouble, as the condition StorageReady", ready);
    let build: Family<Build, Gauge> = Family::default();
    build.get_or_create(&Build { version: env!("CARGO_PKG_VERSION") }).set(1);
    registry.register("build_info", "1, with the daemon's version", build);
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}
