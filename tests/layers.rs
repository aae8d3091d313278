//! Layers that are hostile, odd, or just large: what is refused, what is unpacked, and that nothing leaves the folder.
#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests start programs and write files plainly

mod images_support;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use images_support::{Item, layer};
use proptest::prelude::*;
use proxmox_lxcri::integrations::layers::unpack::{Limits, UnpackError, Unpacked, Whiteouts, unpack};
use tar::EntryType;

/// A folder to unpack into, with something beside it that must stay as it is.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/file"), b"outside").unwrap();
        Self { dir }
    }
    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }
    fn unpack(&self, items: &[Item]) -> Result<Unpacked, UnpackError> {
        self.unpack_as(&layer(items), Whiteouts::Overlay)
    }
    fn unpack_as(&self, tar: &[u8], whiteouts: Whiteouts) -> Result<Unpacked, UnpackError> {
        unpack(&self.root(), tar, whiteouts, &Limits::default())
    }
    fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.root().join(path)).unwrap()
    }
    fn meta(&self, path: &str) -> std::fs::Metadata {
        std::fs::symlink_metadata(self.root().join(path)).unwrap()
    }
    fn xattr(&self, path: &str, name: &str) -> Option<Vec<u8>> {
        xattr::get(self.root().join(path), name).unwrap()
    }
    fn untouched(&self) {
        let names: Vec<_> = std::fs::read_dir(self.dir.path().join("outside")).unwrap().collect();
        assert_eq!(names.len(), 1);
        assert_eq!(std::fs::read(self.dir.path().join("outside/file")).unwrap(), b"outside");
        assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), 2);
    }
}

#[test]
fn hostile_layers_are_refused_by_name() {
    let deep = vec!["d"; 300].join("/");
    let long = "x".repeat(5000);
    let part = "y".repeat(256);
    let root = |kind| Item::new(kind, ".", 0o644);
    let cases: Vec<(Vec<Item>, &str)> = vec![
        (vec![Item::file("../outside/evil", b"x")], "'..'"),
        (vec![Item::file("a/../../outside/evil", b"x")], "'..'"),
        (vec![Item::file("", b"x")], "no name"),
        (vec![Item::file("x", b"x").pax("path", b"a\0b")], "NUL"),
        (vec![Item::file("x", b"x").pax("path", deep.as_bytes())], "too deep"),
        (vec![Item::file("x", b"x").pax("path", long.as_bytes())], "too long"),
        (vec![Item::file("x", b"x").pax("path", part.as_bytes())], "longer than 255"),
        (vec![Item::hardlink("evil", "../outside/file")], "leads out"),
        (vec![Item::hardlink("evil", "missing")], "target"),
        (vec![Item::dir("d"), Item::hardlink("evil", "d")], "hard link to a folder"),
        (vec![Item::symlink("evil", "")], "symbolic link"),
        (vec![Item::file("f", b"x"), Item::file("f/below", b"x")], "making its folder"),
        (vec![root(EntryType::Symlink)], "only be a folder"),
        (vec![root(EntryType::Regular)], "only be a folder"),
        (vec![Item::file("a/.wh.", b"")], "whiteout of no name"),
        (vec![Item::file("a/.wh...", b"")], "whiteout of no name"),
        (vec![Item::file("a/.wh..", b"")], "whiteout of no name"),
        (vec![Item::file("f", b"x").pax("uid", b"4294967295")], "no possible id"),
        (vec![Item::file("f", b"x").pax("gid", b"99999999999")], "no possible id"),
        (vec![Item::file("f", b"x").pax("uid", b"-1")], "no number"),
        (vec![Item::file("f", b"x").pax("size", b"1e9")], "no number"),
        (vec![Item::file("f", b"x").pax("mtime", b"soon")], "no time"),
        (vec![Item::file("f", b"x").pax("SCHILY.xattr.user.a\0b", b"x")], "malformed"),
        (vec![Item::file("f", b"x").pax("comment", &vec![b'x'; 2 << 20])], "extension header"),
        (vec![Item::new(EntryType::new(b'V'), "volume", 0o644)], "unknown type"),
        (vec![Item::symlink("loop", "loop"), Item::file("loop/x", b"x")], "making its folder"),
        (vec![Item::file("f", b"x").pax("GNU.sparse.map", b"0,1,0,9").pax("GNU.sparse.size", b"5")], "runs"),
    ];
    for (items, part) in cases {
        let place = Place::new();
        let e = place.unpack(&items).expect_err(part);
        let text = proxmox_lxcri::core::error::Error::from(e).chain();
        assert!(text.contains(part), "{part}: {text}");
        place.untouched();
    }
}

