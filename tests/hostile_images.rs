//! Images by people who mean harm, through the whole way of a pull: a registry, the store, the confined processes. Each one
//! is refused by name or does no harm; nothing of it is outside of its layer's folder, nothing is left of it, and no process
//! takes more memory than it may.
#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use images_support::{Answer, Built, Fake, Item, Seen, World, build, gzip, layer, pax_record};
use proxmox_lxcri::core::error::Kind;
use proxmox_lxcri::core::ports::ImageStore;
use proxmox_lxcri::integrations::layers::pipeline::digest_of;
use proxmox_lxcri::integrations::layers::unpack::Limits;
use serde_json::{Value, json};
use tar::EntryType;

/// What a layer may hold here; small, so that bombs are quick.
const LIMITS: Limits = Limits { entries: 400, bytes: 8 << 20, path: 4096, depth: 256 };
/// What one process may take for any image, in KiB over what it has before.
const CAP_KIB: u64 = 64 << 10;

/// What becomes of a case.
enum End {
    /// Refused with this kind and these words.
    No(Kind, &'static str),
    /// Taken; what is to be seen in the layer's folder.
    Yes(fn(&Path)),
}

use End::{No, Yes};
const BAD: Kind = Kind::InvalidArgument;

struct Case {
    name: &'static str,
    image: Built,
    end: End,
    /// What the registry answers to a path that holds the first.
    lies: Vec<(String, Answer)>,
}

fn case(name: &'static str, image: Built, end: End) -> Case {
    Case { name, image, end, lies: Vec::new() }
}

fn items(name: &'static str, items: &[Item], end: End) -> Case {
    case(name, build(&[layer(items)], "amd64", false), end)
}

/// A layer of these very bytes, compressed.
fn raw(name: &'static str, tar: &[u8], end: End) -> Case {
    case(name, build(&[tar.to_vec()], "amd64", false), end)
}

/// An image whose only layer is `blob` and should become `content`.
fn blob(name: &'static str, blob: &[u8], kind: &str, content: &[u8], end: End) -> Case {
    let mut image = build(&[content.to_vec()], "amd64", false);
    image.blobs.remove(image.layers[0].as_str());
    let digest = digest_of(blob);
    let layer = &mut json!({"mediaType": format!("application/vnd.oci.image.layer.v1.tar{kind}"), "digest": digest, "size": blob.len()});
    image.blobs.insert(digest.to_string(), blob.to_vec());
    image.layers = vec![digest];
    case(name, manifest_with(image, |m| m["layers"] = json!([layer.take()])), end)
}

fn manifest_with(mut image: Built, change: impl FnOnce(&mut Value)) -> Built {
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    change(&mut manifest);
    image.manifest = manifest.to_string().into_bytes();
    image
}

/// The plain image with another manifest.
fn manifest(name: &'static str, change: impl FnOnce(&mut Value), end: End) -> Case {
    case(name, manifest_with(plain(), change), end)
}

fn plain() -> Built {
    build(&[layer(&[Item::file("f", b"x")])], "amd64", false)
}

/// The plain image with another config.
fn config(name: &'static str, text: &str, end: End) -> Case {
    let mut image = plain();
    image.blobs.remove(image.config.as_str());
    image.config = digest_of(text.as_bytes());
    image.blobs.insert(image.config.to_string(), text.as_bytes().to_vec());
    let (digest, size) = (image.config.clone(), text.len());
    case(
        name,
        manifest_with(image, |m| {
            m["config"]["digest"] = json!(digest);
            m["config"]["size"] = json!(size);
        }),
        end,
    )
}

fn config_of(change: impl FnOnce(&mut Value)) -> String {
    let image = plain();
    let mut config: Value = serde_json::from_slice(&image.blobs[image.config.as_str()]).unwrap();
    change(&mut config);
    config.to_string()
}

/// The manifest is `text`; the registry has nothing else.
fn document(name: &'static str, text: Vec<u8>, end: End) -> Case {
    case(name, Built { manifest: text, ..plain() }, end)
}

/// An index of `entries`; manifests by digest in `more`.
fn index(name: &'static str, entries: Value, more: Vec<Vec<u8>>, end: End) -> Case {
    let text = json!({"schemaVersion": 2, "manifests": entries}).to_string().into_bytes();
    let lies = more.into_iter().map(|m| (digest_of(&m).to_string(), Answer::ok(&m))).collect();
    Case { lies, ..document(name, text, end) }
}

fn entry(bytes: &[u8], architecture: &str) -> Value {
    json!({"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest_of(bytes), "size": bytes.len(),
        "platform": {"os": "linux", "architecture": architecture}})
}

fn header(kind: EntryType, name: &[u8], size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.as_mut_bytes()[..name.len()].copy_from_slice(name);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    header
}

/// A header and its data, with a field written over before the checksum is.
fn patched(kind: EntryType, at: usize, value: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = header(kind, b"f", data.len() as u64);
    header.as_mut_bytes()[at..at + value.len()].copy_from_slice(value);
    header.set_cksum();
    let mut out = [header.as_bytes().as_slice(), data].concat();
    out.resize(out.len().div_ceil(512) * 512 + 1024, 0);
    out
}

fn extension(kind: EntryType, data: &[u8]) -> Vec<u8> {
    let mut out = [header(kind, b"x", data.len() as u64).as_bytes().as_slice(), data].concat();
    out.resize(out.len().div_ceil(512) * 512, 0);
    out
}

/// `start`, so many zeros, `end`, compressed as it is made.
fn bomb(start: &[u8], zeros: usize, end: &[u8], zstd: bool) -> (Vec<u8>, proxmox_lxcri::core::ids::Digest) {
    use sha2::Digest as _;
    let mut sum = sha2::Sha256::new();
    let mut put = |out: &mut dyn Write| {
        let piece = vec![0; 1 << 20];
        for part in [start].into_iter().chain((0..zeros >> 20).map(|_| piece.as_slice())).chain([end]) {
            sum.update(part);
            out.write_all(part).unwrap();
        }
    };
    let blob = if zstd {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        put(&mut encoder);
        encoder.finish().unwrap()
    } else {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        put(&mut encoder);
        encoder.finish().unwrap()
    };
    (blob, proxmox_lxcri::core::ids::Digest::from_sha256(&sum.finalize().into()))
}

fn bombed(name: &'static str, start: &[u8], zeros: usize, zstd: bool, end: End) -> Case {
    let (bytes, diff) = bomb(start, zeros, &[0; 1024], zstd);
    let mut made = blob(name, &bytes, if zstd { "+zstd" } else { "+gzip" }, b"", end);
    let text = config_of(|c| c["rootfs"]["diff_ids"] = json!([diff]));
    let (digest, size) = (digest_of(text.as_bytes()), text.len());
    made.image.blobs.insert(digest.to_string(), text.into_bytes());
    made.image = manifest_with(made.image, |m| {
        m["config"]["digest"] = json!(digest);
        m["config"]["size"] = json!(size);
    });
    made
}

fn escapes(outside: &str) -> Vec<Case> {
    let file = format!("{outside}/file");
    let inside: fn(&Path) = |_| {};
    vec![
        items("a name that leads out", &[Item::file("../outside/evil", b"x")], No(BAD, "'..'")),
        items("a name that leads out from below", &[Item::file("a/../../outside/evil", b"x")], No(BAD, "'..'")),
        items("an absolute name with '..'", &[Item::file("/../../evil", b"x")], No(BAD, "'..'")),
        items("an absolute name", &[Item::file(&format!("{outside}/evil"), b"x")], Yes(inside)),
        items(
            "a file through an absolute link",
            &[Item::symlink("out", outside), Item::file("out/evil", b"x")],
            Yes(inside),
        ),
        items(
            "a file through a relative link",
            &[Item::symlink("up", "../../../../../../../.."), Item::file("up/evil", b"x")],
            Yes(|fs| {
                assert_eq!(std::fs::read(fs.join("evil")).unwrap(), b"x");
            }),
        ),
        items(
            "a file over a link to a file",
            &[Item::symlink("l", &file), Item::file("l", b"evil")],
            Yes(|fs| {
                assert!(fs.join("l").symlink_metadata().unwrap().is_file());
            }),
        ),
        items(
            "a folder over a link to a folder",
            &[Item::symlink("d", outside), Item::dir("d").mode(0o777).owner(1, 1)],
            Yes(|fs| {
                assert!(fs.join("d").symlink_metadata().unwrap().is_dir());
            }),
        ),
        items(
            "a link over a folder, and a file below",
            &[Item::dir("d"), Item::symlink("d", outside), Item::file("d/evil", b"x")],
            Yes(inside),
        ),
        items(
            "attributes through a link",
            &[Item::symlink("l", &file).mode(0o777).owner(1, 1).pax("SCHILY.xattr.trusted.evil", b"1")],
            Yes(inside),
        ),
        items(
            "a whiteout through a link",
            &[Item::symlink("out", outside), Item::file("out/.wh.file", b"")],
            Yes(inside),
        ),
        items(
            "an opaque folder through a link",
            &[Item::symlink("out", outside), Item::file("out/.wh..wh..opq", b"")],
            Yes(inside),
        ),
        items("a whiteout of '..'", &[Item::file("a/.wh...", b"")], No(BAD, "a whiteout of no name")),
        items("a whiteout of nothing", &[Item::file(".wh.", b"")], No(BAD, "a whiteout of no name")),
        items("a hard link that leads out", &[Item::hardlink("evil", "../outside/file")], No(BAD, "leads out")),
        items("a hard link to an absolute name", &[Item::hardlink("evil", &file)], No(Kind::Internal, "target")),
        items(
            "a hard link through a link",
            &[Item::symlink("d", outside), Item::hardlink("evil", "d/file")],
            No(Kind::Internal, "target"),
        ),
        items(
            "a hard link to a link",
            &[Item::symlink("l", &file), Item::hardlink("m", "l"), Item::file("m", b"evil")],
            Yes(inside),
        ),
        items("a hard link to the root", &[Item::hardlink("evil", "./")], No(Kind::Internal, "target")),
        items(
            "a hard link to a folder",
            &[Item::dir("d"), Item::hardlink("evil", "d")],
            No(BAD, "a hard link to a folder"),
        ),
        items(
            "a link to itself",
            &[Item::symlink("l", "l"), Item::file("l/x", b"x")],
            No(Kind::Internal, "making its folder"),
        ),
        items(
            "links in a circle",
            &[Item::symlink("a", "b"), Item::symlink("b", "a"), Item::file("a/x", b"x")],
            No(Kind::Internal, "making its folder"),
        ),
        items("the root as a link", &[Item::symlink(".", outside)], No(BAD, "only be a folder")),
        items("the root as a file", &[Item::new(EntryType::Regular, "./", 0o644)], Yes(inside)),
        items("the root closed to all", &[Item::dir("./").mode(0), Item::file("f", b"x")], Yes(inside)),
    ]
}

fn names() -> Vec<Case> {
    let path = |p: &[u8]| [Item::file("f", b"x").pax("path", p)];
    vec![
        items("no name", &[Item::file("", b"x")], No(BAD, "no name")),
        items("a NUL in a name", &path(b"a\0b"), No(BAD, "NUL")),
        items("a part of 256 bytes", &path(&[b'y'; 256]), No(BAD, "longer than 255")),
        items("a name of 5000 bytes", &path(&[b"a/".repeat(2500).as_slice(), b"f"].concat()), No(BAD, "too long")),
        items("a name of 300 folders", &path(vec!["d"; 300].join("/").as_bytes()), No(BAD, "too deep")),
        items(
            "a name that is not UTF-8",
            &path(b"\xff\xfe\x80"),
            Yes(|fs| assert_eq!(std::fs::read_dir(fs).unwrap().count(), 1)),
        ),
        items("control characters in an error", &[Item::hardlink("a\n\x1b[31m", "b")], No(Kind::Internal, "\\n")),
        items("a link to 5000 bytes", &[Item::symlink("l", &"x".repeat(5000))], No(BAD, "no possible name")),
        items("a link to nothing", &[Item::symlink("l", "")], No(BAD, "no possible name")),
        items("a link with a NUL", &[Item::symlink("l", "x").pax("linkpath", b"a\0b")], No(BAD, "no possible name")),
        items(
            "one name twice",
            &[Item::file("f", b"1"), Item::file("f", b"22")],
            Yes(|fs| assert_eq!(std::fs::read(fs.join("f")).unwrap(), b"22")),
        ),
        items(
            "a file where a folder was",
            &[Item::dir("k"), Item::file("k/x", b"x"), Item::file("k", b"f")],
            Yes(|fs| assert!(fs.join("k").is_file())),
        ),
        items(
            "a folder where a file was",
            &[Item::file("k", b"f"), Item::dir("k")],
            Yes(|fs| assert!(fs.join("k").is_dir())),
        ),
        items(
            "a file below a file",
            &[Item::file("f", b"x"), Item::file("f/x", b"x")],
            No(Kind::Internal, "making its folder"),
        ),
        items(
            "a hard link to itself",
            &[Item::file("f", b"x"), Item::hardlink("f", "f")],
            Yes(|fs| assert_eq!(std::fs::read(fs.join("f")).unwrap(), b"x")),
        ),
        items(
            "a hard link to what comes later",
            &[Item::hardlink("a", "b"), Item::file("b", b"x")],
            No(Kind::Internal, "target"),
        ),
    ]
}

fn device(kind: EntryType, major: u32, minor: u32) -> Item {
    let mut item = Item::new(kind, "dev", 0o666);
    item.header.set_device_major(major).unwrap();
    item.header.set_device_minor(minor).unwrap();
    item
}

fn kinds_and_attributes() -> Vec<Case> {
    let f = |key: &str, value: &[u8]| [Item::file("f", b"x").pax(key, value)];
    let closed: fn(&Path) = |fs| {
        // Only root gets there: setuid programs and devices are nothing to others.
        let layers = fs.ancestors().nth(2).unwrap();
        assert_eq!(layers.metadata().unwrap().mode() & 0o077, 0, "{layers:?}");
    };
    vec![
        items(
            "the node's disk",
            &[device(EntryType::Block, 8, 0)],
            Yes(|fs| {
                assert!(fs.join("dev").symlink_metadata().unwrap().file_type().is_block_device());
            }),
        ),
        items("the node's memory", &[device(EntryType::Char, 1, 1)], Yes(closed)),
        items("a forged whiteout", &[device(EntryType::Char, 0, 0)], Yes(closed)),
        items("a FIFO", &[Item::new(EntryType::Fifo, "p", 0o644)], Yes(closed)),
        items("a program that becomes root", &[Item::file("su", b"#!").mode(0o6755)], Yes(closed)),
        items(
            "an overlay's own mark",
            &[Item::dir("d").pax("SCHILY.xattr.trusted.overlay.redirect", b"/etc")],
            Yes(|fs| {
                assert!(xattr::get(fs.join("d"), "trusted.overlay.redirect").unwrap().is_none());
            }),
        ),
        items(
            "a forged opaque folder",
            &[Item::dir("d").pax("SCHILY.xattr.trusted.overlay.opaque", b"y")],
            Yes(|fs| {
                assert!(xattr::get(fs.join("d"), "trusted.overlay.opaque").unwrap().is_none());
            }),
        ),
        items(
            "an attribute of 70 kB",
            &f("SCHILY.xattr.user.x", &[b'v'; 70_000]),
            No(Kind::Internal, "extended attribute"),
        ),
        items("an attribute without a name", &f("SCHILY.xattr.", b"v"), No(BAD, "extended attribute's name")),
        items(
            "an attribute's name of 300 bytes",
            &f(&format!("SCHILY.xattr.user.{}", "n".repeat(300)), b"v"),
            No(BAD, "extended attribute's name"),
        ),
        items("an owner that means none", &f("uid", b"4294967295"), No(BAD, "no possible id")),
        items("a negative owner", &f("gid", b"-1"), No(BAD, "no number")),
        items("a time that overflows", &f("mtime", b"99999999999999999999"), No(BAD, "no time")),
        items("a time at the end of time", &f("mtime", b"9223372036854775807"), Yes(closed)),
        items("an unknown kind of entry", &[Item::new(EntryType::new(b'V'), "v", 0o644)], No(BAD, "unknown type")),
    ]
}

fn archives() -> Vec<Case> {
    let sparse =
        |size: &[u8], map: &[u8]| [Item::file("f", b"x").pax("GNU.sparse.map", map).pax("GNU.sparse.size", size)];
    let pax = pax_record("path", b"f");
    let globals = extension(EntryType::XGlobalHeader, &[b'c'; 1 << 20]).repeat(200);
    vec![
        raw(
            "no archive",
            b"this is no archive, but it is long enough for a header".repeat(20).as_slice(),
            No(BAD, "malformed"),
        ),
        raw("half a header", &[7; 100], No(BAD, "byte")),
        raw(
            "a checksum that does not fit",
            &{
                let mut t = layer(&[Item::file("f", b"x")]);
                t[0] = b'g';
                t
            },
            No(BAD, "checksum"),
        ),
        raw("more data than there is", &patched(EntryType::Regular, 124, b"00000777777\0", b"x"), No(BAD, "")),
        raw(
            "a size of 2^63",
            &patched(EntryType::Regular, 124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", b"x"),
            No(BAD, "more than"),
        ),
        raw("a size that is no number", &patched(EntryType::Regular, 124, b"zzzzzzzzzzz\0", b"x"), No(BAD, "")),
        items("a pax size that is no number", &[Item::file("f", b"x").pax("size", b"1e9")], No(BAD, "no number")),
        items(
            "a pax header of 2 MiB",
            &[Item::file("f", b"x").pax("comment", &vec![b'x'; 2 << 20])],
            No(BAD, "extension header"),
        ),
        raw(
            "a long name of 2 MiB",
            &extension(EntryType::GNULongName, &vec![b'n'; 2 << 20]),
            No(BAD, "extension header"),
        ),
        raw(
            "two pax headers",
            &[
                extension(EntryType::XHeader, &pax),
                extension(EntryType::XHeader, &pax),
                layer(&[Item::file("f", b"x")]),
            ]
            .concat(),
            No(BAD, "two pax headers"),
        ),
        raw(
            "two long names",
            &[extension(EntryType::GNULongName, b"a"), extension(EntryType::GNULongName, b"b")].concat(),
            No(BAD, "two long names"),
        ),
        raw("nothing behind a header", &extension(EntryType::XHeader, &pax), No(BAD, "ends after")),
        raw(
            "a malformed pax header",
            &[extension(EntryType::XHeader, b"999 a=b\n"), layer(&[])].concat(),
            No(BAD, "pax header is malformed"),
        ),
        raw("comments without end", &globals, No(BAD, "too large")),
        items("a hole of 8 EiB", &sparse(b"9223372036854775807", b"0,1"), No(BAD, "bytes of files")),
        items("runs that overlap", &sparse(b"5", b"0,1,0,0"), No(BAD, "runs")),
        items("a sparse map of half a pair", &sparse(b"5", b"0,1,2"), No(BAD, "sparse map")),
        raw("a sparse file without a map", &patched(EntryType::GNUSparse, 386, b"99999999999\0", b"x"), No(BAD, "")),
    ]
}

fn bombs() -> Vec<Case> {
    let many: Vec<Item> = (0..=LIMITS.entries).map(|n| Item::file(&format!("f{n}"), b"")).collect();
    let deep: Vec<Item> = (0..3).map(|n| Item::file(&format!("{n}/{}f", "d/".repeat(200)), b"")).collect();
    let file = header(EntryType::Regular, b"big", 24 << 20);
    let window = {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.include_contentsize(false).unwrap();
        encoder.write_all(&layer(&[Item::file("f", b"x")])).unwrap();
        encoder.finish().unwrap()
    };
    let plain = layer(&[Item::file("f", b"x")]);
    let zip = gzip(&plain);
    let mut broken = zip.clone();
    let at = broken.len() - 6;
    broken[at] ^= 1;
    vec![
        items("too many entries", &many, No(BAD, "more than 400 entries")),
        items("too many folders that are implied", &deep, No(BAD, "more than 400 entries")),
        bombed("a file too large, gzip", file.as_bytes(), 24 << 20, false, No(BAD, "bytes of files")),
        bombed("a file too large, zstd", file.as_bytes(), 24 << 20, true, No(BAD, "bytes of files")),
        bombed("zeros behind the end", &layer(&[Item::file("f", b"x")]), 66 << 20, true, No(BAD, "behind its end")),
        blob("a window of 128 MiB", &window, "+zstd", &plain, No(Kind::Internal, "memory")),
        blob("gzip that is cut", &zip[..zip.len() / 2], "+gzip", &plain, No(Kind::Internal, "layer")),
        blob("gzip whose sum is wrong", &broken, "+gzip", &plain, No(Kind::Internal, "layer")),
        blob(
            "gzip with something behind it",
            &[zip.as_slice(), b"garbage behind"].concat(),
            "+gzip",
            &plain,
            No(Kind::Internal, "layer"),
        ),
        blob("zstd that is none", b"\x28\xb5\x2f\xfdgarbage", "+zstd", &plain, No(Kind::Internal, "layer")),
        blob("said to be zstd", &zip, "+zstd", &plain, No(Kind::Internal, "says Zstd")),
        blob("said to be plain", &zip, "", &plain, No(Kind::Internal, "says None")),
        blob(
            "other content than its diff id",
            &gzip(&layer(&[Item::file("evil", b"x")])),
            "+gzip",
            &plain,
            No(Kind::Internal, "config says"),
        ),
    ]
}

fn manifests() -> Vec<Case> {
    let nested = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    let annotations = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"digest":"{}","size":1,"annotations":{{{}}}}}]}}"#,
        plain().digest(),
        (0..20_000).map(|n| format!("\"{n}\":\"\"")).collect::<Vec<_>>().join(",")
    );
    vec![
        document("a manifest of 5 MiB", vec![b' '; 5 << 20], No(BAD, "longer than 4194304")),
        document("a manifest of 200000 brackets", nested, No(BAD, "malformed")),
        document("a manifest of no bytes", Vec::new(), No(BAD, "malformed")),
        document(
            "a manifest that is not UTF-8",
            b"{\"schemaVersion\":2,\"mediaType\":\"\xff\"}".to_vec(),
            No(BAD, "malformed"),
        ),
        document("20000 annotations", annotations.into_bytes(), No(BAD, "more than 10000 entries")),
        manifest("an index and an image at once", |m| m["manifests"] = json!([]), No(BAD, "at once")),
        manifest("no layers", |m| m["layers"] = json!([]), No(Kind::Unimplemented, "no layers")),
        manifest(
            "501 layers",
            |m| {
                let one = m["layers"][0].clone();
                m["layers"] = json!(vec![one; 501])
            },
            No(Kind::Unimplemented, "501 layers"),
        ),
        manifest("a layer of negative size", |m| m["layers"][0]["size"] = json!(-1), No(BAD, "negative size")),
        manifest("a layer of a size beyond numbers", |m| m["layers"][0]["size"] = json!(1e30), No(BAD, "malformed")),
        manifest(
            "a layer that is shorter than said",
            |m| m["layers"][0]["size"] = json!(1_000_000),
            No(Kind::Internal, "of 1000000 bytes"),
        ),
        manifest(
            "a layer that is longer than said",
            |m| m["layers"][0]["size"] = json!(10),
            No(Kind::Internal, "longer than its descriptor"),
        ),
        manifest(
            "a digest that is a path",
            |m| m["layers"][0]["digest"] = json!("sha256:../../../../etc/passwd"),
            No(Kind::Unimplemented, "not a sha256 digest"),
        ),
        manifest(
            "a digest of another kind",
            |m| m["config"]["digest"] = json!(format!("sha512:{}", "a".repeat(128))),
            No(Kind::Unimplemented, "not a sha256 digest"),
        ),
        manifest(
            "a foreign layer",
            |m| m["layers"][0]["mediaType"] = json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            No(Kind::Unimplemented, "foreign layers"),
        ),
        manifest(
            "a layer of an unknown type",
            |m| m["layers"][0]["mediaType"] = json!("x".repeat(1_000_000)),
            No(Kind::Unimplemented, "unknown type"),
        ),
        manifest("a config of 100 MiB", |m| m["config"]["size"] = json!(100 << 20), No(BAD, "more than the limit")),
        manifest(
            "layers without diff ids",
            |m| {
                let one = m["layers"][0].clone();
                m["layers"] = json!(vec![one; 3])
            },
            No(BAD, "diff ids"),
        ),
    ]
}

