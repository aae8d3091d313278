//! Signatures as `cosign sign --key` makes them, verified without any network but the image's registry
//! (<https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md>).
//!
//! Beside an image lies another one, tagged `sha256-<digest>.sig`. Each of its layers is a document that names the image's
//! digest; an annotation has its signature. One document with a signature by one of the keys is enough. Keys are ECDSA P-256 or
//! Ed25519, in PEM.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use camino::Utf8PathBuf;
use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};
use serde::Deserialize;

use super::Subject;
use super::policy::trusted;
use crate::core::error::{Error, Kind, Result};
use crate::core::ids::Digest;
use crate::core::ports::RegistryAuth;
use crate::core::reference::Reference;
use crate::integrations::registry::RegistryClient;

/// The kind of document that is signed.
const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// Largest document in bytes.
const MAX_PAYLOAD: u64 = 256 << 10;
/// Most signatures that are looked at.
const MAX_SIGNATURES: usize = 50;
/// What the DER of such public keys begins with (RFC 5480, RFC 8410); the key itself follows.
const P256_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const ED25519_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// A public key.
pub(super) struct Key {
    algorithm: &'static dyn VerificationAlgorithm,
    bytes: Vec<u8>,
}

impl Key {
    fn parse(pem: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(pem).ok()?;
        let body = text.split_once("-----BEGIN PUBLIC KEY-----")?.1.split_once("-----END PUBLIC KEY-----")?.0;
        let body: String = body.split_ascii_whitespace().collect();
        let der = BASE64_STANDARD.decode(body).ok()?;
        if let Some(point) = der.strip_prefix(&P256_PREFIX)
            && point.len() == 65
        {
            return Some(Self { algorithm: &ECDSA_P256_SHA256_ASN1, bytes: point.to_vec() });
        }
        let point = der.strip_prefix(&ED25519_PREFIX).filter(|p| p.len() == 32)?;
        Some(Self { algorithm: &ED25519, bytes: point.to_vec() })
    }

    fn signed(&self, payload: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(self.algorithm, &self.bytes).verify(payload, signature).is_ok()
    }
}

/// Reads keys; one that can't be used is an error, though others could be.
pub(super) fn load(paths: &[Utf8PathBuf]) -> Result<Vec<Key>> {
    let load = |path: &Utf8PathBuf| {
        let none = || Error::precondition(format!("{path}: no public key of ECDSA P-256 or Ed25519 in PEM"));
        Key::parse(&trusted(path)?).ok_or_else(none)
    };
    paths.iter().map(load).collect()
}

#[derive(Deserialize)]
struct Signatures {
    #[serde(default)]
    layers: Vec<Layer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    image: Image,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Image {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

/// Fails unless one of the keys has signed the image.
pub(super) async fn verify(
    registry: &RegistryClient,
    subject: &Subject<'_>,
    keys: &[Key],
    auth: Option<&RegistryAuth>,
) -> Result<()> {
    let reference = subject.reference;
    let beside = format!("{}:sha256-{}.sig", reference.name(), subject.digest.hex());
    let beside = Reference::parse(&beside, reference.registry())?;
    let session = registry.session(&beside, auth)?;
    let unsigned = |e: Error| match e.kind() {
        Kind::NotFound => Error::precondition(format!("{} has no signature ({beside} is not there)", subject.digest)),
        _ => e,
    };
    let manifest = session.manifest(None).await.map_err(unsigned)?;
    let found: Signatures = serde_json::from_slice(&manifest.bytes)
        .map_err(|_| Error::precondition(format!("{beside} holds no signatures")))?;
    let mut why = "it holds none";
    for layer in found.layers.iter().filter(|l| l.media_type == PAYLOAD_TYPE).take(MAX_SIGNATURES) {
        let signature = layer.annotations.get(SIGNATURE).and_then(|text| BASE64_STANDARD.decode(text).ok());
        let Some(signature) = signature else {
            why = "one without a signature";
            continue;
        };
        let payload = session.blob(&layer.digest, layer.size, MAX_PAYLOAD).await?;
        if !keys.iter().any(|key| key.signed(&payload, &signature)) {
            why = "none is by a key of the policy";
            continue;
        }
        match is_of(&payload, subject.digest) {
            true => return Ok(()),
            // Signed by the right one, for something else: somebody copied it here.
            false => why = "one is of another image",
        }
    }
    Err(Error::precondition(format!(
        "{} is not signed as it has to be: of the signatures at {beside}, {why}",
        subject.digest
    )))
}

/// Whether a signed document is about this image.
fn is_of(payload: &[u8], digest: &Digest) -> bool {
    let parsed = serde_json::from_slice::<Payload>(payload);
    parsed.is_ok_and(|p| {
        p.critical.kind == "cosign container image signature" && p.critical.image.digest == digest.as_str()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_other_kinds_are_none() {
        let p256 = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n";
        assert!(Key::parse(p256.as_bytes()).is_none(), "cut");
        let der = [P256_PREFIX.as_slice(), &[4; 65]].concat();
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", BASE64_STANDARD.encode(der));
        assert!(Key::parse(pem.as_bytes()).is_some());
        let der = [ED25519_PREFIX.as_slice(), &[4; 32]].concat();
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", BASE64_STANDARD.encode(der));
        let key = Key::parse(pem.as_bytes()).expect("a key");
        assert!(!key.signed(b"x", b"y"));
        for text in ["", "-----BEGIN PUBLIC KEY-----", "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----"] {
            assert!(Key::parse(text.as_bytes()).is_none(), "{text}");
        }
    }
}
