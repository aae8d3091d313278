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
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use crate::core::blocking::blocking;
use crate::core::config::Tracing;
use crate::core::error::{Error, Kind, Result};

/// Spans that may wait for the collector.
const QUEUE: usize = 2048;
/// How often they are sent, and how long that may take.
const PERIOD: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);
/// Largest file of certificates, in bytes.
const CA_MAX: u64 = 1 << 20;

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
        let mut channel = Endpoint::from_shared(config.endpoint.clone()).map_err(|e| failed(&e))?;
        if config.endpoint.starts_with("https://") {
            channel = channel.tls_config(tls(config)?).map_err(|e| failed(&e))?;
        }
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

/// How the collector proves who it is: by the CA that is named, else by those that the node trusts.
fn tls(config: &Tracing) -> Result<ClientTlsConfig> {
    let tls = ClientTlsConfig::new();
    let Some(file) = &config.ca_file else { return Ok(tls.with_native_roots()) };
    let read = crate::utils::beneath::read_file("/".as_ref(), file.as_std_path(), CA_MAX);
    let pem = read.map_err(|e| Error::io(format!("tracing.ca_file: read {file}"), e))?;
    let certificates = CertificateDer::pem_slice_iter(&pem).collect::<std::result::Result<Vec<_>, _>>();
    if !certificates.is_ok_and(|all| !all.is_empty()) {
        return Err(Error::invalid(format!("tracing.ca_file: {file} has no certificate in it (PEM)")));
    }
    Ok(tls.ca_certificate(Certificate::from_pem(pem)))
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_of_certificates_that_is_none_is_told_by_its_key() {
        let of = |file: &str| Tracing {
            endpoint: "https://127.0.0.1:4317".into(),
            ca_file: Some(file.into()),
            sampling_per_million: 0,
        };
        for file in ["/no/such/ca.pem", "/proc/version", "/dev/null"] {
            let e = Traces::start(&of(file)).err().expect(file);
            assert!(e.chain().contains("tracing.ca_file") && e.chain().contains(file), "{}", e.chain());
        }
        let trusted = Tracing { endpoint: "https://127.0.0.1:4317".into(), ..Tracing::default() };
        assert!(Traces::start(&trusted).expect("the node's own").is_some());
    }
}
