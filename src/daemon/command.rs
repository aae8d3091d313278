//! `serve`: the daemon. Locks its folders, takes up what is there, serves both sockets until SIGTERM or SIGINT.
//!
//! Its end, tidy or not, leaves pods running: monitors hold them, and the next daemon finds them.

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use clap::{Arg, ArgMatches};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use super::reload::{self, Level};
use super::traces::Traces;
use super::wire;
use crate::cli::{Command, Context};
use crate::core::config::{Config, LogFormat, Sources};
use crate::core::engine::Scope;
use crate::core::error::Error;
use crate::core::spec::Owner;
use crate::cri::streaming::Streaming;
use crate::cri::{Front, server};
use crate::utils::trace;

/// How long requests under way may take to end when the daemon is told to end: a stop with a long grace, a pull.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the answers to those that were cut off may take.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// The command.
pub struct Serve;

#[async_trait::async_trait]
impl Command for Serve {
    fn name(&self) -> &'static str {
        "serve"
    }
    fn about(&self) -> &'static str {
        "Run the daemon"
    }
    fn arguments(&self) -> Vec<Arg> {
        Vec::new()
    }
    async fn run(&self, context: &Context, _: &ArgMatches) -> Result<u8> {
        let traces = Traces::start(&context.config.tracing).map_err(plain)?;
        let level = start_logging(&context.config, traces.as_ref())?;
        // Credentials and what is typed into containers are in memory: no core file has them. exec undoes it, so that
        // containers are as free as ever.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
        let served = serve(context.config.clone(), context.sources.clone(), Arc::new(level)).await;
        if let Some(traces) = traces {
            traces.shutdown().await;
        }
        served.map(|()| 0)
    }
}

fn start_logging(config: &Config, traces: Option<&Traces>) -> Result<Level> {
    let (filter, level) = Level::new(&config.log.level).map_err(plain)?;
    let lines =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match config.log.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
        LogFormat::Journald => {
            tracing_journald::layer().context("log.format = \"journald\": the journal's socket")?.boxed()
        }
    };
    let of_traces = |metadata: &tracing::Metadata<'_>| metadata.target() == trace::TARGET;
    let log = lines.with_filter(filter.and(filter_fn(move |m| !of_traces(m))));
    let traces = traces.map(|t| {
        let spans = tracing_opentelemetry::layer().with_tracer(t.tracer());
        spans.with_location(false).with_threads(false).with_tracked_inactivity(false).with_filter(filter_fn(of_traces))
    });
    tracing_subscriber::registry().with(log).with(traces).init();
    Ok(level)
}

fn plain(e: Error) -> anyhow::Error {
    anyhow!(e.chain())
}

/// A few descriptors are held for each container, and a shell's limit is small. What containers may have is their own affair.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(error = %e, "the limit of open files stays as it is");
    }
}

async fn serve(config: Config, sources: Sources, level: Arc<Level>) -> Result<()> {
    raise_descriptor_limit();
    let stop = stop_on_signals()?;
    let hangups = reload::listen().map_err(plain)?;
    let wired = wire(&config).await.map_err(plain)?;
    wired.tasks.spawn_cancellable("reload", reload::on_hangups(hangups, sources, config.clone(), level.clone()));
    let config = Arc::new(config);
    let streaming = Streaming::start(&config.server.stream, wired.engine.clone(), wired.tasks.clone());
    let streaming = streaming.await.map_err(plain)?;
    if let Some(listener) = super::metrics::listen(&config.metrics).await.map_err(plain)? {
        let work = super::metrics::serve(listener, wired.engine.clone(), wired.tasks.clone());
        wired.tasks.spawn_cancellable("metrics", work);
    }
    let front = |owner, scope| Front {
        engine: wired.engine.clone(),
        scope,
        owner,
        streaming: streaming.clone(),
        config: config.clone(),
        cgroup_driver: wired.cgroup_driver,
        level: level.clone(),
        info: Arc::default(),
    };
    let (listen, local_listen) = (&config.server.listen, &config.server.local_listen);
    let cri = server::bind(listen).map_err(plain)?;
    let local = server::bind(local_listen).map_err(plain)?;
    tracing::info!(%listen, %local_listen, pid = std::process::id(), "serving");
    notify_ready();
    if let Some(limit) = sd_notify::watchdog_enabled() {
        wired.tasks.spawn_cancellable("watchdog", super::watchdog::feed(wired.engine.clone(), limit));
    }
    let mut serving = std::pin::pin!(async {
        tokio::try_join!(
            server::serve(front(Owner::Cri, Scope::Cri), cri, false, stop.clone()),
            server::serve(front(Owner::Local, Scope::Local), local, true, stop.clone()),
        )
    });
    let overdue = async {
        stop.cancelled().await;
        notify(&[sd_notify::NotifyState::Stopping]);
        tokio::time::sleep(PATIENCE).await;
    };
    let served = tokio::select! {
        served = &mut serving => served.map(|_| ()),
        () = overdue => {
            tracing::warn!(after = ?PATIENCE, "requests are still under way: they are cut off, whoever asked asks again");
            wired.tasks.shutdown().await;
            // Those that were cut off are answered.
            tokio::time::timeout(LAST_ANSWERS, serving).await.unwrap_or(Ok(((), ()))).map(|_| ())
        }
    };
    wired.tasks.shutdown().await;
    if let Err(e) = wired.engine.sync_records().await {
        tracing::error!(error = e.chain(), "records may not outlive a power cut");
    }
    for socket in [listen, local_listen] {
        let _ = std::fs::remove_file(socket);
    }
    tracing::info!("stopped; pods run on");
    served.map_err(plain)
}

/// Tells systemd, where it started us.
pub(super) fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(states) {
        tracing::warn!(error = %e, "systemd can't be told");
    }
}

/// Tells systemd that the configuration is read again; [`notify_ready`] ends it.
pub(super) fn notify_reloading() {
    match sd_notify::NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[sd_notify::NotifyState::Reloading, now]),
        Err(e) => tracing::warn!(error = %e, "systemd can't be told of the reload"),
    }
}

/// Tells systemd that we serve.
pub(super) fn notify_ready() {
    notify(&[sd_notify::NotifyState::Ready]);
}

/// Cancelled by the first SIGTERM or SIGINT.
fn stop_on_signals() -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    crate::utils::tasks::TaskSet::new("signals").spawn("signals", async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
}
