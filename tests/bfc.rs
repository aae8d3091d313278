//! Binary File Containers: golden files of every variant (written by `tests/bfc/make-golden.py`), malformed ones (`raw.rs`),
//! the command line, and images that start from a container, without a registry.
//!
//! Run by `make test-bfc`. The reader's and writer's own round trips are unit tests of `integrations::bfc`.

#![allow(clippy::disallowed_methods, clippy::print_stdout, clippy::unwrap_used)] // helpers of tests fail by panicking, too
#![allow(missing_docs)]

mod support;

#[path = "bfc/raw.rs"]
mod raw;

#[path = "bfc/images.rs"]
mod images;

#[path = "bfc/speed.rs"]
mod speed;

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use camino::{Utf8Path, Utf8PathBuf};
use proxmox_lxcri::integrations::bfc::format::Checksum;
use proxmox_lxcri::integrations::bfc::{Container, ExtractOptions, KeySource, Kind, ReadError, extract, verify};
use raw::{Object, Raw, file, folder, link, packed, raw};

fn golden(name: &str) -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bfc").join(name)
}

/// A key or password as it has to lie: nobody else reads it.
fn private(path: &Utf8Path, content: &[u8]) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// The golden files' key, in `dir`: what git hands out, all may read.
fn golden_key(dir: &Utf8Path) -> Utf8PathBuf {
    let path = dir.join("golden-key");
    private(&path, &std::fs::read(golden("key")).unwrap());
    path
}

fn temp() -> (tempfile::TempDir, Utf8PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).unwrap();
    (dir, path)
}

/// `proxmox-lxcri bfc ARGS`.
pub fn bfc(args: &[&str]) -> Output {
    let program =
        std::env::var_os("LXCRI_BIN").map_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into(), PathBuf::from);
    Command::new(program).arg("bfc").args(args).output().unwrap()
}

pub fn ok(args: &[&str]) -> String {
    let out = bfc(args);
    assert!(out.status.success(), "bfc {args:?}: {}", support::describe(&out));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(args: &[&str], why: &str) {
    let out = bfc(args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "bfc {args:?}: {}", support::describe(&out));
    assert!(said.contains(why), "bfc {args:?}: not {why:?} in {said}");
}

fn paths(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
            found.push(entry.path().strip_prefix(folder).unwrap().to_owned());
        }
    }
    found.sort();
    found
}

/// What the golden files hold: path, mode, content or target.
fn content() -> BTreeMap<&'static str, (u32, Vec<u8>)> {
    BTreeMap::from([
        ("dir", (0o040_755, vec![])),
        ("dir/empty", (0o100_600, vec![])),
        ("dir/hello.txt", (0o100_644, b"hello\n".to_vec())),
        ("dir/sub", (0o040_700, vec![])),
        ("dir/sub/repeat", (0o100_755, b"the same line again\n".repeat(400))),
        ("dir/sub/zeros", (0o100_644, vec![0; 5000])),
        ("dir-x", (0o100_644, (0..=255).collect())),
        ("link", (0o120_777, b"dir/hello.txt".to_vec())),
        ("out", (0o120_777, b"../../etc/passwd".to_vec())),
        ("ends.", (0o100_444, b"a name that ends in a dot".to_vec())),
        ("uml\u{e4}ut", (0o100_644, vec![0, 1, 2])),
    ])
}

