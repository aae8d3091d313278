//! One host: requests with authentication, redirects and time limits.
//!
//! Called by the session. Credentials go to the host they are for and to the token server it names, never to where a
//! redirect leads. Fails with [`RegistryError`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Certificate, Client, Identity, Method, Response, StatusCode, Url};
use serde::Deserialize;

use super::auth::{Challenge, Credentials, parse_challenge};
use super::error::RegistryError;
use super::hosts::{Host, Tls, authority};
use super::keychain::Keychain;
use super::proxy::{Clients, Way};
use super::tokens::{self, Tokens};
use crate::core::reference::{Reference, is_loopback};

/// Redirects followed in one request.
const MAX_REDIRECTS: usize = 5;
/// Largest answer of a token server in bytes.
const MAX_TOKEN: u64 = 1 << 20;
/// How much of an error's body is read for its message, in bytes.
const MAX_ERROR: u64 = 64 << 10;
/// How often a host that is overloaded, or about to come back, is asked again.
const MAX_REPEATS: u32 = 3;
/// How often one request answers a challenge.
const MAX_CHALLENGES: u32 = 2;
/// Wait before the first repeat where the host names none; doubled for each further one.
const REPEAT_AFTER: Duration = Duration::from_millis(500);
/// Largest certificate or key file in bytes.
const MAX_PEM: u64 = 1 << 20;

/// A host with its client and the authorization that worked last.
pub(super) struct Connection {
    pub host: Host,
    clients: Arc<Clients>,
    tokens: Arc<Tokens>,
    /// The caller's.
    given: Credentials,
    /// The node's, where the caller gave none.
    keychain: Arc<Keychain>,
    credentials: tokio::sync::OnceCell<Credentials>,
    repository: String,
    /// The registry in the image's name, for mirrors that serve several.
    namespace: Option<String>,
    /// There is no other host to ask instead.
    last: bool,
    pub(super) progress: Duration,
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// One question to a host.
#[derive(Clone, Copy)]
pub(super) struct Ask<'a> {
    /// Below the API's base.
    pub path: &'a str,
    /// Media types.
    pub accept: &'a str,
    /// For messages.
    pub what: &'a str,
    /// First byte that is wanted; what is before it is there.
    pub from: u64,
}

/// A request that changes something.
pub(super) struct Call<'a> {
    pub method: Method,
    pub headers: HeaderMap,
    /// For messages.
    pub what: &'a str,
}