#[test]
fn links_are_kept_and_never_followed_out() {
    let place = Place::new();
    let outside = place.dir.path().join("outside");
    let out = outside.to_str().unwrap();
    place
        .unpack(&[
            Item::symlink("out", out),
            Item::file("out/file", b"inside"),
            Item::symlink("up", "../outside"),
            Item::file("up/file", b"inside"),
            Item::symlink("file", &format!("{out}/file")),
            Item::file("file", b"replaced, not followed"),
            Item::symlink("dir", out),
            Item::dir("dir").mode(0o700),
            Item::symlink("hard", &format!("{out}/file")),
            Item::hardlink("hard2", "hard"),
            Item::symlink("chmod", &format!("{out}/file")).mode(0o777).owner(1, 1),
            Item::file("/absolute/name", b"inside"),
            Item::symlink("abs", "/absolute"),
            Item::file("abs/two", b"2"),
            Item::file("out/.wh.file", b""),
        ])
        .unwrap();
    place.untouched();
    assert_eq!(place.text("file"), "replaced, not followed");
    assert!(place.meta("dir").is_dir());
    assert_eq!(std::fs::read_link(place.root().join("hard2")).unwrap(), outside.join("file"));
    assert_eq!(place.text("absolute/two"), "2");
    assert_eq!(std::fs::metadata(outside.join("file")).unwrap().uid(), 0);
}

#[test]
fn everything_an_entry_says_is_kept() {
    let place = Place::new();
    let long = format!("{}/{}", "n".repeat(120), "m".repeat(120));
    let capability = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".as_slice();
    let mut device = Item::new(EntryType::Char, "dev/null", 0o666);
    device.header.set_device_major(1).unwrap();
    device.header.set_device_minor(3).unwrap();
    let got = place
        .unpack(&[
            Item::dir("d").mode(0o1777).owner(5, 6),
            Item::file("d/suid", b"x").mode(0o6755).owner(1000, 1001),
            Item::file("cap", b"x").owner(7, 7).pax("SCHILY.xattr.security.capability", capability),
            Item::file("user", b"x").pax("SCHILY.xattr.user.text", b"line\nline\0"),
            Item::dir("forged").pax("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            Item::file("big-uid", b"x").pax("uid", b"3000000000").pax("gid", b"3000000001"),
            Item::file("time", b"x").pax("mtime", b"-1.5"),
            Item::new(EntryType::Fifo, "fifo", 0o640),
            device,
            Item::file("x", b"long").pax("path", long.as_bytes()),
            Item::symlink("l", "a/b/../c").owner(9, 9),
            Item::file("d/last", b"1"),
            Item::file("d/last", b"22"),
            Item::hardlink("d/again", "d/last"),
            Item::file("d/last", b"333"),
            Item::dir("kind"),
            Item::file("kind/below", b"x"),
            Item::file("kind", b"now a file"),
        ])
        .unwrap();
    assert_eq!((place.meta("d").mode() & 0o7777, place.meta("d").uid()), (0o1777, 5));
    assert_eq!(place.meta("d").mtime(), 1_000_000_000, "though files were put into it later");
    let suid = place.meta("d/suid");
    assert_eq!((suid.mode() & 0o7777, suid.uid(), suid.gid(), suid.mtime()), (0o6755, 1000, 1001, 1_000_000_000));
    assert_eq!(place.xattr("cap", "security.capability").unwrap(), capability);
    assert_eq!(place.xattr("user", "user.text").unwrap(), b"line\nline\0");
    assert_eq!(place.xattr("forged", "trusted.overlay.opaque"), None);
    assert_eq!((place.meta("big-uid").uid(), place.meta("big-uid").gid()), (3_000_000_000, 3_000_000_001));
    assert_eq!((place.meta("time").mtime(), place.meta("time").mtime_nsec()), (-2, 500_000_000));
    assert!(place.meta("fifo").file_type().is_fifo());
    let null = place.meta("dev/null");
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o777), (rustix::fs::makedev(1, 3), 0o666));
    assert_eq!(place.text(&long), "long");
    assert_eq!(std::fs::read_link(place.root().join("l")).unwrap(), Path::new("a/b/../c"));
    assert_eq!(place.meta("l").uid(), 9);
    assert_eq!((place.text("d/last"), place.text("d/again")), ("333".into(), "22".into()));
    assert_eq!(place.text("kind"), "now a file");
    assert_eq!(
        got.implicit.iter().map(PathBuf::as_path).collect::<Vec<_>>(),
        [Path::new("dev"), Path::new(&"n".repeat(120))]
    );
    assert!(!got.root_given);
}