#[test]
fn golden_files_of_every_variant() {
    let (_dir, dir) = temp();
    for name in [
        "plain",
        "plain-standard-crc",
        "zstd",
        "zstd-standard-crc",
        "key",
        "key-zstd",
        "key-zstd-standard-crc",
        "password",
        "password-zstd",
    ] {
        let mut container = Container::open(&golden(&format!("{name}.bfc"))).unwrap();
        let standard = name.ends_with("standard-crc");
        assert_eq!(container.checksum(), if standard { Checksum::Standard } else { Checksum::Raw }, "{name}");
        let encrypted = name.starts_with("key") || name.starts_with("password");
        assert_eq!(container.is_encrypted(), encrypted, "{name}");
        if encrypted {
            assert!(matches!(container.try_key(), Err(ReadError::NoKey(_))), "{name}");
            container.unlock(&KeySource::password("wrong horse").unwrap()).map_or_else(
                |e| assert!(name.starts_with("key") && e.to_string().contains("key file"), "{name}: {e}"),
                |()| assert!(name.starts_with("password"), "{name}"),
            );
            if name.starts_with("password") {
                assert!(matches!(container.try_key(), Err(ReadError::Sealed(_))), "{name}");
            }
            let key = match name.starts_with("key") {
                true => KeySource::key_file(&golden_key(&dir)),
                false => KeySource::password("correct horse"),
            };
            container.unlock(&key.unwrap()).unwrap();
            container.try_key().unwrap();
        }
        let expected = content();
        assert_eq!(container.entries().len(), expected.len(), "{name}");
        assert!(container.entries().is_sorted_by(|a, b| a.path < b.path), "{name}");
        for (path, (mode, content)) in &expected {
            let entry = container.find(path.as_bytes()).unwrap_or_else(|| panic!("{name}: {path}"));
            assert_eq!((entry.mode, entry.mtime_ns), (*mode, 1_700_000_000_123_456_789), "{name}: {path}");
            assert_eq!(entry.encrypted, encrypted && entry.kind() == Kind::File, "{name}: {path}");
            let compressed = name.contains("zstd") && path.starts_with("dir/sub/");
            assert_eq!(entry.compressed, compressed, "{name}: {path}");
            if entry.kind() != Kind::Folder {
                assert_eq!(container.read_small(entry, 1 << 20).unwrap(), *content, "{name}: {path}");
            }
        }
        let found = verify(&container, true, &mut |_| {});
        assert!(found.problems.is_empty(), "{name}: {:?}", found.problems);
        let (_dir, out) = temp();
        let options = ExtractOptions { keep_paths: true, ..ExtractOptions::default() };
        extract(&container, out.as_std_path(), &options, &mut |_, _| {}).unwrap();
        for (path, (mode, content)) in &expected {
            let path = out.join(path);
            let meta = path.symlink_metadata().unwrap();
            assert_eq!(meta.mtime(), 1_700_000_000, "{name}: {path}");
            if meta.is_symlink() {
                assert_eq!(path.read_link_utf8().unwrap().as_str().as_bytes(), content, "{name}: {path}");
            } else {
                assert_eq!(meta.mode(), *mode, "{name}: {path}");
            }
            if meta.is_file() {
                assert_eq!(std::fs::read(&path).unwrap(), *content, "{name}: {path}");
            }
        }
        assert_eq!(paths(out.as_std_path()).len(), expected.len());
    }
}

/// One more with the object changed.
fn one(change: impl FnOnce(&mut Object)) -> Vec<u8> {
    let mut object = file("f", b"some content");
    change(&mut object);
    raw(vec![folder("a"), object]).bytes()
}

fn whole(change: impl FnOnce(&mut Raw)) -> Vec<u8> {
    let mut raw = raw(vec![folder("a"), file("f", b"some content")]);
    change(&mut raw);
    raw.bytes()
}

fn bytes(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = whole(|_| {});
    change(&mut bytes);
    bytes
}