/// An HTTP client with `tls`'s settings that takes this way.
pub(super) fn client(tls: &Tls, host: &str, connect: Duration, way: &Way) -> Result<Client, RegistryError> {
    let setup = |what: String, source: Box<dyn std::error::Error + Send + Sync>| RegistryError::Setup {
        host: host.to_owned(),
        what,
        source,
    };
    let read = |path: &camino::Utf8Path| -> Result<Vec<u8>, RegistryError> {
        let failed = |e: std::io::Error| setup(format!("reading {path}"), e.into());
        let size = std::fs::metadata(path).map_err(failed)?.len();
        if size > MAX_PEM {
            return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
        }
        std::fs::read(path).map_err(failed)
    };
    let mut builder = Client::builder()
        .user_agent(concat!("proxmox-lxcri/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(connect)
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .pool_max_idle_per_host(4)
        .tls_danger_accept_invalid_certs(tls.skip_verify);
    builder = match way {
        Way::Environment => builder,
        Way::Direct => builder.no_proxy(),
        Way::Proxy(url) => {
            let proxy = reqwest::Proxy::all(url.clone()).map_err(|e| setup(format!("the proxy {url}"), e.into()))?;
            builder.proxy(proxy)
        }
        Way::Socket(path) => builder.no_proxy().unix_socket(path.as_std_path()),
    };
    let mut roots = Vec::new();
    for path in &tls.ca {
        let pem = read(path)?;
        let certificates =
            Certificate::from_pem_bundle(&pem).map_err(|e| setup(format!("CA certificates in {path}"), e.into()))?;
        roots.extend(certificates);
    }
    if !roots.is_empty() {
        builder = builder.tls_certs_merge(roots);
    }
    if let Some((certificate, key)) = &tls.client {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        let identity =
            Identity::from_pem(&pem).map_err(|e| setup(format!("client certificate {certificate}"), e.into()))?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|e| setup("making an HTTP client".into(), e.into()))
}

impl Connection {
    pub(super) fn new(
        host: Host,
        clients: Arc<Clients>,
        tokens: Arc<Tokens>,
        given: Credentials,
        keychain: Arc<Keychain>,
        reference: &Reference,
        progress: Duration,
    ) -> Self {
        let namespace = (!host.upstream).then(|| reference.registry().to_owned());
        Self {
            host,
            clients,
            tokens,
            given,
            keychain,
            credentials: tokio::sync::OnceCell::new(),
            repository: reference.repository().to_owned(),
            namespace,
            last: false,
            progress,
            authorization: tokio::sync::Mutex::new(None),
        }
    }

    /// Says that no other host can be asked instead: it is asked again when it is overloaded.
    pub(super) fn set_last(&mut self) {
        self.last = true;
    }

    fn protocol(&self, what: &str, why: impl Into<String>) -> RegistryError {
        RegistryError::Protocol { host: self.host.name(), what: what.to_owned(), why: why.into() }
    }

    /// GET; answers with a successful response, authenticated if it had to be. An overloaded host is asked again where
    /// there is no other one, after the time that it names.
    pub(super) async fn get(&self, ask: Ask<'_>) -> Result<Response, RegistryError> {
        for repeat in 0.. {
            let response = self.get_once(ask).await?;
            let busy = matches!(response.status().as_u16(), 429 | 502 | 503 | 504);
            let wait = retry_after(response.headers()).unwrap_or(REPEAT_AFTER * 2_u32.pow(repeat));
            if !busy || !self.last || repeat >= MAX_REPEATS || wait > self.progress {
                return self.successful(response, ask.what).await;
            }
            tracing::debug!(host = self.host.name(), what = ask.what, status = %response.status(), ?wait, "asked again");
            tokio::time::sleep(wait).await;
        }
        unreachable!("the last repeat returns")
    }

    /// A URL of the host's API.
    pub(super) fn url(&self, path: &str, what: &str) -> Result<Url, RegistryError> {
        Url::parse(&format!("{}/{path}", self.host.base.as_str().trim_end_matches('/')))
            .map_err(|e| self.protocol(what, e.to_string()))
    }

    /// The headers of a request to this host.
    fn own_headers(&self, headers: &mut HeaderMap, authorization: Option<&HeaderValue>) {
        for (name, value) in &self.host.headers {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
                headers.append(name, value);
            }
        }
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.clone());
        }
    }

    /// A request to this host alone, authenticated if it has to be: redirects are none of what is written. `body` is asked
    /// for each try.
    pub(super) async fn call(
        &self,
        url: Url,
        call: Call<'_>,
        body: impl Fn() -> Option<Body>,
    ) -> Result<Response, RegistryError> {
        let mut used = self.authorization.lock().await.clone();
        let client = self.clients.to(&url)?;
        for left in (0..=MAX_CHALLENGES).rev() {
            let mut headers = call.headers.clone();
            self.own_headers(&mut headers, used.as_ref());
            let mut request = client.request(call.method.clone(), url.clone()).headers(headers);
            if let Some(body) = body() {
                request = request.body(body);
            }
            let response = self.send(request, &authority(&url), call.what).await?;
            if left > 0
                && response.status() == StatusCode::UNAUTHORIZED
                && let Some(renewed) = self.authorize(&response, used.as_ref(), call.what).await?
            {
                used = Some(renewed);
                continue;
            }
            return self.successful(response, call.what).await;
        }
        Err(self.protocol(call.what, "more challenges than can be answered"))
    }

    /// Sends a long body, for which the authorization is known by now. The caller looks at its progress.
    pub(super) async fn send_body(
        &self,
        url: Url,
        mut headers: HeaderMap,
        body: Body,
        what: &str,
    ) -> Result<Response, RegistryError> {
        let used = self.authorization.lock().await.clone();
        self.own_headers(&mut headers, used.as_ref());
        let sent = self.clients.to(&url)?.put(url.clone()).headers(headers).body(body).send().await;
        let response = sent.map_err(|e| failed(e, &authority(&url), what, self.progress))?;
        self.successful(response, what).await
    }

    async fn get_once(&self, ask: Ask<'_>) -> Result<Response, RegistryError> {
        let mut url = self.url(ask.path, ask.what)?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let mut used = self.authorization.lock().await.clone();
        // A token that was kept may have been taken back meanwhile: it is asked for anew, once.
        for _ in 0..MAX_CHALLENGES {
            let response = self.follow(url.clone(), ask, used.as_ref()).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            match self.authorize(&response, used.as_ref(), ask.what).await? {
                Some(renewed) => used = Some(renewed),
                None => return Ok(response),
            }
        }
        self.follow(url, ask, used.as_ref()).await
    }

    /// What the host may be shown: the caller's credentials, or else the node's.
    async fn credentials(&self) -> Result<&Credentials, RegistryError> {
        if !self.given.is_empty() {
            return Ok(&self.given);
        }
        let host = self.host.name();
        let asked = self.credentials.get_or_try_init(|| self.keychain.credentials(&host, &self.repository)).await;
        asked.map_err(|source| RegistryError::Credentials { host, source })
    }

    /// Sends, following redirects. The authorization and the configured headers go to this host alone.
    async fn follow(
        &self,
        mut url: Url,
        ask: Ask<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, RegistryError> {
        let what = ask.what;
        let home = origin(&url);
        for _ in 0..=MAX_REDIRECTS {
            let mut headers = HeaderMap::new();
            if let Ok(accept) = HeaderValue::from_str(ask.accept) {
                headers.insert(header::ACCEPT, accept);
            }
            if ask.from > 0
                && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", ask.from))
            {
                headers.insert(header::RANGE, range);
            }
            if origin(&url) == home {
                self.own_headers(&mut headers, authorization);
            }
            let response =
                self.send(self.clients.to(&url)?.get(url.clone()).headers(headers), &authority(&url), what).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|v| v.to_str().ok());
            let next = location.and_then(|l| url.join(l).ok());
            let next = next.ok_or_else(|| self.protocol(what, "a redirect to nowhere"))?;
            let safe = match next.scheme() {
                "https" => true,
                "http" => url.scheme() == "http" || is_loopback(&authority(&next)) && is_loopback(&authority(&url)),
                _ => false,
            };
            if !safe {
                let why = format!("a redirect from {} to {}://{}", url.scheme(), next.scheme(), authority(&next));
                return Err(self.protocol(what, why));
            }
            url = next;
        }
        Err(self.protocol(what, format!("more than {MAX_REDIRECTS} redirects")))
    }

    async fn send(&self, request: reqwest::RequestBuilder, host: &str, what: &str) -> Result<Response, RegistryError> {
        match tokio::time::timeout(self.progress, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(e)) => Err(failed(e, host, what, self.progress)),
            Err(_) => {
                Err(RegistryError::Timeout { host: host.to_owned(), what: what.to_owned(), after: self.progress })
            }
        }
    }

    async fn successful(&self, mut response: Response, what: &str) -> Result<Response, RegistryError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let host = authority(response.url());
        let text = body(&mut response, &host, what, MAX_ERROR, self.progress).await.unwrap_or_default();
        let message = error_message(&text);
        Err(RegistryError::Status { host, what: what.to_owned(), status: status.as_u16(), message })
    }

    /// What the challenge of `response` asks for; None if there is nothing (more) to offer.
    async fn authorize(
        &self,
        response: &Response,
        used: Option<&HeaderValue>,
        what: &str,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let mut current = self.authorization.lock().await;
        // Another request of this pull was quicker.
        if current.as_ref() != used {
            return Ok(current.clone());
        }
        // A challenge from where a redirect led is none of this host.
        if origin(response.url()) != origin(&self.host.base) {
            return Ok(None);
        }
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE);
        let parsed: Vec<Challenge> =
            challenges.iter().filter_map(|v| v.to_str().ok()).filter_map(parse_challenge).collect();
        let bearer = parsed.iter().find(|c| matches!(c, Challenge::Bearer { .. }));
        let value = match bearer.or(parsed.first()) {
            None => return Ok(None),
            Some(Challenge::Basic) => self.credentials().await?.basic_header(),
            Some(Challenge::Bearer { realm, service, scope }) => {
                let refused = used.and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
                let token = self.token(realm, service.as_deref(), scope.as_deref(), refused, what).await?;
                Some(format!("Bearer {token}"))
            }
        };
        let Some(value) = value else { return Ok(None) };
        let mut value = HeaderValue::from_str(&value).map_err(|_| self.protocol(what, "a token that is no header"))?;
        value.set_sensitive(true);
        if used == Some(&value) {
            return Ok(None);
        }
        *current = Some(value.clone());
        Ok(Some(value))
    }

    /// A bearer token from the token server (<https://distribution.github.io/distribution/spec/auth/token/>), or one that it
    /// gave before, but for the one that was `refused`.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
        refused: Option<&str>,
        what: &str,
    ) -> Result<String, RegistryError> {
        let credentials = self.credentials().await?;
        if let Some(token) = &credentials.token {
            return Ok(token.clone());
        }
        let url = Url::parse(realm).map_err(|_| self.protocol(what, "a challenge whose realm is no URL"))?;
        let secure = url.scheme() == "https"
            || url.scheme() == "http" && (self.host.base.scheme() == "http" || is_loopback(&authority(&url)));
        if !secure {
            return Err(self.protocol(what, "a challenge whose token server is not reached by TLS"));
        }
        let default_scope = format!("repository:{}:pull", self.repository);
        let scope = scope.unwrap_or(&default_scope);
        let key = tokens::key(realm, service, scope, credentials);
        match self.tokens.get(&key) {
            Some(kept) if Some(kept.as_str()) == refused => self.tokens.forget(&key),
            Some(kept) => return Ok(kept),
            None => {}
        }
        let (host, client) = (authority(&url), self.clients.to(&url)?);
        let mut pairs: Vec<(&str, &str)> = vec![("scope", scope)];
        pairs.extend(service.map(|s| ("service", s)));
        let request = if let Some(identity) = &credentials.identity {
            pairs.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "proxmox-lxcri"),
                ("refresh_token", identity),
            ]);
            let mut form = Url::parse("form:").map_err(|e| self.protocol(what, e.to_string()))?;
            form.query_pairs_mut().extend_pairs(&pairs);
            client
                .post(url)
                .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.query().unwrap_or("").to_owned())
        } else {
            let mut url = url;
            url.query_pairs_mut().extend_pairs(&pairs);
            let request = client.get(url);
            match credentials.basic_header().and_then(|v| HeaderValue::from_str(&v).ok()) {
                Some(mut value) => {
                    value.set_sensitive(true);
                    request.header(header::AUTHORIZATION, value)
                }
                None => request,
            }
        };
        let what = format!("token for {what}");
        let mut response = self.successful(self.send(request, &host, &what).await?, &what).await?;
        let text = body(&mut response, &host, &what, MAX_TOKEN, self.progress).await?;
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }
        // The parser's words could hold a part of the token.
        let answer: Answer =
            serde_json::from_slice(&text).map_err(|_| self.protocol(&what, "an answer that can't be understood"))?;
        let token = answer.token.or(answer.access_token).filter(|t| !t.is_empty());
        let token = token.ok_or_else(|| self.protocol(&what, "an answer without a token"))?;
        self.tokens.put(key, &token, answer.expires_in.map_or(tokens::DEFAULT_LIFE, Duration::from_secs));
        Ok(token)
    }
}

