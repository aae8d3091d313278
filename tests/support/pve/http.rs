//! The server's wire: TLS with a certificate of its own CA, HTTP/1.1 as pveproxy has it, its refusals and its answers.
//!
//! Chunked bodies and bodies of GET and DELETE are refused with 501, a bad ticket with an empty 401 after three seconds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;

use super::state::{Params, Seen, Server, What};

/// Largest body of a form in bytes.
const MAX_FORM: usize = 512 << 10;

/// What a call ends with: data, or a failure.
pub type Answer = Result<Value, Failure>;

/// A failure as the API tells it.
#[derive(Debug, Clone)]
pub struct Failure {
    pub status: u16,
    pub message: String,
    pub errors: BTreeMap<String, String>,
}

impl Failure {
    pub fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), errors: BTreeMap::new() }
    }

    /// 500 with these words.
    pub fn die(message: impl Into<String>) -> Self {
        Self::new(500, message)
    }

    /// 400 because of a parameter.
    pub fn param(name: &str, why: impl Into<String>) -> Self {
        let mut f = Self::new(400, "Parameter verification failed.");
        f.errors.insert(name.into(), why.into());
        f
    }
}

/// Key and certificate.
pub struct Identity {
    pub ca: String,
    pub fingerprint: String,
    tls: Arc<rustls::ServerConfig>,
}

impl Identity {
    pub fn new() -> Self {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let ca_key = KeyPair::generate().expect("a key");
        let mut ca = CertificateParams::new(Vec::new()).expect("parameters");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.distinguished_name.push(rcgen::DnType::CommonName, "Proxmox Virtual Environment");
        let ca_cert = ca.self_signed(&ca_key).expect("a CA");
        let issuer = Issuer::new(ca, ca_key);
        let key = KeyPair::generate().expect("a key");
        let leaf = CertificateParams::new(vec!["127.0.0.1".into(), "localhost".into()]).expect("parameters");
        let leaf = leaf.signed_by(&key, &issuer).expect("a certificate");
        let der = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("protocols")
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], der)
            .expect("TLS");
        let print = Sha256::digest(leaf.der()).iter().map(|b| format!("{b:02X}")).collect::<Vec<_>>().join(":");
        Self { ca: ca_cert.pem(), fingerprint: print, tls: Arc::new(tls) }
    }
}

/// Takes connections until the runtime ends.
pub async fn serve(listener: TcpListener, identity: Identity, server: Arc<Server>) {
    let acceptor = tokio_rustls::TlsAcceptor::from(identity.tls);
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, server) = (acceptor.clone(), server.clone());
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = service_fn(move |request| handle(request, server.clone()));
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// An error here closes the connection without an answer.
#[derive(Debug)]
struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cut")
    }
}

impl std::error::Error for Cut {}