/// What is wrong, the container, and what the error says.
fn malformed() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let zeros = zstd::encode_all(&[0; 100_000][..], 3).unwrap();
    let sealed = std::fs::read(golden("key.bfc")).unwrap();
    let long = "x".repeat(4096);
    let deep = "d/".repeat(300) + "f";
    // A frame whose window has 2 GiB, then nothing.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00];
    vec![
        ("an empty file", vec![], "too few"),
        ("a short file", vec![0; 4000], "too few"),
        ("zeros", vec![0; 9000], "does not begin"),
        ("another magic", bytes(|b| b[0] = b'X'), "does not begin"),
        ("a changed header", bytes(|b| b[100] = 1), "header's checksum"),
        ("an unknown feature", whole(|r| r.features = 1 << 40), "features"),
        (
            "another footer",
            bytes(|b| {
                let n = b.len();
                b[n - 56] = b'X';
            }),
            "does not end",
        ),
        (
            "another end",
            bytes(|b| {
                let n = b.len();
                b[n - 1] = 1;
            }),
            "does not end",
        ),
        ("a byte less", bytes(|b| b.truncate(b.len() - 1)), "does not end"),
        ("a byte more", bytes(|b| b.push(0)), "does not end"),
        ("half of it", bytes(|b| b.truncate(b.len() / 2 + 2100)), "does not end"),
        ("an index past the end", whole(|r| r.footer_offset = Some(1 << 40)), "does not lie between"),
        ("an index in the header", whole(|r| r.footer_offset = Some(0)), "does not lie between"),
        ("an index that overflows", whole(|r| r.footer_offset = Some(u64::MAX - 8)), "does not lie between"),
        ("an index without end", whole(|r| r.footer_size = Some(u64::MAX)), "does not lie between"),
        ("an index of nothing", whole(|r| r.footer_size = Some(0)), "does not lie between"),
        (
            "a changed index",
            bytes(|b| {
                let n = b.len();
                b[n - 60] ^= 1;
            }),
            "index's checksum",
        ),
        ("another index version", whole(|r| r.version = 2), "index version 2"),
        ("2^32-1 entries", whole(|r| r.count = Some(u32::MAX)), "do not fit into the index"),
        ("an entry too many", whole(|r| r.count = Some(3)), "do not fit into the index"),
        ("an entry too few", whole(|r| r.count = Some(1)), "follow the index's last entry"),
        ("more after the entries", whole(|r| r.index_tail = vec![0; 3]), "follow the index's last entry"),
        ("a path of no bytes", one(|o| o.index_path_len = Some(0)), "a path of 0 bytes"),
        ("a path of 2^32-1 bytes", one(|o| o.index_path_len = Some(u32::MAX)), "a path of 4294967295 bytes"),
        ("a path beyond the index", one(|o| o.index_path_len = Some(2000)), "beyond the index's end"),
        ("a path too long", raw(vec![file(&long, b"")]).bytes(), "a path of 4096 bytes"),
        ("a path too deep", raw(vec![file(&deep, b"")]).bytes(), "no path inside"),
        ("an absolute path", raw(vec![file("/etc/passwd", b"x")]).bytes(), "no path inside"),
        ("a path that leads up", raw(vec![file("../f", b"x")]).bytes(), "no path inside"),
        ("a path that leads up later", raw(vec![file("a/../../f", b"x")]).bytes(), "no path inside"),
        ("a path that is up", raw(vec![folder("..")]).bytes(), "no path inside"),
        ("a path with a dot", raw(vec![file("a/./f", b"x")]).bytes(), "no path inside"),
        ("a path with nothing between", raw(vec![file("a//f", b"x")]).bytes(), "no path inside"),
        ("a path with a NUL", raw(vec![file("a\0b", b"x")]).bytes(), "no path inside"),
        ("a path with an end", raw(vec![folder("a/")]).bytes(), "no path inside"),
        ("one path twice", raw(vec![file("f", b"1"), file("f", b"2")]).bytes(), "two entries are called"),
        ("an object past the end", one(|o| o.index_offset = Some(1 << 50)), "not between header and index"),
        ("an object in the header", one(|o| o.index_offset = Some(100)), "not between header and index"),
        ("an object that overflows", one(|o| o.index_offset = Some(u64::MAX - 10)), "not between header and index"),
        (
            "an object in the index",
            one(|o| {
                o.index_offset = Some(4096 + 48 + 48 + 8);
            }),
            "not between header and index",
        ),
        ("objects that overlap", one(|o| o.index_offset = Some(4096 + 16)), "overlap"),
        ("one object for two", one(|o| o.index_offset = Some(4096)), "overlap"),
        ("an object that is too short", one(|o| o.index_size = Some(20)), "shorter than its own header"),
        (
            "a FIFO",
            one(|o| {
                o.mode = 0o010_644;
            }),
            "no file, folder or link",
        ),
        (
            "a device",
            one(|o| {
                o.mode = 0o060_644;
            }),
            "no file, folder or link",
        ),
        (
            "an unknown compression",
            one(|o| {
                o.comp = 2;
            }),
            "compression 2",
        ),
        (
            "an unknown encryption",
            one(|o| {
                o.enc = 9;
            }),
            "encryption 9",
        ),
        (
            "a folder with content",
            raw(vec![Object { content: vec![1; 16], ..folder("a") }]).bytes(),
            "a folder has no content",
        ),
        ("a compressed folder", raw(vec![Object { comp: 1, ..folder("a") }]).bytes(), "only files are compressed"),
        ("an encrypted link", raw(vec![Object { enc: 1, ..link("l", "x") }]).bytes(), "only files are compressed"),
        ("a link to nothing", raw(vec![link("l", "")]).bytes(), "a link to 0 bytes"),
        ("a link too long", raw(vec![link("l", &"x".repeat(5000))]).bytes(), "a link to 5000 bytes"),
        (
            "a link that lies",
            raw(vec![Object { orig_size: Some(40), ..link("l", "x") }]).bytes(),
            "are stored of a link",
        ),
        ("a file that lies", one(|o| o.orig_size = Some(1 << 62)), "bytes are stored of"),
        ("a file behind a link", raw(vec![link("a", "/tmp"), file("a/f", b"x")]).bytes(), "no folder"),
        (
            "a file far behind a link",
            raw(vec![link("a", ".."), link("a-b", "."), folder("a/b"), file("a/b/f", b"x")]).bytes(),
            "no folder",
        ),
        ("a file below a file", raw(vec![file("a", b""), file("a/f", b"x")]).bytes(), "no folder"),
        ("an object of another name", one(|o| o.index_path = Some(b"g".to_vec())), "differ in name"),
        ("an object with another length of name", one(|o| o.name_len = Some(9)), "differ in name"),
        ("an object of another type", one(|o| o.kind = 2), "differ in type"),
        ("an object of no type", one(|o| o.kind = 77), "differ in type"),
        ("an object with another mode", one(|o| o.index_mode = Some(0o100_777)), "differ in mode"),
        (
            "an object with another compression",
            one(|o| {
                o.content = zeros.clone();
                o.index_kind_flags = Some((1, 0));
            }),
            "differ in compression",
        ),
        ("content of another checksum", one(|o| o.crc = Some(1)), "checksum does not fit"),
        ("compressed garbage", raw(vec![packed("f", b"garbage, not zstd", b"", 100)]).bytes(), "can't be decompressed"),
        (
            "half a frame",
            raw(vec![packed("f", &zeros[..zeros.len() - 3], &[0; 100_000], 100_000)]).bytes(),
            "content of \"f\"",
        ),
        ("more than it says", raw(vec![packed("f", &zeros, &[0; 50], 50)]).bytes(), "longer than it says"),
        ("less than it says", raw(vec![packed("f", &zeros, &[0; 100_000], 1 << 62)]).bytes(), "bytes are missing"),
        (
            "more after the frame",
            raw(vec![packed("f", &[&zeros[..], b"more"].concat(), &[0; 100_000], 100_000)]).bytes(),
            "more follows",
        ),
        ("a window of 2 GiB", raw(vec![packed("f", &window, b"", 1 << 31)]).bytes(), "can't be decompressed"),
        (
            "too little to be encrypted",
            raw(vec![Object { enc: 1, orig_size: Some(0), ..file("f", &[0; 20]) }]).bytes(),
            "no encrypted content",
        ),
        ("encrypted without a key", sealed, "a key file or a password is needed"),
    ]
}