fn indexes() -> Vec<Case> {
    let level =
        |inner: &[u8]| json!({"schemaVersion": 2, "manifests": [entry(inner, "amd64")]}).to_string().into_bytes();
    let mut chain = vec![level(b"the end")];
    for _ in 0..6 {
        chain.push(level(chain.last().unwrap()));
    }
    let top = json!([entry(chain.last().unwrap(), "amd64")]);
    let itself = digest_of(b"a circle");
    let circle = json!({"schemaVersion": 2, "manifests": [{"digest": itself, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}}]});
    let text = circle.to_string().into_bytes();
    let circle = Case {
        lies: vec![(itself.to_string(), Answer::ok(&text))],
        ..document("an index that names itself", text.clone(), No(Kind::Internal, "digest should be"))
    };
    let two = [level(b"two"), level(b"three")];
    vec![
        index("indexes in indexes in indexes", top, chain, No(BAD, "nested too deep")),
        circle,
        index("1001 images", json!(vec![entry(b"x", "amd64"); 1001]), Vec::new(), No(BAD, "an index of 1001 entries")),
        index(
            "images for nobody",
            json!([entry(b"x", "s390x"), entry(b"y", &"z".repeat(100_000))]),
            Vec::new(),
            No(Kind::NotFound, "there is linux/s390x"),
        ),
        index("no images", json!([]), Vec::new(), No(Kind::NotFound, "none at all")),
        index(
            "an entry that is not there",
            json!([entry(b"missing", "amd64")]),
            Vec::new(),
            No(Kind::Internal, "digest should be"),
        ),
        index(
            "an entry of another content",
            json!([entry(&two[0], "amd64")]),
            two[1..].to_vec(),
            No(Kind::Internal, "digest should be"),
        ),
    ]
}

