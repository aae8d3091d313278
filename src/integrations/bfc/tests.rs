//! Round trips of any tree through any way of writing, and reading of damaged bytes.

use std::io::{Cursor, Read};
use std::sync::Arc;

use camino::Utf8PathBuf;
use proptest::prelude::*;

use super::format::{Checksum, Kind};
use super::*;

#[derive(Debug, Clone)]
enum Node {
    Folder,
    File(Vec<u8>),
    Link(Vec<u8>),
}

fn node() -> impl Strategy<Value = Node> {
    prop_oneof![
        Just(Node::Folder),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Node::File),
        (any::<u8>(), 0_usize..400_000).prop_map(|(byte, n)| Node::File(vec![byte; n])),
        "[a-z./]{1,40}".prop_map(|t| Node::Link(t.into_bytes())),
    ]
}

/// Paths none of which is below another one that is no folder.
fn tree() -> impl Strategy<Value = Vec<(String, Node, u32, u64)>> {
    let item = ("[a-c]{1,2}(/[a-c. ]{1,3}){0,3}", node(), 0_u32..0o10000, any::<u64>());
    prop::collection::vec(item, 0..12).prop_map(|items| {
        let mut kept: Vec<(String, Node, u32, u64)> = Vec::new();
        for (path, node, mode, time) in items {
            let clash = |other: &str, other_node: &Node, path: &str, node: &Node| {
                other == path
                    || (path.starts_with(&format!("{other}/")) && !matches!(other_node, Node::Folder))
                    || (other.starts_with(&format!("{path}/")) && !matches!(node, Node::Folder))
            };
            if format::is_path(path.as_bytes()) && !kept.iter().any(|(p, n, ..)| clash(p, n, &path, &node)) {
                kept.push((path, node, mode, time));
            }
        }
        kept
    })
}

fn options() -> impl Strategy<Value = WriteOptions> {
    let compress = prop_oneof![Just(Compress::Never), Just(Compress::Always), Just(Compress::Auto)];
    (compress, 1..5_i32, prop::option::of(0_u8..100), any::<bool>(), 0_u64..200).prop_map(
        |(compress, level, key, standard, threshold)| WriteOptions {
            compress,
            level,
            threshold,
            key: key.map(raw_key),
            checksum: if standard { Checksum::Standard } else { Checksum::Raw },
            ..WriteOptions::default()
        },
    )
}

fn raw_key(byte: u8) -> KeySource {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = Utf8PathBuf::from_path_buf(dir.path().join("key")).expect("UTF-8");
    let durability = crate::utils::atomic::Durability::Process;
    crate::utils::atomic::write(path.as_std_path(), &[byte; 32], 0o600, durability).expect("write");
    KeySource::key_file(&path).expect("key")
}