/// How long an overloaded host wants to be left alone.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match value.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).unwrap_or_default()),
    }
}

/// What decides whether two URLs are the same server.
fn origin(url: &Url) -> (String, String, Option<u16>) {
    (url.scheme().to_owned(), url.host_str().unwrap_or("").to_owned(), url.port_or_known_default())
}

fn failed(e: reqwest::Error, host: &str, what: &str, after: Duration) -> RegistryError {
    let (host, what) = (host.to_owned(), what.to_owned());
    // URLs may carry signatures.
    let source = e.without_url();
    if source.is_timeout() {
        RegistryError::Timeout { host, what, after }
    } else {
        RegistryError::Unreachable { host, what, source }
    }
}

/// The next piece of a body, waiting for it no longer than `progress`.
pub(super) async fn chunk(
    response: &mut Response,
    host: &str,
    what: &str,
    progress: Duration,
) -> Result<Option<bytes::Bytes>, RegistryError> {
    match tokio::time::timeout(progress, response.chunk()).await {
        Ok(Ok(chunk)) => Ok(chunk),
        Ok(Err(e)) => Err(failed(e, host, what, progress)),
        Err(_) => Err(RegistryError::Timeout { host: host.to_owned(), what: what.to_owned(), after: progress }),
    }
}

/// A whole body of at most `max` bytes.
pub(super) async fn body(
    response: &mut Response,
    host: &str,
    what: &str,
    max: u64,
    progress: Duration,
) -> Result<Vec<u8>, RegistryError> {
    let too_large = || RegistryError::TooLarge { host: host.to_owned(), what: what.to_owned(), limit: max };
    if response.content_length().is_some_and(|n| n > max) {
        return Err(too_large());
    }
    let mut data = Vec::new();
    while let Some(piece) = chunk(response, host, what, progress).await? {
        if (data.len() + piece.len()) as u64 > max {
            return Err(too_large());
        }
        data.extend_from_slice(&piece);
    }
    Ok(data)
}

/// The registry's own words in an error answer, after ": ".
fn error_message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(body) else { return String::new() };
    let mut text = String::new();
    for item in answer.errors.iter().take(3) {
        text.push_str(&format!(": {} {}", item.code, item.message));
    }
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}