#[test]
fn whiteouts_for_overlay() {
    let place = Place::new();
    place
        .unpack(&[
            Item::file("a/.wh.gone", b""),
            Item::file("o/.wh..wh..opq", b""),
            // Removed and made anew: a folder has to hide what was below the old one.
            Item::file("a/.wh.dir", b""),
            Item::dir("a/dir"),
            Item::dir("a/dir2"),
            Item::file("a/.wh.dir2", b""),
            Item::file("a/.wh.deep", b""),
            Item::file("a/deep/x/y", b"y"),
            Item::file("a/.wh.file", b""),
            Item::file("a/file", b"new"),
            Item::file(".wh..wh.plnk", b""),
        ])
        .unwrap();
    let gone = place.meta("a/gone");
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for folder in ["o", "a/dir", "a/dir2", "a/deep"] {
        assert_eq!(place.xattr(folder, "trusted.overlay.opaque").as_deref(), Some(b"y".as_slice()), "{folder}");
    }
    assert_eq!((place.text("a/file"), place.text("a/deep/x/y")), ("new".into(), "y".into()));
    assert!(!place.root().join(".wh..wh.plnk").try_exists().unwrap());
}

#[test]
fn whiteouts_applied_on_the_spot() {
    let place = Place::new();
    place.unpack(&[Item::file("a/gone", b"1"), Item::file("a/kept", b"1"), Item::file("o/old/x", b"1")]).unwrap();
    let top = layer(&[
        Item::file("a/.wh.gone", b""),
        Item::file("a/.wh.missing", b""),
        Item::file("o/new", b"2"),
        Item::file("o/.wh..wh..opq", b""),
        Item::file("b/new", b"2"),
        Item::file("b/.wh.new", b""),
    ]);
    place.unpack_as(&top, Whiteouts::Apply).unwrap();
    let names = |p: &str| {
        let mut list: Vec<String> = std::fs::read_dir(place.root().join(p))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        list.sort();
        list
    };
    assert_eq!((names("a"), names("o"), names("b")), (vec!["kept".into()], vec!["new".into()], vec!["new".into()]));
}

#[test]
fn limits_hold() {
    let limits = Limits { entries: 3, bytes: 10, path: 20, depth: 3 };
    for (items, what) in [
        (vec![Item::file("a", b""), Item::file("b", b""), Item::file("c", b""), Item::file("d", b"")], "entries"),
        (vec![Item::file("a/b/c", b""), Item::file("d", b"")], "entries"),
        (vec![Item::file("a", b"123456"), Item::file("b", b"12345")], "bytes"),
        (vec![Item::file("a/b/c/d", b"")], "too deep"),
        (vec![Item::file(&"x".repeat(21), b"")], "too long"),
    ] {
        let place = Place::new();
        let e = unpack(&place.root(), layer(&items).as_slice(), Whiteouts::Overlay, &limits).expect_err(what);
        assert!(e.to_string().contains(what), "{what}: {e}");
    }
}

