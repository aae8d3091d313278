//! Policies: by repository, with signatures as `cosign` makes them and with programs as containerd asks them. Whatever is not
//! admitted is refused by the policy's name, and nothing of it is here.
//!
//! Run by `make test-images`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use images_support::{Answer, Built, Fake, Item, World, build, layer, run};
use proxmox_lxcri::core::error::Kind;
use proxmox_lxcri::core::ids::Digest;
use proxmox_lxcri::core::ports::ImageStore;
use proxmox_lxcri::integrations::layers::pipeline::digest_of;

fn image() -> Built {
    build(&[layer(&[Item::file("f", b"x")])], "amd64", false)
}

fn write(path: &Path, text: &str, mode: u32) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A node with this policy, `DIR` in it being the node's folder.
async fn node(policy: &str, prepare: impl FnOnce(&Path)) -> World {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    write(&dir.path().join("policy.toml"), &policy.replace("DIR", dir.path().to_str().unwrap()), 0o644);
    World::open(dir).await
}

/// A pair of keys by openssl: the private one's file.
fn keys(folder: &Path, name: &str, kind: &[&str]) -> PathBuf {
    let (private, public) = (folder.join(format!("{name}.key")), folder.join(format!("{name}.pub")));
    let (private_text, public_text) = (private.to_str().unwrap(), public.to_str().unwrap());
    run("/usr/bin/openssl", &[&["genpkey", "-out", private_text], kind].concat());
    run("/usr/bin/openssl", &["pkey", "-in", private_text, "-pubout", "-out", public_text]);
    private
}

const P256: &[&str] = &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"];

/// What lies beside an image that was signed: documents with their signatures.
#[derive(Default)]
struct Signed {
    layers: Vec<serde_json::Value>,
    blobs: Vec<(String, Vec<u8>)>,
}

impl Signed {
    fn by(mut self, key: &Path, digest: &Digest) -> Self {
        let payload = serde_json::json!({"critical": {"identity": {"docker-reference": "registry.example/x"},
            "image": {"docker-manifest-digest": digest}, "type": "cosign container image signature"}, "optional": null})
        .to_string();
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(file("payload"), &payload).unwrap();
        let raw = std::fs::read_to_string(key).unwrap().contains("MC4CAQ");
        match raw {
            true => run(
                "/usr/bin/openssl",
                &[
                    "pkeyutl",
                    "-sign",
                    "-rawin",
                    "-inkey",
                    key.to_str().unwrap(),
                    "-in",
                    &file("payload"),
                    "-out",
                    &file("signature"),
                ],
            ),
            false => run(
                "/usr/bin/openssl",
                &["dgst", "-sha256", "-sign", key.to_str().unwrap(), "-out", &file("signature"), &file("payload")],
            ),
        }
        let signature = BASE64_STANDARD.encode(std::fs::read(file("signature")).unwrap());
        self.layers.push(serde_json::json!({"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "digest": digest_of(payload.as_bytes()), "size": payload.len(),
            "annotations": {"dev.cosignproject.cosign/signature": signature}}));
        self.blobs.push((digest_of(payload.as_bytes()).to_string(), payload.into_bytes()));
        self
    }

    /// A registry with the image and these.
    async fn serve(self, image: &Built) -> Fake {
        let tag = format!("/manifests/sha256-{}.sig", image.digest().hex());
        let manifest =
            serde_json::json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(b"{}"), "size": 2},
            "layers": self.layers})
            .to_string();
        let (empty, blobs) = (self.layers.is_empty(), self.blobs);
        Fake::serving(image.clone(), move |seen| {
            if seen.path.ends_with(".sig") {
                return Some(match seen.path.ends_with(&tag) && !empty {
                    true => Answer::ok(manifest.as_bytes()),
                    false => Answer::status(404),
                });
            }
            blobs.iter().find(|(digest, _)| seen.path.ends_with(digest.as_str())).map(|(_, data)| Answer::ok(data))
        })
        .await
    }
}