fn folder() -> (tempfile::TempDir, Utf8PathBuf) {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = Utf8PathBuf::from_path_buf(dir.path().to_owned()).expect("UTF-8");
    (dir, path)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_goes_in_comes_out(tree in tree(), options in options()) {
        let (_dir, dir) = folder();
        let path = dir.join("x.bfc");
        let key = options.key.clone();
        let mut writer = Writer::create(&path, options).expect("create");
        for (name, node, mode, time) in &tree {
            let name = name.as_bytes();
            match node {
                Node::Folder => writer.add_folder(name, *mode, *time),
                Node::Link(target) => writer.add_symlink(name, target, *mode, *time),
                Node::File(data) if data.len() % 7 == 3 => writer.add_stream(name, *mode, *time, &mut data.as_slice()),
                Node::File(data) => writer.add_file(name, *mode, *time, data.len() as u64, &mut Cursor::new(data)),
            }.expect("add");
        }
        let size = writer.finish().expect("finish");
        let mut container = Container::open(&path).expect("open");
        prop_assert_eq!(container.size(), size);
        prop_assert_eq!(container.entries().len(), tree.len());
        let files = tree.iter().filter(|(_, n, ..)| matches!(n, Node::File(_))).count();
        if let Some(key) = &key {
            if files > 0 {
                prop_assert!(matches!(container.try_key(), Err(ReadError::NoKey(_))));
                container.unlock(&raw_key(0xee)).expect("unlock");
                prop_assert!(matches!(container.try_key(), Err(ReadError::Sealed(_))));
            }
            container.unlock(key).expect("unlock");
        }
        for (name, node, mode, time) in &tree {
            let entry = container.find(name.as_bytes()).expect("found");
            prop_assert_eq!((entry.mode & 0o7777, entry.mtime_ns), (*mode, *time));
            match node {
                Node::Folder => prop_assert_eq!(entry.kind(), Kind::Folder),
                Node::Link(target) => prop_assert_eq!(&container.target(entry).expect("target"), target),
                Node::File(data) => {
                    let mut read = Vec::new();
                    container.content(entry).expect("content").read_to_end(&mut read).expect("read");
                    prop_assert_eq!(&read, data);
                    prop_assert_eq!(entry.encrypted, key.is_some());
                }
            }
        }
        let problems = verify(&container, true, &mut |_| ()).problems;
        prop_assert!(problems.is_empty(), "{:?}", problems);
    }

    /// Any bytes, and any damage to good bytes, are refused or read; nothing panics, and what is read has its checksum.
    #[test]
    fn damage_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<u16>()) {
        let (_dir, dir) = folder();
        let path = dir.join("x.bfc");
        let mut writer = Writer::create(&path, WriteOptions { compress: Compress::Always, ..WriteOptions::default() }).expect("create");
        writer.add_folder(b"a", 0o755, 1).expect("add");
        writer.add_file(b"a/b", 0o644, 1, 5000, &mut Cursor::new(vec![7; 5000])).expect("add");
        writer.add_symlink(b"l", b"a/b", 0o777, 1).expect("add");
        writer.finish().expect("finish");
        let mut bytes = std::fs::read(&path).expect("read");
        for (at, value) in changes {
            // The header is mostly zeros.
            let at = 4096 - 4 + at.index(bytes.len() - 4096 + 4);
            bytes[at] = value;
        }
        if cut % 3 == 0 {
            bytes.truncate(bytes.len() - usize::from(cut) % bytes.len());
        }
        if let Ok(container) = Container::read(Arc::new(bytes)) {
            for entry in container.entries() {
                if let Ok(mut content) = container.content(entry) {
                    let _ = content.read_to_end(&mut Vec::new());
                }
            }
        }
    }

    #[test]
    fn garbage_never_panics(data in prop::collection::vec(any::<u8>(), 0..6000)) {
        prop_assert!(Container::read(Arc::new(data)).is_err());
    }
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let (_dir, dir) = folder();
    let source = dir.join("in");
    std::fs::create_dir_all(source.join("sub")).expect("mkdir");
    for n in 0..20 {
        std::fs::copy("/etc/hostname", source.join(format!("sub/f{n}"))).expect("copy");
    }
    let options = WriteOptions { compress: Compress::Always, deterministic: Some(0), ..WriteOptions::default() };
    for name in ["a.bfc", "b.bfc"] {
        let inputs = [source.clone().into_std_path_buf()];
        create(&dir.join(name), &inputs, options.clone(), &mut |_, _| {}).expect("create");
    }
    let read = |name: &str| std::fs::read(dir.join(name)).expect("read");
    assert_eq!(read("a.bfc"), read("b.bfc"));
    let key = Some(raw_key(1));
    let e = Writer::create(&dir.join("c.bfc"), WriteOptions { key, ..options }).err().expect("refused");
    assert!(e.to_string().contains("nonce"), "{e}");
}

#[test]
fn a_failed_write_leaves_the_target_as_it_was() {
    let (_dir, dir) = folder();
    let path = dir.join("x.bfc");
    let mut writer = Writer::create(&path, WriteOptions::default()).expect("create");
    writer.add_folder(b"a", 0o755, 0).expect("add");
    writer.finish().expect("finish");
    let before = std::fs::read(&path).expect("read");
    assert!(matches!(Writer::create(&path, WriteOptions::default()), Err(WriteError::Exists(_))));
    let force = WriteOptions { force: true, ..WriteOptions::default() };
    let mut writer = Writer::create(&path, force.clone()).expect("create");
    writer.add_folder(b"a", 0o755, 0).expect("add");
    writer.add_folder(b"a", 0o755, 0).expect("add");
    assert!(writer.finish().expect_err("twice").to_string().contains("twice"));
    let mut writer = Writer::create(&path, force).expect("create");
    assert!(writer.add_folder(b"../a", 0o755, 0).is_err());
    assert!(writer.add_file(b"f", 0o644, 0, 9, &mut Cursor::new(b"short")).is_err());
    assert!(writer.add_symlink(b"l", b"", 0o777, 0).is_err());
    drop(writer);
    assert_eq!(std::fs::read(&path).expect("read"), before);
    assert_eq!(std::fs::read_dir(&dir).expect("list").count(), 1);
}

#[test]
fn what_does_not_get_smaller_is_stored_as_it_is() {
    let (_dir, dir) = folder();
    let path = dir.join("x.bfc");
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(3 << 20)
    .collect();
    for compress in [Compress::Always, Compress::Auto] {
        let options = WriteOptions { compress, force: true, ..WriteOptions::default() };
        let mut writer = Writer::create(&path, options).expect("create");
        writer.add_file(b"noise", 0o644, 0, noise.len() as u64, &mut Cursor::new(&noise)).expect("add");
        writer.add_file(b"zeros", 0o644, 0, 3 << 20, &mut Cursor::new(vec![0; 3 << 20])).expect("add");
        writer.finish().expect("finish");
        let container = Container::open(&path).expect("open");
        let (noise_entry, zeros) = (container.find(b"noise").expect("noise"), container.find(b"zeros").expect("zeros"));
        assert!(!noise_entry.compressed && zeros.compressed);
        assert!(zeros.size < 10_000);
        assert!(verify(&container, true, &mut |_| {}).problems.is_empty());
        assert_eq!(container.read_small(noise_entry, 4 << 20).expect("read"), noise);
    }
}
