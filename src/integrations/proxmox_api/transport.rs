//! One call of the API: encoding, authentication, failover between endpoints, repetition of what is safe to repeat.
//!
//! Called by the operations of this folder. Fails with [`ApiError`], which never holds a secret. A caller that goes away
//! leaves a request that was sent to its own end on the node.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Client, Method, Response, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::auth::{Auth, TicketAnswer};
use super::error::{ApiError, ErrorKind};
use super::lanes::{Lanes, Permit};
use super::{retry, tls};
use crate::core::config::Proxmox as Settings;
use crate::core::error::{Error, Kind};
use crate::core::metrics::metrics;

/// Largest answer in bytes.
const MAX_ANSWER: usize = 32 << 20;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// What stands in a path as it is.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// Parameters whose values may be secrets: they are cut out of what the API says about them.
const SECRETS: [&str; 6] = ["password", "cipassword", "otp", "env", "input-data", "content"];

/// Names and values of a call.
pub type Form = Vec<(String, String)>;

/// A client of one cluster's API. Cheap to clone; all clones share queues and connections.
#[derive(Clone)]
pub struct Proxmox(pub(super) Arc<Inner>);

pub(super) struct Inner {
    endpoints: Vec<Url>,
    current: AtomicUsize,
    http: Client,
    pub(super) auth: Auth,
    lanes: Lanes,
    pub(super) settings: Settings,
    /// See [`Proxmox::clock_ahead`]; the least number: not known.
    ahead: AtomicI64,
}

impl std::fmt::Debug for Proxmox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let endpoints: Vec<_> = self.0.endpoints.iter().map(Url::as_str).collect();
        f.debug_struct("Proxmox").field("endpoints", &endpoints).finish_non_exhaustive()
    }
}

/// A path below `/api2/json`, each part encoded.
pub(super) fn path(parts: &[&str]) -> String {
    parts.iter().map(|p| format!("/{}", utf8_percent_encode(p, PATH))).collect()
}

/// Names and values as `application/x-www-form-urlencoded`: everything that could separate is encoded.
pub(super) fn encode(form: &[(String, String)]) -> String {
    let enc = |text: &str| utf8_percent_encode(text, PATH).to_string();
    form.iter().map(|(name, value)| format!("{}={}", enc(name), enc(value))).collect::<Vec<_>>().join("&")
}

