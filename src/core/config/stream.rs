//! `[server.stream]`: where exec, attach and port-forward are served.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use camino::Utf8PathBuf;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::faults::Faults;
use crate::core::error::{Error, Result};

/// The streaming server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stream {
    /// Address to listen on. The kubelet comes to it, nobody else has to.
    pub address: IpAddr,
    /// Port; 0: any free one.
    pub port: u16,
    /// A stream over which nothing goes for so long is ended ("4h", "90s", "1h30m").
    pub idle_timeout: Span,
    /// Certificate chain (PEM); with it and the key, https is served.
    #[schemars(with = "Option<String>")]
    pub tls_cert_file: Option<Utf8PathBuf>,
    /// Its private key (PEM).
    #[schemars(with = "Option<String>")]
    pub tls_key_file: Option<Utf8PathBuf>,
    /// Most streams at a time; over it clients get 503.
    pub max_streams: usize,
}

impl Default for Stream {
    fn default() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            idle_timeout: Span(Duration::from_secs(4 * 3600)),
            tls_cert_file: None,
            tls_key_file: None,
            max_streams: 1000,
        }
    }
}

impl Stream {
    pub(super) fn check(&self, faults: &mut Faults) {
        let (cert, key) = ("server.stream.tls_cert_file", "server.stream.tls_key_file");
        match (&self.tls_cert_file, &self.tls_key_file) {
            (Some(_), None) => faults.with(key, cert, "goes together with tls_cert_file, and is missing"),
            (None, Some(_)) => faults.with(cert, key, "goes together with tls_key_file, and is missing"),
            _ => {}
        }
        faults.absolute(cert, &self.tls_cert_file);
        faults.absolute(key, &self.tls_key_file);
        faults.range("server.stream.max_streams", self.max_streams, 1..=100_000);
        if self.idle_timeout.get().is_zero() {
            faults.add("server.stream.idle_timeout", "more than 0");
        }
    }
}

/// A span of time, written as numbers with units: h, m, s, ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(Duration);

impl JsonSchema for Span {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Span".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^([0-9]+(h|m|s|ms))+$" })
    }
}

impl Span {
    /// As a duration.
    pub fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for Span {
    fn from(span: Duration) -> Self {
        Self(span)
    }
}

impl TryFrom<String> for Span {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        let bad = || Error::invalid(format!("{text:?} is not a span of time such as \"4h\" or \"1h30m\""));
        let (mut rest, mut sum) = (text.as_str(), Duration::ZERO);
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
            let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let ms: u64 = match &rest[..end] {
                "h" => 3_600_000,
                "m" => 60_000,
                "s" => 1000,
                "ms" => 1,
                _ => return Err(bad()),
            };
            let part = Duration::from_millis(number.checked_mul(ms).ok_or_else(bad)?);
            sum = sum.checked_add(part).ok_or_else(bad)?;
            rest = &rest[end..];
        }
        // Ten years; more is a mistake and would not fit a timer.
        let fits = !text.is_empty() && sum <= Duration::from_secs(10 * 365 * 86_400);
        if fits { Ok(Self(sum)) } else { Err(bad()) }
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        let ms = span.0.as_millis();
        let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
        let fits = units.into_iter().find(|(unit, _)| ms != 0 && ms.is_multiple_of(*unit));
        fits.map_or_else(|| format!("{ms}ms"), |(unit, name)| format!("{}{name}", ms / unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::config::Config;

    #[test]
    fn spans() {
        for (text, ms) in [("4h", 14_400_000), ("1h30m", 5_400_000), ("90s", 90_000), ("1s5ms", 1005), ("0s", 0)] {
            let span = Span::try_from(text.to_owned()).expect(text);
            assert_eq!(span.get().as_millis(), ms, "{text}");
            assert_eq!(Span::try_from(String::from(span)).expect("what is written"), span, "{text}");
        }
        for bad in ["", "4", "h", "4 h", "-1s", "4d", "99999999999999999999h", "4hh", "\u{fffd}1h", "9999999h"] {
            assert!(Span::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn half_a_tls_is_refused() {
        let parse = |text: &str| Config::parse(&format!("[server.stream]\n{text}"), "c.toml").map_err(|e| e.chain());
        let config = parse("address = \"::1\"\nport = 1\nidle_timeout = \"1m\"\nmax_streams = 5").expect("good");
        assert_eq!(config.server.stream.idle_timeout.get(), Duration::from_secs(60));
        for (text, word) in [
            ("tls_cert_file = \"/x\"", "tls_key_file"),
            ("tls_key_file = \"/x\"", "tls_cert_file"),
            ("tls_key_file = \"x\"\ntls_cert_file = \"/x\"", "absolute"),
            ("idle_timeout = \"soon\"", "soon"),
            ("idle_timeout = \"0s\"", "idle_timeout"),
            ("max_streams = 0", "max_streams"),
            ("address = \"localhost\"", "address"),
        ] {
            assert!(parse(text).expect_err(text).contains(word), "{text}");
        }
    }
}