fn refused(world: &World, e: &proxmox_lxcri::core::error::Error, words: &str) {
    let said = e.chain();
    assert!(
        e.kind() == Kind::Untrusted && said.contains("policy.toml") && said.contains(words),
        "{:?}: {said}",
        e.kind()
    );
    assert!(world.images.list().is_empty() && world.counts() == (0, 0, 0));
    assert_eq!(std::fs::read_dir(world.path("images/blobs/sha256")).unwrap().count(), 0);
    // As a kubelet has it: the code without a meaning, and a message that begins with the reason.
    let status = tonic::Status::from(proxmox_lxcri::core::error::Error::new(e.kind(), said));
    assert_eq!(status.code(), tonic::Code::Unknown);
    assert!(status.message().starts_with("SignatureValidationFailed: "), "{}", status.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn signatures_by_a_key() {
    let image = image();
    let (digest, folder) = (image.digest(), tempfile::tempdir().unwrap());
    let (ours, ed, other) = (
        keys(folder.path(), "ours", P256),
        keys(folder.path(), "ed", &["-algorithm", "ed25519"]),
        keys(folder.path(), "other", P256),
    );
    let policy = "default = 'reject'\n[[rule]]\nname = 'ours'\nrepositories = ['*']\nrequire = 'cosign'\nkeys = ['DIR/ours.pub', 'DIR/ed.pub']\n";
    let with_keys = |dir: &Path| {
        for name in ["ours.pub", "ed.pub"] {
            std::fs::copy(folder.path().join(name), dir.join(name)).unwrap();
        }
    };
    let another = digest_of(b"another image");
    let cases: Vec<(&str, Signed, Option<&str>)> = vec![
        ("ECDSA", Signed::default().by(&ours, &digest), None),
        ("Ed25519", Signed::default().by(&ed, &digest), None),
        ("the second of two", Signed::default().by(&other, &digest).by(&ours, &digest), None),
        ("not signed", Signed::default(), Some("has no signature")),
        ("by another key", Signed::default().by(&other, &digest), Some("none is by a key of the policy")),
        ("of another image", Signed::default().by(&ours, &another), Some("one is of another image")),
        (
            "a damaged document",
            {
                let mut s = Signed::default().by(&ours, &digest);
                s.blobs[0].1.push(b' ');
                s
            },
            Some("blob"),
        ),
        (
            "a damaged signature",
            {
                let mut s = Signed::default().by(&ours, &digest);
                s.layers[0]["annotations"]["dev.cosignproject.cosign/signature"] = "AAAA".into();
                s
            },
            Some("none is by a key"),
        ),
        (
            "no signature in it",
            {
                let mut s = Signed::default().by(&ours, &digest);
                s.layers[0]["annotations"] = serde_json::json!({});
                s
            },
            Some("one without a signature"),
        ),
        (
            "no document",
            {
                let mut s = Signed::default().by(&ours, &digest);
                s.layers[0]["mediaType"] = "x/y".into();
                s
            },
            Some("it holds none"),
        ),
    ];
    for (name, signed, refusal) in cases {
        let fake = signed.serve(&image).await;
        let world = node(policy, with_keys).await;
        match (world.images.pull(&format!("{}/team/app:1", fake.host), None).await, refusal) {
            (Ok(_), None) => {}
            (Err(e), Some(words)) => {
                assert!(e.chain().contains("rule \"ours\""), "{name}: {}", e.chain());
                refused(&world, &e, words);
            }
            (Ok(_), Some(_)) => panic!("{name}: it was pulled"),
            (Err(e), None) => panic!("{name}: {}", e.chain()),
        }
    }
    // A registry that is away is no verdict.
    let fake = Fake::serving(image.clone(), |s| s.path.ends_with(".sig").then(|| Answer::status(500))).await;
    let world = node(policy, with_keys).await;
    let e = world.images.pull(&format!("{}/x:1", fake.host), None).await.unwrap_err();
    assert!(e.kind() == Kind::Unavailable && e.chain().contains("policy.toml"), "{}", e.chain());
    // What is here under this very digest is looked at again, as the policy may be another one by now.
    let fake = Signed::default().by(&ours, &digest).serve(&image).await;
    let world = node(policy, with_keys).await;
    let pulled = world.images.pull(&format!("{}/x:1", fake.host), None).await.unwrap();
    world.images.pull(&pulled.repo_digests[0], None).await.unwrap();
    std::fs::copy(folder.path().join("other.pub"), world.path("ours.pub")).unwrap();
    std::fs::copy(folder.path().join("other.pub"), world.path("ed.pub")).unwrap();
    let e = world.images.pull(&pulled.repo_digests[0], None).await.unwrap_err();
    assert_eq!(e.kind(), Kind::Untrusted, "{}", e.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_by_repository_and_policies_that_cannot_be_used() {
    let fake = Fake::serving(image(), |_| None).await;
    let policy = format!(
        "default = 'reject'\n[[rule]]\nname = 'team'\nrepositories = ['{}/team/*']\nrequire = 'accept'\n",
        fake.host
    );
    let world = node(&policy, |_| {}).await;
    refused(&world, &world.images.pull(&format!("{}/teams/x:1", fake.host), None).await.unwrap_err(), "default");
    refused(&world, &world.images.pull("bfc.local/x:1", None).await.unwrap_err(), "comes from no registry");
    assert_eq!(fake.count("/"), 0, "nobody is asked for what is refused anyway");
    world.images.pull(&format!("{}/team/x:1", fake.host), None).await.unwrap();
    // Changes count at once; what can't be read, or could be written by others, admits nothing.
    for (text, mode, words) in [
        ("default = 'accpet'", 0o644, "accpet"),
        ("", 0o644, "default"),
        ("default = 'accept'", 0o666, "others than root can write it"),
    ] {
        let world = node(text, |_| {}).await;
        write(&world.path("policy.toml"), text, mode);
        refused(&world, &world.images.pull(&format!("{}/team/y:1", fake.host), None).await.unwrap_err(), words);
    }
    let world = node("default = 'accept'", |_| {}).await;
    std::fs::remove_file(world.path("policy.toml")).unwrap();
    refused(&world, &world.images.pull(&format!("{}/team/y:1", fake.host), None).await.unwrap_err(), "policy.toml");
    for key in ["-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "garbage"] {
        let policy = "default = 'reject'\n[[rule]]\nname = 'k'\nrepositories = ['*']\nrequire = 'cosign'\nkeys = ['DIR/k.pub']\n";
        let world = node(policy, |dir| write(&dir.join("k.pub"), key, 0o644)).await;
        refused(&world, &world.images.pull(&format!("{}/x:1", fake.host), None).await.unwrap_err(), "no public key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_that_judge() {
    let image = image();
    let fake = Fake::serving(image.clone(), |_| None).await;
    let policy = "default = 'reject'\n[[rule]]\nname = 'programs'\nrepositories = ['*']\nrequire = 'plugins'\ndir = 'DIR/bin'\ntimeout = 1\n";
    let yes =
        "#!/bin/sh\necho \"$@\" > \"$(dirname \"$0\")/../asked\"; cat > \"$(dirname \"$0\")/../given\"; echo fine\n";
    type Programs<'a> = Vec<(&'a str, &'a str, u32)>;
    let cases: Vec<(Programs, Option<&str>)> = vec![
        (vec![("a", yes, 0o755)], None),
        (
            vec![("a", yes, 0o755), ("b", "#!/bin/sh\necho not this one; exit 3\n", 0o755)],
            Some("b says no (exit status: 3): not this one"),
        ),
        (vec![("a", "#!/bin/sh\nsleep 60\n", 0o755)], Some("not done after")),
        (vec![("a", yes, 0o755), ("README", "words", 0o644)], Some("README is no program")),
        (vec![("a", yes, 0o777)], Some("others than root can write it")),
        (vec![("a", "#!/no/such/interpreter\n", 0o755)], Some("verifier")),
        (vec![], Some("there is no verifier")),
    ];
    let name = format!("{}/team/app:1", fake.host);
    for (programs, refusal) in cases {
        let world = node(policy, |dir| {
            std::fs::create_dir(dir.join("bin")).unwrap();
            programs.iter().for_each(|(name, text, mode)| write(&dir.join("bin").join(name), text, *mode));
        })
        .await;
        match (world.images.pull(&name, None).await, refusal) {
            (Ok(_), None) => {
                let asked = std::fs::read_to_string(world.path("asked")).unwrap();
                let digest = image.digest();
                let wanted =
                    format!("-name {name} -digest {digest} -stdin-media-type application/vnd.oci.descriptor.v1+json\n");
                assert_eq!(asked, wanted);
                let given: serde_json::Value =
                    serde_json::from_slice(&std::fs::read(world.path("given")).unwrap()).unwrap();
                assert_eq!((&given["digest"], &given["size"]), (&digest.as_str().into(), &image.manifest.len().into()));
            }
            (Err(e), Some(words)) => refused(&world, &e, words),
            (got, _) => panic!("{refusal:?}: {got:?}"),
        }
    }
    let world = node(policy, |_| {}).await;
    refused(&world, &world.images.pull(&name, None).await.unwrap_err(), "verifiers in");
}