impl Proxmox {
    /// A client as the configuration says. Reads secrets and certificates; connects to nothing.
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        if !settings.enabled() {
            return Err(Error::precondition("the Proxmox API is not configured: proxmox.endpoints is empty"));
        }
        let parse = |text: &String| {
            Url::parse(text)
                .map_err(|e| Error::because(Kind::InvalidArgument, format!("proxmox.endpoints: {text:?}"), e))
        };
        let endpoints = settings.endpoints.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        let http = Client::builder()
            .user_agent(concat!("proxmox-lxcri/", env!("CARGO_PKG_VERSION")))
            .tls_backend_preconfigured(tls::config(settings)?)
            .https_only(true)
            .http1_only()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(CONNECT.min(settings.timeout.get()))
            // pveproxy closes idle connections after a few seconds.
            .pool_idle_timeout(Duration::from_secs(4))
            .pool_max_idle_per_host(4)
            .build()
            .map_err(|e| Error::because(Kind::Internal, "HTTP client for the Proxmox API", e))?;
        Ok(Self(Arc::new(Inner {
            endpoints,
            current: AtomicUsize::new(0),
            http,
            auth: Auth::load(settings)?,
            lanes: Lanes::new(settings.task_timeout.get()),
            settings: settings.clone(),
            ahead: AtomicI64::new(i64::MIN),
        })))
    }

    /// The node that we are on.
    pub fn node(&self) -> String {
        let configured = &self.0.settings.node;
        if !configured.is_empty() {
            return configured.clone();
        }
        let name = rustix::system::uname();
        name.nodename().to_string_lossy().split('.').next().unwrap_or_default().to_owned()
    }

    /// Seconds that the server's clock was ahead of ours at its last answer; None: it has not said what time it is there.
    pub fn clock_ahead(&self) -> Option<i64> {
        Some(self.0.ahead.load(Ordering::Relaxed)).filter(|s| *s != i64::MIN)
    }

    fn note_clock(&self, response: &Response) {
        let date = response.headers().get(header::DATE).and_then(|v| v.to_str().ok());
        let Some(theirs) = date.and_then(|d| httpdate::parse_http_date(d).ok()) else { return };
        let seconds =
            |t: std::time::SystemTime| t.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs().cast_signed());
        self.0.ahead.store(seconds(theirs) - seconds(std::time::SystemTime::now()), Ordering::Relaxed);
    }

    /// Longest time for a task, and in a queue for it.
    pub fn task_patience(&self) -> Duration {
        self.0.settings.task_timeout.get()
    }

    /// Longest time for one request.
    pub fn patience(&self) -> Duration {
        self.0.settings.timeout.get()
    }

    /// Folder with the states of this node's running containers.
    pub fn lxc_path(&self) -> &camino::Utf8Path {
        &self.0.settings.lxc_path
    }

    /// A place in the node's queue for changes.
    pub(super) async fn node_lane(&self, node: &str, call: &str) -> Result<Permit, ApiError> {
        self.0.lanes.enter(&format!("node {node}"), self.0.settings.max_parallel, true, call).await
    }

    /// A place in its queue for what stops and deletes, which does not wait for what is made.
    pub(super) async fn end_lane(&self, node: &str, call: &str) -> Result<Permit, ApiError> {
        let name = format!("what ends on node {node}");
        self.0.lanes.enter(&name, self.0.settings.max_parallel, true, call).await
    }

    /// A place in the queue of a storage of the node. Taken before the node's, so that who waits holds nothing else.
    pub(super) async fn storage_lane(&self, node: &str, storage: &str, call: &str) -> Result<Permit, ApiError> {
        let name = format!("storage {storage} of node {node}");
        self.0.lanes.enter(&name, self.0.settings.max_parallel_creates, false, call).await
    }

    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str, form: Form) -> Result<T, ApiError> {
        self.call(Method::GET, path, form).await
    }

    pub(super) async fn post<T: DeserializeOwned>(&self, path: &str, form: Form) -> Result<T, ApiError> {
        self.call(Method::POST, path, form).await
    }

    pub(super) async fn put<T: DeserializeOwned>(&self, path: &str, form: Form) -> Result<T, ApiError> {
        self.call(Method::PUT, path, form).await
    }

    pub(super) async fn delete<T: DeserializeOwned>(&self, path: &str, form: Form) -> Result<T, ApiError> {
        self.call(Method::DELETE, path, form).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, form: Form) -> Result<T, ApiError> {
        let name = format!("{method} {path}");
        let start = Instant::now();
        let done = self.repeat(&method, path, &form, &name).await.and_then(|data| self.typed(&name, data));
        metrics().proxmox_called(start, method.as_str(), done.as_ref().err().map(|e| e.kind().word().to_owned()));
        done
    }

    /// The data as what is expected.
    fn typed<T: DeserializeOwned>(&self, name: &str, data: Value) -> Result<T, ApiError> {
        T::deserialize(data).map_err(|e| {
            let why = self.0.auth.redact(format!("an answer that can't be understood: {e}"));
            ApiError::new(ErrorKind::Protocol, name, why)
        })
    }

    /// Tries until it is done, or may not be tried again.
    async fn repeat(&self, method: &Method, path: &str, form: &Form, name: &str) -> Result<Value, ApiError> {
        let (mut tries, mut renewed) = (0, false);
        let count = self.0.endpoints.len();
        loop {
            let at = self.0.current.load(Ordering::Relaxed) % count;
            let (e, with) = match self.once(&self.0.endpoints[at], method, path, form, name).await {
                (Ok(value), _) => return Ok(value),
                (Err(e), with) => (e, with),
            };
            // 401 means that nothing was done: once more with another secret or ticket.
            if let Some(with) = with.filter(|_| *e.kind() == ErrorKind::Auth && !renewed) {
                renewed = true;
                if self.0.auth.renew(with) {
                    continue;
                }
            }
            tries += 1;
            let next = match with {
                Some(_) => retry::next(e.kind(), method == Method::GET, tries, count as u32),
                None => retry::without_login(e.kind(), tries, count as u32),
            };
            if next == retry::Next::Give {
                return Err(e);
            }
            tracing::debug!(endpoint = self.0.endpoints[at].as_str(), error = %e, tries, "Proxmox call is tried again");
            if *e.kind() != ErrorKind::Busy && count > 1 {
                let _ = self.0.current.compare_exchange(at, (at + 1) % count, Ordering::Relaxed, Ordering::Relaxed);
            }
            if next == retry::Next::Later {
                tokio::time::sleep(retry::wait(tries)).await;
            }
        }
    }

    /// Headers that authenticate, and which secret or ticket they have; gets or renews a ticket where one is needed.
    async fn headers(&self, endpoint: &Url, name: &str) -> Result<(HeaderMap, u64), ApiError> {
        if let Some(headers) = self.0.auth.headers() {
            return Ok(headers);
        }
        let unfit = || ApiError::new(ErrorKind::Auth, name, "the secret is not fit for a header").unsent();
        let Auth::Ticket { login, .. } = &self.0.auth else { return Err(unfit()) };
        // One logs in for all that wait. Whoever waits longer than for one login has nothing of a place in the queue.
        let (asked, limit) = (Instant::now(), self.0.settings.timeout.get());
        let late = |_| {
            let why = format!("no ticket within {} s", limit.as_secs_f32());
            ApiError::new(ErrorKind::Timeout, name, why).unsent()
        };
        let mut last = tokio::time::timeout(limit, login.lock()).await.map_err(late)?;
        if let Some(headers) = self.0.auth.headers() {
            return Ok(headers);
        }
        if let Some((_, kind, why)) = last.failed.as_ref().filter(|(at, ..)| *at > asked) {
            return Err(ApiError::new(kind.clone(), name, why).unsent());
        }
        match tokio::time::timeout(limit, self.log_in(endpoint)).await.map_err(late).flatten() {
            Ok(()) => self.0.auth.headers().ok_or_else(unfit),
            Err(e) => {
                last.failed = Some((Instant::now(), e.kind().clone(), e.message().to_owned()));
                Err(e.unsent())
            }
        }
    }

    /// Another ticket.
    async fn log_in(&self, endpoint: &Url) -> Result<(), ApiError> {
        let Auth::Ticket { user, password, .. } = &self.0.auth else { return Ok(()) };
        let name = "POST /access/ticket";
        // The old ticket renews itself; one that has run out needs the password again.
        let old = self.0.auth.old_ticket();
        let mut last = None;
        for secret in old.iter().chain([password]) {
            let form = vec![("username".to_owned(), user.clone()), ("password".to_owned(), secret.reveal().to_owned())];
            match self.send(endpoint, &Method::POST, "/access/ticket", &form, name, HeaderMap::new()).await {
                Ok(data) => {
                    // Without the words of what is wrong with it, which may have the ticket among them.
                    let answer = TicketAnswer::deserialize(data).map_err(|_| "an answer that can't be understood");
                    let fresh = answer.and_then(TicketAnswer::ticket);
                    self.0.auth.hold(fresh.map_err(|why| ApiError::new(ErrorKind::Auth, name, why))?);
                    return Ok(());
                }
                Err(e) if *e.kind() == ErrorKind::Auth => last = Some(e),
                Err(e) => return Err(e),
            }
        }
        Err(last.unwrap_or_else(|| ApiError::new(ErrorKind::Auth, name, "there is no password")))
    }

    /// One try; the second is which secret or ticket it was sent with.
    async fn once(
        &self,
        to: &Url,
        method: &Method,
        path: &str,
        form: &Form,
        name: &str,
    ) -> (Result<Value, ApiError>, Option<u64>) {
        match self.headers(to, name).await {
            Ok((headers, with)) => (self.send(to, method, path, form, name, headers).await, Some(with)),
            Err(e) => (Err(e), None),
        }
    }

    /// One request to one endpoint.
    async fn send(
        &self,
        endpoint: &Url,
        method: &Method,
        path: &str,
        form: &Form,
        name: &str,
        headers: HeaderMap,
    ) -> Result<Value, ApiError> {
        let mut url = format!("{}/api2/json{path}", endpoint.as_str().trim_end_matches('/'));
        let text = encode(form);
        // A body on GET or DELETE is refused; without Content-Length so is one on POST and PUT.
        let body = matches!(*method, Method::POST | Method::PUT).then_some(text.clone());
        if body.is_none() && !text.is_empty() {
            url.push('?');
            url.push_str(&text);
        }
        let mut request = self.0.http.request(method.clone(), url).headers(headers);
        if let Some(body) = body {
            let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
            request = request.header(header::CONTENT_TYPE, kind).body(body);
        }
        let secrets = form.iter().filter(|(n, _)| SECRETS.contains(&n.as_str())).map(|(_, v)| v.as_str());
        let secrets: Vec<&str> = secrets.filter(|v| !v.is_empty()).collect();
        self.finish(request, name, &secrets, self.0.settings.timeout.get()).await
    }

    /// Sends and reads the answer within `limit`.
    async fn finish(
        &self,
        request: reqwest::RequestBuilder,
        name: &str,
        secrets: &[&str],
        limit: Duration,
    ) -> Result<Value, ApiError> {
        let exchange = async {
            let response = request.send().await.map_err(|e| unsent(name, e))?;
            self.read(response, name, secrets).await
        };
        let late = |_| {
            let why = format!("no answer within {} s", limit.as_secs_f32());
            ApiError::new(ErrorKind::Timeout, name, why)
        };
        tokio::time::timeout(limit, exchange).await.map_err(late)?
    }

    async fn read(&self, mut response: Response, name: &str, secrets: &[&str]) -> Result<Value, ApiError> {
        let status = response.status();
        self.note_clock(&response);
        let reason = response.extensions().get::<hyper::ext::ReasonPhrase>();
        let reason = reason.map(|r| String::from_utf8_lossy(r.as_bytes()).into_owned());
        let reason = reason.unwrap_or_else(|| status.canonical_reason().unwrap_or_default().to_owned());
        let mut body = Vec::new();
        loop {
            match response.chunk().await {
                Ok(None) => break,
                Ok(Some(piece)) if body.len() + piece.len() <= MAX_ANSWER => body.extend_from_slice(&piece),
                Ok(Some(_)) => return Err(ApiError::new(ErrorKind::Protocol, name, "an answer of more than 32 MiB")),
                Err(e) => {
                    let e = e.without_url();
                    return Err(ApiError::new(ErrorKind::NoAnswer, name, "the connection broke").because(e));
                }
            }
        }
        #[derive(Deserialize, Default)]
        struct Answer {
            #[serde(default)]
            data: Value,
            message: Option<String>,
            #[serde(default)]
            errors: BTreeMap<String, Value>,
        }
        let answer = serde_json::from_slice::<Answer>(&body);
        if status.is_success() {
            return answer.map(|a| a.data).map_err(|_| {
                ApiError::new(ErrorKind::Protocol, name, format!("answer {status} is no JSON with data"))
            });
        }
        let answer = answer.unwrap_or_default();
        let clean = |text: String| {
            let text = secrets.iter().fold(self.0.auth.redact(text), |text, s| text.replace(s, "[secret]"));
            plain(&text)
        };
        let message = answer.message.filter(|m| !m.trim().is_empty()).unwrap_or(reason);
        let message = if message.is_empty() { format!("answer {}", status.as_u16()) } else { message };
        let errors = answer.errors.into_iter().map(|(k, v)| (k, clean(super::lenient::as_string(&v))));
        Err(ApiError::answer(name, status.as_u16(), clean(message), errors.collect()))
    }

    /// POST of a file as `multipart/form-data`, the file last. Never repeated.
    pub(super) async fn upload(
        &self,
        path: &str,
        fields: Form,
        (file_name, file, size): (&str, tokio::fs::File, u64),
    ) -> Result<Value, ApiError> {
        let name = format!("POST {path}");
        let at = self.0.current.load(Ordering::Relaxed) % self.0.endpoints.len();
        let endpoint = &self.0.endpoints[at];
        let (mut headers, _) = self.headers(endpoint, &name).await?;
        headers.remove(header::CONTENT_LENGTH);
        let stream = tokio_util::io::ReaderStream::with_capacity(file, 256 << 10);
        let part = reqwest::multipart::Part::stream_with_length(reqwest::Body::wrap_stream(stream), size);
        let part = part.file_name(file_name.to_owned());
        let mut form = reqwest::multipart::Form::new();
        for (field, value) in fields {
            form = form.text(field, value);
        }
        let url = format!("{}/api2/json{path}", endpoint.as_str().trim_end_matches('/'));
        let request = self.0.http.post(url).headers(headers).multipart(form.part("filename", part));
        self.finish(request, &name, &[], self.0.settings.task_timeout.get()).await
    }
}