#[test]
fn malformed_containers_are_refused_and_write_nothing() {
    let cases = malformed();
    assert!(cases.len() >= 60);
    let (_dir, dir) = temp();
    let good = dir.join("good.bfc");
    std::fs::write(&good, whole(|_| {})).unwrap();
    assert_eq!(Container::open(&good).unwrap().entries().len(), 2);
    for (name, bytes, why) in cases {
        let file = dir.join("x.bfc");
        std::fs::write(&file, bytes).unwrap();
        let out = dir.join("out");
        std::fs::create_dir(&out).unwrap();
        let options = ExtractOptions { keep_paths: true, force: true, paths: vec![] };
        let error = match Container::open(&file) {
            Err(e) => e,
            Ok(container) => match extract(&container, out.as_std_path(), &options, &mut |_, _| {}) {
                Err(e) => e.into(),
                Ok(_) => panic!("{name}: it was extracted"),
            },
        };
        assert!(error.chain().contains(why), "{name}: not {why:?} in {:?}", error.chain());
        let left: Vec<_> = paths(out.as_std_path()).into_iter().filter(|p| p != Path::new("a")).collect();
        assert!(left.is_empty(), "{name}: {left:?}");
        std::fs::remove_dir_all(&out).unwrap();
    }
    // The program's words and status, for one that shows at once and one that shows in the content.
    std::fs::write(dir.join("x.bfc"), whole(|r| r.count = Some(u32::MAX))).unwrap();
    fails(&["list", dir.join("x.bfc").as_str()], "do not fit into the index");
    std::fs::write(dir.join("x.bfc"), one(|o| o.crc = Some(1))).unwrap();
    ok(&["verify", dir.join("x.bfc").as_str()]);
    fails(&["verify", "--deep", dir.join("x.bfc").as_str()], "checksum does not fit");
}