#[test]
fn truncated_archives_are_errors() {
    let whole = layer(&[Item::dir("d"), Item::file("d/f", &[7; 5000])]);
    for cut in [100, 600, 1024 + 512, 3000] {
        let place = Place::new();
        assert!(place.unpack_as(&whole[..cut], Whiteouts::Overlay).is_err(), "{cut}");
    }
    // The end marks may be missing, as some builders leave them out.
    Place::new().unpack_as(&whole[..whole.len() - 1024], Whiteouts::Overlay).unwrap();
    Place::new().unpack_as(&[], Whiteouts::Overlay).unwrap();
}

/// What GNU tar writes, in all its formats, with holes, long names and hard links.
#[test]
fn gnu_tars_formats() {
    let source = Place::new();
    let root = source.root();
    let long = format!("{}/{}", "d".repeat(150), "f".repeat(150));
    std::fs::create_dir(root.join("d".repeat(150))).unwrap();
    std::fs::write(root.join(&long), b"long").unwrap();
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    for n in 0..40_u64 {
        std::os::unix::fs::FileExt::write_all_at(&sparse, format!("run {n}").as_bytes(), n * 1_000_000).unwrap();
    }
    sparse.set_len(50_000_000).unwrap();
    std::fs::hard_link(root.join("sparse"), root.join("sparse2")).unwrap();
    xattr::set(root.join(&long), "user.x", b"a\nb").unwrap();
    for format in [
        vec!["--format=gnu"],
        vec!["--format=pax", "--sparse-version=0.0"],
        vec!["--format=pax", "--sparse-version=0.1"],
        vec!["--format=pax", "--sparse-version=1.0", "--xattrs"],
    ] {
        let tar = source.dir.path().join("t.tar");
        let out = std::process::Command::new("/usr/bin/tar")
            .args(["-S", "-cf"])
            .arg(&tar)
            .args(&format)
            .arg("-C")
            .arg(&root)
            .arg(".")
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let place = Place::new();
        let data = std::fs::read(&tar).unwrap();
        std::fs::remove_file(&tar).unwrap();
        assert!(data.len() < 2_000_000, "sparse");
        place.unpack_as(&data, Whiteouts::Overlay).unwrap();
        assert_eq!(place.text(&long), "long", "{format:?}");
        let same = std::fs::read(place.root().join("sparse")).unwrap() == std::fs::read(root.join("sparse")).unwrap();
        assert!(same, "{format:?}");
        assert!(place.meta("sparse").blocks() * 512 < 2_000_000, "{format:?}: holes stay holes");
        assert_eq!(place.meta("sparse").ino(), place.meta("sparse2").ino());
        if format.contains(&"--xattrs") {
            assert_eq!(place.xattr(&long, "user.x").unwrap(), b"a\nb");
        }
    }
}

/// A node of a random tree.
#[derive(Debug, Clone, PartialEq)]
enum Node {
    Dir(u32),
    File(u32, Vec<u8>),
    Link(Vec<u8>),
}

fn trees() -> impl Strategy<Value = BTreeMap<Vec<u8>, Node>> {
    let name = prop::collection::vec(prop_oneof![b'a'..=b'e', Just(b' '), Just(0xff)], 1..4)
        .prop_filter("a name", |n| n != b"." && n != b"..");
    let path = prop::collection::vec(name, 1..4).prop_map(|parts| parts.join(&b'/'));
    let mode = (0_u32..0o10000).prop_map(|m| m | 0o700);
    let node = prop_oneof![
        mode.clone().prop_map(Node::Dir),
        (mode, prop::collection::vec(any::<u8>(), 0..1500)).prop_map(|(m, d)| Node::File(m, d)),
        prop::collection::vec(1_u8..=255, 1..30).prop_map(Node::Link),
    ];
    prop::collection::btree_map(path, node, 0..25).prop_map(|mut tree| {
        // What lies below anything but a folder can't be there.
        let all: Vec<Vec<u8>> = tree.keys().cloned().collect();
        for path in all {
            let parents = (1..path.len()).filter(|n| path[*n] == b'/').map(|n| path[..n].to_vec());
            for parent in parents {
                if !matches!(tree.entry(parent).or_insert(Node::Dir(0o755)), Node::Dir(_)) {
                    tree.remove(&path);
                    break;
                }
            }
        }
        tree
    })
}

