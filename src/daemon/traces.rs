//! Traces: spans of calls and their steps go to a collector by OTLP over gRPC, and are parts of the callers' own traces.
//!
//! Off unless `tracing.endpoint` says where the collector is. A collector that is away costs the spans and nothing else: they wait
//! in a queue of bounded length, which a thread of its own sends.

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Tracer};
use tonic::transport::Endpoint;

use crate::core::blocking::blocking;
use crate::core::config::Tracing;
use crate::core::error::{Error, Kind, Result};

/// Spans that may wait for the collector.
const QUEUE: usize = 2048;
/// How often they are sent, and how long that may take.
const PERIOD: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends spans until it is shut down.
pub(super) struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// None: they are off. Connects when there is something to send.
    pub(super) fn start(config: &Tracing) -> Result<Option<Self>> {
        if config.endpoint.is_empty() {
            return Ok(None);
        }
        let failed = |e: &dyn std::fmt::Display| Error::new(Kind::InvalidArgument, format!("tracing.endpoint: {e}"));
        let channel = Endpoint::from_shared(config.endpoint.clone()).map_err(|e| failed(&e))?;
        let channel = channel.connect_timeout(PATIENCE).timeout(PATIENCE).connect_lazy();
        let exporter = SpanExporter::builder().with_tonic().with_channel(channel).with_timeout(PATIENCE);
        let exporter = exporter.build().map_err(|e| failed(&e))?;
        let batches = BatchConfigBuilder::default().with_max_queue_size(QUEUE).with_scheduled_delay(PERIOD).build();
        let resource = Resource::builder_empty().with_attributes([
            KeyValue::new("service.name", crate::cli::PROGRAM),
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", host_name()),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ]);
        let own = Sampler::TraceIdRatioBased(f64::from(config.sampling_per_million) / 1e6);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .with_sampler(Sampler::ParentBased(Box::new(own)))
            .with_resource(resource.build())
            .build();
        Ok(Some(Self { provider }))
    }

    /// What makes spans of ours into the collector's.
    pub(super) fn tracer(&self) -> Tracer {
        self.provider.tracer(crate::cli::PROGRAM)
    }

    /// Sends what waits.
    pub(super) async fn shutdown(self) {
        let sent = blocking(move || {
            let done = self.provider.shutdown_with_timeout(PATIENCE);
            done.map_err(|e| Error::new(Kind::Unavailable, format!("the last spans were not sent: {e}")))
        });
        if let Err(e) = sent.await {
            tracing::warn!(error = e.chain(), "traces");
        }
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