#[test]
fn tampered_content_is_never_decrypted() {
    let (_dir, dir) = temp();
    let bytes = std::fs::read(golden("key-zstd.bfc")).unwrap();
    let container = Container::open(&golden("key-zstd.bfc")).unwrap();
    let entry = container.find(b"dir/sub/repeat").unwrap().clone();
    // Nonce, text and tag.
    for at in [entry.content_at(), entry.content_at() + 20, entry.size - 1] {
        let mut changed = bytes.clone();
        changed[(entry.offset + at) as usize] ^= 0x10;
        let file = dir.join("x.bfc");
        std::fs::write(&file, changed).unwrap();
        let mut container = Container::open(&file).unwrap();
        container.unlock(&KeySource::key_file(&golden_key(&dir)).unwrap()).unwrap();
        let e = container.content(container.find(b"dir/sub/repeat").unwrap()).err().expect("refused");
        assert!(matches!(e, ReadError::Sealed(_)), "{e}");
    }
}

fn tree(dir: &Utf8Path) {
    std::fs::create_dir_all(dir.join("in/sub/empty")).unwrap();
    std::fs::write(dir.join("in/hello"), "hello\n").unwrap();
    std::fs::write(dir.join("in/sub/big"), vec![b'x'; 3 << 20]).unwrap();
    std::fs::write(dir.join("in/sub/.hidden."), "a name that ends in a dot").unwrap();
    std::fs::set_permissions(dir.join("in/hello"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    symlink("../hello", dir.join("in/sub/link")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.join("in/fifo").as_std_path(),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
}

#[test]
fn create_list_info_verify_extract() {
    let (_dir, dir) = temp();
    tree(&dir);
    let path = |name: &str| dir.join(name).into_string();
    private(&dir.join("key"), &[9; 32]);
    private(&dir.join("password"), b"secret\n");
    let (key_file, word_file) = (path("key"), path("password"));
    let (key_file, word_file) = (key_file.as_str(), word_file.as_str());
    let variants: [(&str, &[&str], &[&str]); 6] = [
        ("none", &[], &[]),
        ("zstd", &["-c", "zstd", "-l", "5"], &[]),
        ("auto", &["-c", "auto", "-t", "1"], &[]),
        ("key", &["-c", "zstd", "-k", key_file], &["-K", key_file]),
        ("password", &["-e", "secret"], &["-p", "secret"]),
        ("file", &["-c", "zstd", "--password-file", word_file], &["--password-file", word_file]),
    ];
    for (name, make, read) in variants {
        let (file, out) = (path(&format!("{name}.bfc")), path(&format!("out-{name}")));
        let input = path("in");
        let (input, file, out) = (input.as_str(), file.as_str(), out.as_str());
        let created = bfc(&[&["create"][..], make, &[file, input]].concat());
        assert!(created.status.success(), "{}", support::describe(&created));
        assert!(String::from_utf8_lossy(&created.stderr).contains("in/fifo"), "what is left out is told");
        let list = ok(&["list", file]);
        let names: Vec<&str> = list.lines().collect();
        let all = ["in", "in/hello", "in/sub", "in/sub/.hidden.", "in/sub/big", "in/sub/empty", "in/sub/link"];
        assert_eq!(names, all, "{name}");
        assert_eq!(ok(&["list", file, "in/sub/"]).lines().count(), 5);
        let long = ok(&["list", "-l", "-s", "-c", file]);
        assert!(long.contains("-rwsr-x--x       6B ") && long.contains("0x6217a434 in/hello"), "{long}");
        assert!(long.contains("in/sub/link -> ../hello") && long.contains("    3.0M "), "{long}");
        let info = ok(&["info", "-d", file]);
        assert!(info.contains("Total entries: 7") && info.contains("Symlinks: 1"), "{info}");
        assert_eq!(info.contains("Encryption"), !read.is_empty());
        let info = ok(&["info", file, "in/sub/big"]);
        let compressed = make.contains(&"-c");
        assert_eq!(info.contains("Compression: zstd"), compressed, "{info}");
        ok(&["verify", file]);
        let key: Vec<&str> = if name == "password" { vec!["--password-file", word_file] } else { read.to_vec() };
        assert!(ok(&[&["verify", "--deep"][..], &key, &[file]].concat()).contains("sound"));
        std::fs::create_dir(out).unwrap();
        ok(&[&["extract", "-k", "-C", out][..], read, &[file]].concat());
        let extracted = paths(Path::new(out));
        assert_eq!(extracted.len(), 7, "{extracted:?}");
        for same in ["in/hello", "in/sub/big", "in/sub/.hidden."] {
            let (a, b) = (dir.join(same), Path::new(out).join(same));
            assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap(), "{name}: {same}");
            assert_eq!(std::fs::metadata(a).unwrap().mtime_nsec(), std::fs::metadata(b).unwrap().mtime_nsec());
        }
        // What runs as somebody else in the container's place does not out here.
        assert_eq!(std::fs::metadata(Path::new(out).join("in/hello")).unwrap().mode() & 0o7777, 0o751);
        // Again: refused without -f, and nothing changed.
        fails(&[&["extract", "-k", "-C", out][..], read, &[file]].concat(), "is there already");
        ok(&[&["extract", "-f", "-k", "-C", out][..], read, &[file, "in/sub"]].concat());
        if !read.is_empty() {
            let empty = path(&format!("empty-{name}"));
            let empty = empty.as_str();
            std::fs::create_dir(empty).unwrap();
            fails(&["extract", "-k", "-C", empty, file], "key file or a password");
            fails(&["verify", "--deep", file], "needs --keyfile");
            if name != "key" {
                fails(&["extract", "-k", "-C", empty, "-p", "wrong", file], "can't be decrypted");
            }
            assert!(paths(Path::new(empty)).is_empty(), "nothing is made with a wrong key");
        }
    }
    let (file, flat) = (path("none.bfc"), path("flat"));
    std::fs::create_dir(&flat).unwrap();
    ok(&["extract", "-C", &flat, &file]);
    assert_eq!(paths(Path::new(&flat)), [".hidden.", "big", "hello", "link"].map(PathBuf::from));
    fails(&["extract", "-C", &flat, &file, "none"], "there is no entry \"none\"");
    fails(&["create", &file, &path("in")], "is there already");
    fails(&["create", "-f", &file, &path("in"), &path("gone")], "gone");
    assert_eq!(ok(&["list", &file]).lines().count(), 7, "a failed create leaves what was there");
    fails(&["create", &path("y.bfc"), &path("in/hello"), &path("in/hello")], "twice");
    assert!(!dir.join("y.bfc").exists());
    assert!(!paths(dir.as_std_path()).iter().any(|p| p.to_string_lossy().contains(".tmp-")));
    let same = |name: &str| {
        ok(&["create", "--deterministic", "-c", "zstd", &path(name), &path("in")]);
        std::fs::read(dir.join(name)).unwrap()
    };
    assert_eq!(same("d1.bfc"), same("d2.bfc"));
    assert_eq!(bfc(&["create", "-l", "99", &path("z.bfc"), &path("in")]).status.code(), Some(2));
}

#[test]
fn links_that_were_there_are_not_followed() {
    let (_dir, dir) = temp();
    tree(&dir);
    let path = |name: &str| dir.join(name).into_string();
    ok(&["create", &path("x.bfc"), &path("in")]);
    for target in ["outside", "../outside"] {
        let out = dir.join("out");
        std::fs::create_dir_all(out.join("in")).unwrap();
        std::fs::create_dir_all(dir.join("outside")).unwrap();
        symlink(target, out.join("in/sub")).unwrap();
        fails(&["extract", "-f", "-k", "-C", out.as_str(), &path("x.bfc")], "a link is on the way");
        std::fs::remove_dir_all(out).unwrap();
    }
    assert!(paths(dir.join("outside").as_std_path()).is_empty());
    // A link in a file's own place is replaced with -f, not written through.
    let out = dir.join("flat");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(dir.join("outside/hello"), "mine").unwrap();
    symlink("../outside/hello", out.join("hello")).unwrap();
    ok(&["extract", "-f", "-C", out.as_str(), &path("x.bfc"), "in/hello"]);
    assert_eq!(std::fs::read(dir.join("outside/hello")).unwrap(), b"mine");
    assert_eq!(std::fs::read(out.join("hello")).unwrap(), b"hello\n");
}

#[test]
fn who_has_a_key_gets_nothing_that_is_not_encrypted() {
    let (_dir, dir) = temp();
    let path = |name: &str| dir.join(name).into_string();
    std::fs::write(dir.join("f"), "somebody else's").unwrap();
    std::fs::create_dir(dir.join("out")).unwrap();
    ok(&["create", &path("plain.bfc"), &path("f")]);
    // The header says encrypted, the file is not.
    std::fs::write(dir.join("mixed.bfc"), raw(vec![folder("bin"), file("bin/sh", b"somebody else's")]).bytes())
        .unwrap();
    let key = golden_key(&dir).into_string();
    for (name, what) in [("plain.bfc", "the container is not encrypted"), ("mixed.bfc", "\"bin/sh\" is not encrypted")]
    {
        fails(&["extract", "-C", &path("out"), "-K", &key, &path(name)], what);
        fails(&["extract", "-C", &path("out"), "-p", "secret", &path(name)], what);
        fails(&["verify", "--deep", "-K", &key, &path(name)], what);
    }
    assert!(paths(dir.join("out").as_std_path()).is_empty());
}

#[test]
fn a_container_is_not_packed_into_itself() {
    let (_dir, dir) = temp();
    std::fs::create_dir(dir.join("in")).unwrap();
    // More than is written at once: the new container has grown when its folder is read.
    std::fs::write(dir.join("in/a"), vec![7; 1 << 20]).unwrap();
    let (file, input) = (dir.join("in/x.bfc"), dir.join("in"));
    let (file, input) = (file.as_str(), input.as_str());
    for args in [&["create"][..], &["create", "-f"]] {
        let made = bfc(&[args, &[file, input]].concat());
        assert!(made.status.success(), "{}", support::describe(&made));
        assert_eq!(String::from_utf8_lossy(&made.stderr).contains("the container itself"), args.len() == 2);
        assert_eq!(ok(&["list", file]), "in\nin/a\n");
    }
    // Under another name it would be an input that is lost; as an input of its own nothing would be left.
    let (before, link) = (std::fs::read(file).unwrap(), dir.join("in/link").into_string());
    std::fs::hard_link(file, &link).unwrap();
    for inputs in [&[input][..], &[link.as_str()], &[file]] {
        fails(&[&["create", "-f", file][..], inputs].concat(), "is the container");
        assert_eq!(std::fs::read(file).unwrap(), before);
    }
}

#[test]
fn what_no_container_can_hold_is_refused_as_an_input() {
    let (_dir, dir) = temp();
    let fifo = dir.join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, fifo.as_std_path(), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    fails(&["create", dir.join("x.bfc").as_str(), fifo.as_str()], "no container can hold");
    fails(&["create", dir.join("x.bfc").as_str(), "/dev/null"], "no container can hold");
    assert!(!dir.join("x.bfc").exists());
}

#[test]
fn a_link_with_a_nul_is_told_by_whoever_reads_it() {
    let (_dir, dir) = temp();
    let file = dir.join("x.bfc");
    std::fs::write(&file, raw(vec![link("l", "a\0b")]).bytes()).unwrap();
    fails(&["verify", "--deep", file.as_str()], "a NUL in its target");
    fails(&["extract", "-k", "-C", dir.as_str(), file.as_str()], "a NUL in its target");
    assert!(std::fs::symlink_metadata(dir.join("l")).is_err());
}

#[test]
fn a_killed_create_leaves_nothing_and_a_replaced_file_keeps_its_mode() {
    let (_dir, dir) = temp();
    std::fs::File::create(dir.join("endless")).unwrap().set_len(1 << 40).unwrap();
    let program = std::env::var_os("LXCRI_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into());
    let mut command = Command::new(program);
    command.args(["bfc", "create", "-c", "zstd"]).args([dir.join("x.bfc"), dir.join("endless")]);
    let mut child = command.spawn().unwrap();
    // It works when it has its file open, whose only name is in its own list of descriptors.
    let fds = format!("/proc/{}/fd", child.id());
    support::wait_for("the file being written", std::time::Duration::from_secs(20), || {
        let links = std::fs::read_dir(&fds).ok()?.flatten().filter_map(|e| std::fs::read_link(e.path()).ok());
        links.into_iter().any(|l| l == dir.join("endless").as_std_path()).then_some(())
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(paths(dir.as_std_path()), [Path::new("endless")]);

    // As long as a name can be; nobody else may read it before or after.
    std::fs::write(dir.join("f"), "secret").unwrap();
    let (long, input) = (dir.join(format!("{}.bfc", "x".repeat(251))), dir.join("f").into_string());
    ok(&["create", long.as_str(), &input]);
    std::fs::set_permissions(&long, std::fs::Permissions::from_mode(0o600)).unwrap();
    ok(&["create", "-f", long.as_str(), &input]);
    assert_eq!(std::fs::metadata(&long).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_folder_is_closed_until_it_is_complete() {
    let (_dir, dir) = temp();
    let closed = Object { mode: 0o040_700, ..folder("a") };
    let bad = Object { crc: Some(1), ..file("a/g", b"damaged") };
    std::fs::write(dir.join("x.bfc"), raw(vec![closed, file("a/f", b"private"), bad]).bytes()).unwrap();
    std::fs::create_dir(dir.join("out")).unwrap();
    let out = dir.join("out").into_string();
    fails(&["extract", "-k", "-C", &out, dir.join("x.bfc").as_str()], "checksum does not fit");
    assert!(dir.join("out/a/f").exists() && !dir.join("out/a/g").exists());
    assert_eq!(std::fs::metadata(dir.join("out/a")).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn odd_names_flags_and_outputs() {
    use std::os::unix::ffi::OsStrExt;
    let (_dir, dir) = temp();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\n\x1b[31m");
    std::fs::create_dir(dir.join("in")).unwrap();
    std::fs::write(dir.join("in").as_std_path().join(odd), "odd").unwrap();
    let fifo = dir.join("in").as_std_path().join("fifo\u{1b}[31m");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let (file, input) = (dir.join("x.bfc"), dir.join("in"));
    let (file, input) = (file.as_str(), input.as_str());
    let made = bfc(&["create", "-v", file, input]);
    assert!(made.status.success(), "{}", support::describe(&made));
    assert!(![made.stdout, made.stderr].concat().contains(&0x1b), "no name reaches a terminal as it is");
    // Flags of all verbs may come before the verb, as in the format's own tool.
    assert_eq!(ok(&["-q", "create", "-f", file, input]), "");

    let program = std::env::var_os("LXCRI_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_proxmox-lxcri").into());
    let run = |args: &[&str], entry: Option<&std::ffi::OsStr>, out: std::process::Stdio| {
        let mut command = Command::new(&program);
        command.arg("bfc").args(args).args(entry).stdout(out).output().unwrap()
    };
    let inside = std::ffi::OsStr::from_bytes(b"in/\xff\n\x1b[31m");
    let listed = run(&["list", file], Some(inside), std::process::Stdio::piped());
    assert_eq!(listed.stdout, b"in/\\xff\\n\\x1b[31m\n", "{}", support::describe(&listed));
    let out = dir.join("out").into_string();
    std::fs::create_dir(&out).unwrap();
    assert!(run(&["extract", "-C", &out, file], Some(inside), std::process::Stdio::piped()).status.success());
    assert_eq!(paths(Path::new(&out)), [odd]);

    // A closed output is not /dev/null.
    let closed = format!("exec {} bfc list {file} >&-", program.display());
    let closed = Command::new("/bin/sh").args(["-c", &closed]).output().unwrap();
    assert_eq!(closed.status.code(), Some(1), "{}", support::describe(&closed));
    assert!(String::from_utf8_lossy(&closed.stderr).contains("it is closed"));

    // Where output can't go: said, or, where nobody reads it, no matter.
    for args in [&["verify", file][..], &["list", file], &["create", "-f", "-v", file, input]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let full = run(args, None, full.into());
        assert_eq!(full.status.code(), Some(1), "{}", support::describe(&full));
        assert!(String::from_utf8_lossy(&full.stderr).contains("writing to standard output"));
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let gone = run(args, None, writer.into());
        assert_eq!(gone.status.code(), Some(0), "{}", support::describe(&gone));
    }
}