fn configs() -> Vec<Case> {
    let many = |key: &'static str, value: Value| config_of(move |c| c["config"][key] = value);
    vec![
        config("a config that is no JSON", "garbage", No(BAD, "malformed")),
        config(
            "a config for another machine",
            &config_of(|c| c["architecture"] = json!("s390x")),
            No(Kind::FailedPrecondition, "linux/s390x"),
        ),
        config(
            "a diff id that is a path",
            &config_of(|c| c["rootfs"]["diff_ids"] = json!(["sha256:../../evil"])),
            No(BAD, "diff id"),
        ),
        config("a million variables", &many("Env", json!(vec![""; 1_000_000])), No(BAD, "more than 10000 entries")),
        config(
            "a hundred thousand labels",
            &many("Labels", (0..100_000).map(|n| (n.to_string(), json!(""))).collect::<serde_json::Map<_, _>>().into()),
            No(BAD, "more than 10000 entries"),
        ),
        config(
            "a hundred thousand volumes",
            &many(
                "Volumes",
                (0..100_000).map(|n| (n.to_string(), json!({}))).collect::<serde_json::Map<_, _>>().into(),
            ),
            No(BAD, "more than 10000 entries"),
        ),
        config("numbers for words", &many("Cmd", json!([1, 2])), No(BAD, "malformed")),
    ]
}