fn seen(root: &Path, at: &Path, tree: &mut BTreeMap<Vec<u8>, Node>) {
    for entry in std::fs::read_dir(root.join(at)).unwrap() {
        let path = at.join(entry.unwrap().file_name());
        let meta = std::fs::symlink_metadata(root.join(&path)).unwrap();
        let node = if meta.is_dir() {
            seen(root, &path, tree);
            Node::Dir(meta.mode() & 0o7777)
        } else if meta.is_symlink() {
            Node::Link(std::fs::read_link(root.join(&path)).unwrap().as_os_str().as_bytes().to_vec())
        } else {
            Node::File(meta.mode() & 0o7777, std::fs::read(root.join(&path)).unwrap())
        };
        tree.insert(path.as_os_str().as_bytes().to_vec(), node);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn trees_come_out_as_they_went_in(tree in trees(), shuffle in any::<bool>()) {
        let mut items: Vec<Item> = tree.iter().map(|(path, node)| {
            let mut item = match node {
                Node::Dir(mode) => Item::dir("").mode(*mode),
                Node::File(mode, data) => Item::file("", data).mode(*mode),
                Node::Link(target) => { let mut i = Item::symlink("", ""); i.link = target.clone(); i }
            };
            item.path = path.clone();
            item
        }).collect();
        if shuffle {
            // Children before their folders.
            items.reverse();
        }
        let place = Place::new();
        place.unpack(&items).unwrap();
        let mut got = BTreeMap::new();
        seen(&place.root(), Path::new(""), &mut got);
        prop_assert_eq!(got, tree);
    }

    /// Any bytes behind valid headers: no panic, nothing outside.
    #[test]
    fn random_layers_stay_inside(
        entries in prop::collection::vec((0_u8..8, "[a-c./]{0,8}", "[a-c./]{0,8}"), 0..12),
        apply in any::<bool>(),
    ) {
        let items: Vec<Item> = entries.iter().map(|(kind, path, link)| {
            let prefix = if kind % 8 == 7 { ".wh." } else { "" };
            let mut item = match kind % 8 {
                0 | 7 => Item::file("", b"x"),
                1 => Item::dir(""),
                2 | 3 => Item::symlink("", link),
                4 => Item::hardlink("", link),
                5 => Item::new(EntryType::Fifo, "", 0o600),
                _ => Item::symlink("", &format!("../{link}")),
            };
            item.path = format!("{path}{prefix}").into_bytes();
            item
        }).collect();
        let place = Place::new();
        let _ = place.unpack_as(&layer(&items), if apply { Whiteouts::Apply } else { Whiteouts::Overlay });
        place.untouched();
    }
}

#[test]
fn reads_the_source_to_its_end() {
    struct Counting<'a>(&'a [u8], std::rc::Rc<std::cell::Cell<usize>>);
    impl Read for Counting<'_> {
        fn read(&mut self, b: &mut [u8]) -> std::io::Result<usize> {
            let n = self.0.read(b)?;
            self.1.set(self.1.get() + n);
            Ok(n)
        }
    }
    let mut data = layer(&[Item::file("a", b"x")]);
    data.resize(data.len() + 100_000, 0);
    let count = std::rc::Rc::new(std::cell::Cell::new(0));
    let place = Place::new();
    unpack(&place.root(), Counting(&data, count.clone()), Whiteouts::Overlay, &Limits::default()).unwrap();
    assert_eq!(count.get(), data.len());
}