/// What a foreign server says is not to fill a log, nor to steer a terminal.
pub(super) fn plain(text: &str) -> String {
    text.chars().take(2000).filter(|c| !c.is_control() || *c == '\n').collect()
}

/// A request without an answer: was it sent?
fn unsent(name: &str, e: reqwest::Error) -> ApiError {
    let e = e.without_url();
    if let Some(why) = tls::certificate_fault(&e) {
        let why = format!("the endpoint's certificate is not accepted: {why}");
        return ApiError::new(ErrorKind::Certificate, name, why).because(e);
    }
    if e.is_connect() {
        return ApiError::new(ErrorKind::Unreachable, name, "no connection").because(e);
    }
    ApiError::new(ErrorKind::NoAnswer, name, "the connection broke before an answer").because(e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_and_paths() {
        let form = [("tags", "a;b"), ("net0", "name=eth0,bridge=b"), ("env", "A=1\0B=x y")];
        let form: Form = form.map(|(a, b)| (a.to_owned(), b.to_owned())).to_vec();
        assert_eq!(encode(&form), "tags=a%3Bb&net0=name%3Deth0%2Cbridge%3Db&env=A%3D1%00B%3Dx%20y");
        let upid = "UPID:pve1:1:2:3:vzcreate:100:a@pve!tok:";
        let p = path(&["nodes", "pve1", "tasks", upid]);
        assert_eq!(p, "/nodes/pve1/tasks/UPID%3Apve1%3A1%3A2%3A3%3Avzcreate%3A100%3Aa%40pve%21tok%3A");
        assert_eq!(path(&["a/../b", "ä"]), "/a%2F..%2Fb/%C3%A4");
    }
}