/// Every path below `root` with what it is, but for the layers' own folders.
fn listing(root: &Path) -> HashMap<PathBuf, (u32, u64, i64)> {
    let mut found = HashMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let changes = path.starts_with(root.join("outside"));
            found.insert(path.clone(), (meta.mode(), meta.uid().into(), if changes { meta.mtime_nsec() } else { 0 }));
            if meta.is_dir() {
                folders.push(path);
            }
        }
    }
    found
}

/// Largest memory of this process since the last call, in KiB.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let peak = peak.trim().trim_end_matches(" kB").parse().unwrap();
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    peak
}

/// Largest memory that a process of ours had, of those that have ended, in KiB.
fn childrens_peak() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is ours and as large as the call expects.
    #[allow(unsafe_code)]
    let usage = unsafe {
        assert_eq!(libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    u64::try_from(usage.ru_maxrss).unwrap()
}

fn registry(case: &Case) -> impl Fn(&Seen) -> Option<Answer> + Send + Sync + 'static {
    let lies = case.lies.clone();
    move |seen| lies.iter().find(|(part, _)| seen.path.contains(part.as_str())).map(|(_, answer)| answer.clone())
}

/// Pulls it; what is not as it should be.
async fn hold(world: &World, case: &Case, before: &HashMap<PathBuf, (u32, u64, i64)>) -> Vec<String> {
    let (name, mut wrong) = (case.name, Vec::new());
    let mut check = |holds: bool, said: String| {
        if !holds {
            wrong.push(format!("{name}: {said}"));
        }
    };
    let fake = Fake::serving(case.image.clone(), registry(case)).await;
    let pulled = world.images.pull(&format!("{}/x:1", fake.host), None).await;
    match (&case.end, pulled) {
        (No(kind, words), Err(e)) => {
            let said = e.chain();
            check(e.kind() == *kind && said.contains(words), format!("{:?}: {said}", e.kind()));
            check(!said.contains(|c: char| c.is_control()), format!("control characters: {said:?}"));
            check(said.len() < 3000, format!("an error of {} bytes", said.len()));
        }
        (Yes(look), Ok(image)) => {
            look(&world.path("overlay/layers").join(image.chains[0].hex()).join("fs"));
            world.images.remove(image.id.as_str()).await.unwrap();
        }
        (No(..), Ok(image)) => {
            check(false, "it was taken".into());
            world.images.remove(image.id.as_str()).await.unwrap();
        }
        (Yes(_), Err(e)) => check(false, e.chain()),
    }
    world.images.collect_layers().await.unwrap();
    let now = listing(world.dir.path());
    let more: Vec<_> = now.keys().filter(|p| !before.contains_key(*p)).collect();
    check(more.is_empty(), format!("left {more:?}"));
    check(
        before.iter().all(|(path, what)| now.get(path) == Some(what)),
        "what was there before is gone or another".into(),
    );
    wrong
}

#[tokio::test(flavor = "multi_thread")]
async fn no_image_does_harm() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), b"outside").unwrap();
    let world = World::open_with(dir, LIMITS).await;
    let text = outside.to_str().unwrap();
    let cases: Vec<Case> =
        [escapes(text), names(), kinds_and_attributes(), archives(), bombs(), manifests(), indexes(), configs()]
            .into_iter()
            .flatten()
            .collect();
    assert!(cases.len() >= 60, "{} cases", cases.len());
    // What only comes to be with the first pull.
    let mut wrong = Vec::new();
    hold(&world, &case("an image", plain(), Yes(|_| {})), &listing(world.dir.path())).await;
    let before = listing(world.dir.path());
    for case in &cases {
        peak();
        let idle = peak();
        wrong.extend(hold(&world, case, &before).await);
        let taken = peak().saturating_sub(idle);
        if taken > CAP_KIB {
            wrong.push(format!("{}: {taken} KiB", case.name));
        }
        assert_eq!(std::fs::read(outside.join("file")).unwrap(), b"outside");
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    assert!(childrens_peak() <= CAP_KIB, "{} KiB", childrens_peak());
    println!("{} cases, unpackers of at most {} KiB", cases.len(), childrens_peak());
}