async fn handle(request: Request<Incoming>, server: Arc<Server>) -> Result<Response<Full<Bytes>>, Cut> {
    let method = request.method().clone();
    let raw = request.uri().path().to_owned();
    let Some(path) = raw.strip_prefix("/api2/json") else { return Ok(failed(Failure::new(404, "no such file"))) };
    let parts: Vec<String> = path.split('/').skip(1).map(decode).collect();
    let query = request.uri().query().unwrap_or_default().to_owned();
    let headers = request.headers().clone();
    let get = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let body = request.into_body().collect().await.map_err(|_| Cut)?.to_bytes();
    let mut call =
        Call { method: method.to_string(), path: path.to_owned(), parts, params: Params::new(), user: String::new() };

    let chunked = !get("transfer-encoding").is_empty();
    let no_body = matches!(method, Method::GET | Method::DELETE);
    let unexpected = chunked || no_body && (!body.is_empty() || get("content-length").parse().unwrap_or(0) > 0);
    if unexpected {
        return Ok(failed(Failure::new(501, format!("Unexpected content for method '{method}'"))));
    }
    let kind = get("content-type");
    if kind.starts_with("multipart/form-data") {
        let boundary = kind.split("boundary=").nth(1).unwrap_or_default().trim_matches('"').to_owned();
        match super::storage::parts(&body, &boundary) {
            Some((params, file)) => {
                call.params = params;
                server.lock().upload = Some(file);
            }
            None => return Ok(failed(Failure::new(501, "unable to parse multipart form"))),
        }
    } else if body.len() > MAX_FORM {
        return Ok(failed(Failure::new(501, "for data too large")));
    } else {
        let text = String::from_utf8_lossy(&body).into_owned();
        call.params = form(&text);
    }
    // The query's values win.
    call.params.extend(form(&query));
    let seen = Seen { method: call.method.clone(), path: decode(path), params: call.params.clone() };
    server.note(seen, &call);

    let since = Instant::now();
    let fault = server.fault(&call.method, &decode(path));
    match &fault {
        Some(What::Slow(time)) => tokio::time::sleep(*time).await,
        Some(What::Status(status, message)) => return Ok(failed(Failure::new(*status, message.clone()))),
        Some(What::Cut) => return Err(Cut),
        Some(What::Data(data)) => return Ok(answer(200, "", &json!({ "data": data }))),
        _ => {}
    }
    let done = match server.who(&get("authorization"), &get("cookie"), &get("csrfpreventiontoken"), &call) {
        Ok(user) => {
            call.user = user;
            match fault.clone() {
                Some(What::Late(time)) => {
                    let server = server.clone();
                    let late = tokio::spawn(async move {
                        tokio::time::sleep(time).await;
                        super::api::route(&server, &call, None).await
                    });
                    late.await.map_err(|_| Cut)?
                }
                fault => super::api::route(&server, &call, fault).await,
            }
        }
        Err(f) => Err(f),
    };
    server.was_busy(since);
    match fault {
        Some(What::CutAfter) => return Err(Cut),
        Some(What::Garbled(data)) if done.is_ok() => return Ok(answer(200, "", &json!({ "data": data }))),
        _ => {}
    }
    Ok(match done {
        Ok(data) => answer(200, "", &json!({ "data": data })),
        Err(f) if f.status == 401 => {
            tokio::time::sleep(server.seconds(3.0)).await;
            failed(f)
        }
        Err(f) => failed(f),
    })
}

/// A request, decoded.
pub struct Call {
    pub method: String,
    pub path: String,
    pub parts: Vec<String>,
    pub params: Params,
    pub user: String,
}

fn failed(f: Failure) -> Response<Full<Bytes>> {
    if f.status == 401 || f.status > 599 || (595..600).contains(&f.status) {
        return raw(f.status, &f.message, Vec::new());
    }
    let mut body = json!({ "data": null, "message": format!("{}\n", f.message) });
    if !f.errors.is_empty() {
        body["errors"] = json!(f.errors);
    }
    answer(f.status, &f.message, &body)
}

fn answer(status: u16, reason: &str, body: &Value) -> Response<Full<Bytes>> {
    raw(status, reason, body.to_string().into_bytes())
}

fn raw(status: u16, reason: &str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = hyper::StatusCode::from_u16(status).expect("a status");
    let clean: String = reason.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').collect();
    let empty = clean.is_empty();
    if let Ok(reason) = hyper::ext::ReasonPhrase::try_from(clean.into_bytes())
        && !empty
    {
        response.extensions_mut().insert(reason);
    }
    response
}

/// `%XX` and `+` decoded.
pub fn decode(text: &str) -> String {
    let text = text.replace('+', " ");
    percent_encoding::percent_decode_str(&text).decode_utf8_lossy().into_owned()
}

/// A form, split as the real server does: at `&` and at `;`.
fn form(text: &str) -> Params {
    let mut found = Params::new();
    for pair in text.split(['&', ';']).filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode(value);
        // The elements of a list, one after the other.
        found.entry(decode(name)).and_modify(|all: &mut String| *all = format!("{all}\0{value}")).or_insert(value);
    }
    found
}
