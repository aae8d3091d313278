//! Layers are unpacked by processes that can touch nothing else: the same comes out, and what such a process tries
//! beyond it, or lies about, is refused; one that dies or hangs is an error that says so.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::print_stdout)] // tests start programs and write files plainly

// The rest of it is the image suite's.
mod images_support;

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use images_support::{Item, confined, gzip, layer};
use proxmox_lxcri::core::error::{Error, Kind};
use proxmox_lxcri::integrations::layers::confined::{Confined, Landlock, Place, Unpacker};
use proxmox_lxcri::integrations::layers::pipeline::{Compression, Expected, digest_of, open};
use proxmox_lxcri::integrations::layers::unpack::{Limits, Unpacked, Whiteouts};
use proxmox_lxcri::utils::tasks::TaskSet;
use tar::EntryType;

fn unpack(by: &Unpacker, folder: &Path, tar: &[u8], whiteouts: Whiteouts) -> Result<Unpacked, Error> {
    by.unpack(Place::Folder(folder), tar, whiteouts, &Limits::default())
}

/// An unpacker whose program is a shell script.
fn script(dir: &Path, text: &str, patience: Duration) -> Unpacker {
    let path = dir.join("program");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = path.to_str().unwrap().to_owned();
    let tasks = TaskSet::new("script");
    Unpacker::Confined(Arc::new(Confined {
        program,
        require_landlock: false,
        landlock: Landlock::Full,
        patience,
        tasks,
    }))
}

/// All that can be told of a tree, by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).chain([folder.clone()]) {
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let mut attributes: Vec<String> = xattr::list(&path)
                .unwrap()
                .map(|name| format!("{name:?}={:?}", xattr::get(&path, &name).unwrap().unwrap_or_default()))
                .collect();
            attributes.sort();
            let content = match meta.is_file() {
                true => format!("{:?}", digest_of(&std::fs::read(&path).unwrap())),
                false => format!("{:?}", std::fs::read_link(&path).ok()),
            };
            let size = if meta.is_dir() { 0 } else { meta.size() };
            let facts = [meta.mode().into(), meta.uid().into(), meta.gid().into(), meta.rdev(), meta.nlink(), size];
            // A whiteout has the time at which it was made.
            let whiteout = meta.file_type().is_char_device() && meta.rdev() == 0;
            let times = if whiteout { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) };
            let entry = format!("{facts:?} {times:?} {attributes:?} {content}");
            if meta.is_dir() && path != folder {
                folders.push(path.clone());
            }
            found.insert(path.strip_prefix(root).unwrap().to_owned(), entry);
        }
    }
    // When a folder that no entry tells of was made is a matter of the clock.
    found.retain(|path, _| !path.starts_with("implied"));
    found
}

fn everything() -> Vec<u8> {
    let capability = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00".as_slice();
    let mut device = Item::new(EntryType::Char, "dev/null", 0o666).pax("SCHILY.xattr.trusted.on-a-device", b"1");
    device.header.set_device_major(1).unwrap();
    device.header.set_device_minor(3).unwrap();
    layer(&[
        Item::dir("./").mode(0o711),
        Item::dir("d").mode(0o1777).owner(5, 6),
        Item::dir("dev"),
        Item::file("d/suid", b"x").mode(0o6755).owner(1000, 1001),
        Item::file("cap", b"x").owner(7, 7).pax("SCHILY.xattr.security.capability", capability),
        Item::file("user", b"x").pax("SCHILY.xattr.user.text", b"line\nline\0"),
        Item::file("trusted", b"x").pax("SCHILY.xattr.trusted.note", b"kept"),
        Item::dir("trusted-dir").pax("SCHILY.xattr.trusted.note", b"kept"),
        Item::file("was-trusted", b"x").pax("SCHILY.xattr.trusted.note", b"gone with it"),
        Item::file("was-trusted", b"y"),
        Item::symlink("l", "/etc/passwd").owner(9, 9).pax("SCHILY.xattr.trusted.on-a-link", b"1"),
        Item::dir("forged").pax("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        Item::hardlink("d/again", "d/suid"),
        Item::new(EntryType::Fifo, "fifo", 0o640),
        device,
        Item::dir("o"),
        Item::file("o/.wh..wh..opq", b""),
        Item::file("o/new", b"n"),
        Item::dir("a"),
        Item::file("a/.wh.gone", b""),
        Item::file("a/.wh.dir", b""),
        Item::dir("a/dir"),
        Item::file("implied/a/b", b"x"),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_comes_out() {
    let tasks = TaskSet::new("same");
    for whiteouts in [Whiteouts::Overlay, Whiteouts::Apply] {
        let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let below = layer(&[Item::file("a/gone", b"1"), Item::file("o/old", b"1"), Item::file("a/dir/x", b"1")]);
        let (a, b) = tokio::task::block_in_place(|| {
            let both = |tar: &[u8]| {
                let a = unpack(&Unpacker::Here, here.path(), tar, whiteouts).unwrap();
                (a, unpack(&confined(&tasks), there.path(), tar, whiteouts).unwrap())
            };
            if whiteouts == Whiteouts::Apply {
                both(&below);
            }
            both(&everything())
        });
        assert_eq!((a.usage, &a.implicit, a.root_given), (b.usage, &b.implicit, b.root_given));
        let (a, b) = (tree(here.path()), tree(there.path()));
        assert!(a.len() > 15 && a.values().any(|v| v.contains("trusted.on-a-link")), "{a:#?}");
        assert_eq!(a, b, "{whiteouts:?}");
    }
}

/// The worst that a layer can do: code of its own in the process that unpacks it.
#[test]
fn a_process_taken_over_gets_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, outside) = (dir.path().join("layer"), dir.path().join("outside"));
    std::fs::create_dir(&layer).unwrap();
    std::fs::write(&outside, "secret").unwrap();
    // As the parent makes it: a view of the folder in which no device opens. The number is what the process is told.
    let flags = rustix::mount::OpenTreeFlags::OPEN_TREE_CLONE;
    let view = rustix::mount::open_tree(rustix::fs::CWD, &layer, flags).unwrap();
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open, and the structure is alive and as long as is said.
    #[allow(unsafe_code)]
    let done = unsafe {
        let (at, size) = (libc::AT_EMPTY_PATH, size_of::<libc::mount_attr>());
        libc::syscall(libc::SYS_mount_setattr, view.as_raw_fd(), c"".as_ptr(), at, &raw const attributes, size)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    let leaked = std::fs::File::open(&outside).unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_proxmox-lxcri"))
        .args(["__confined-break-out", &view.as_raw_fd().to_string(), outside.to_str().unwrap()])
        .arg(leaked.as_raw_fd().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{}: {said}", String::from_utf8_lossy(&out.stderr));
    let done: Vec<&str> = said.lines().filter_map(|l| l.strip_suffix(": DONE")).collect();
    // A device may be made, as layers have them; it can't be opened.
    assert_eq!(done, ["write inside", "make a device"], "{said}");
    assert!(said.lines().count() >= 20 && said.contains("open a device: Os { code: 13"), "{said}");
    assert!(said.contains("two GiB of memory: Os { code: 12"), "{said}");
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "secret");
    assert!(layer.join("inside").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_layer_is_told_as_before() {
    let tasks = TaskSet::new("wrong");
    for (items, kind, part) in [
        (vec![Item::file("../evil", b"x")], Kind::InvalidArgument, "'..'"),
        (vec![Item::hardlink("evil", "missing")], Kind::Internal, "target"),
        (vec![Item::file("f", b"x"), Item::file("f/below", b"x")], Kind::Internal, "making its folder"),
        (vec![Item::file("f\nline\x1b[31m", b"x"), Item::hardlink("a\n", "b")], Kind::Internal, "target"),
    ] {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tar = layer(&items);
        tokio::task::block_in_place(|| {
            let here = unpack(&Unpacker::Here, a.path(), &tar, Whiteouts::Overlay).expect_err(part);
            let there = unpack(&confined(&tasks), b.path(), &tar, Whiteouts::Overlay).expect_err(part);
            assert_eq!((here.kind(), here.chain()), (there.kind(), there.chain()));
            assert_eq!(there.kind(), kind);
            assert!(there.chain().contains(part) && !there.chain().contains('\n'), "{}", there.chain());
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn decompression_is_told_from_the_source() {
    let tasks = TaskSet::new("decompress");
    let by = confined(&tasks);
    let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
    let read = |blob: Vec<u8>, how| {
        let expected = Expected { blob: Some((digest_of(&blob), blob.len() as u64)), diff_id: digest_of(&data) };
        let (mut reader, verifier) = open(Box::new(Cursor::new(blob)), how, expected, &by);
        let mut out = Vec::new();
        tokio::task::block_in_place(|| reader.read_to_end(&mut out).map_err(|e| e.to_string()))?;
        verifier.verify().map_err(|e| e.to_string())?;
        Ok::<_, String>(out)
    };
    assert_eq!(read(gzip(&data), Compression::Gzip).unwrap(), data);
    assert_eq!(read(zstd::encode_all(data.as_slice(), 1).unwrap(), Compression::Zstd).unwrap(), data);
    let mut cut = gzip(&data);
    cut.truncate(cut.len() / 2);
    let e = read(cut, Compression::Gzip).expect_err("cut");
    assert!(e.contains("an unpacking process ended with status 1: "), "{e}");
    let mut bad = gzip(&data);
    bad[5000..5100].fill(0x55);
    assert!(read(bad, Compression::Gzip).is_err());

    /// A download that fails on the way.
    struct Fails(Cursor<Vec<u8>>);
    impl Read for Fails {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(std::io::Error::other("the download failed")),
                n => Ok(n),
            }
        }
    }
    let mut half = gzip(&data);
    half.truncate(half.len() / 2);
    let mut reader = by.decompress(Compression::Gzip, 0, Box::new(Fails(Cursor::new(half)))).unwrap();
    let e = tokio::task::block_in_place(|| reader.read_to_end(&mut Vec::new())).expect_err("the source");
    assert!(e.to_string().contains("the download failed"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_die_hang_or_lie() {
    let dir = tempfile::tempdir().unwrap();
    let root = tempfile::tempdir().unwrap();
    // More than a pipe holds.
    let tar = layer(&[Item::file("big", &vec![7; 4 << 20])]);
    let short = Duration::from_millis(800);
    for (text, patience, kind, part) in [
        ("kill -9 $$", Duration::from_secs(60), Kind::Internal, "was killed by signal 9"),
        ("echo why >&2; exit 3", Duration::from_secs(60), Kind::Internal, "ended with status 3: why"),
        ("exec /bin/sleep 600", short, Kind::DeadlineExceeded, "took nothing for 0.8 s, killed"),
        ("/bin/cat > /dev/null; exec /bin/sleep 600", short, Kind::DeadlineExceeded, "took nothing for 0.8 s, killed"),
        ("/bin/cat > /dev/null; echo rubbish", Duration::from_secs(60), Kind::Internal, "gave no report"),
        ("exit 0", Duration::from_secs(60), Kind::Internal, "ended before its layer did"),
    ] {
        let by = script(dir.path(), text, patience);
        let start = Instant::now();
        let done = tokio::task::block_in_place(|| unpack(&by, root.path(), &tar, Whiteouts::Overlay));
        let e = done.expect_err(text);
        assert_eq!(e.kind(), kind, "{text}: {}", e.chain());
        assert!(e.chain().contains(part), "{text}: {}", e.chain());
        assert!(start.elapsed() < Duration::from_secs(50), "{text}");
    }
    let by = script(dir.path(), "exec /bin/sleep 600", short);
    let packed = gzip(&tar);
    let mut reader = by.decompress(Compression::Gzip, 0, Box::new(Cursor::new(packed))).unwrap();
    let e = tokio::task::block_in_place(|| reader.read_to_end(&mut Vec::new())).expect_err("hangs");
    assert!(e.to_string().contains("gave nothing for 0.8 s, killed"), "{e}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_landlock() {
    let make = |require_landlock| {
        Unpacker::Confined(Arc::new(Confined {
            program: env!("CARGO_BIN_EXE_proxmox-lxcri").into(),
            require_landlock,
            landlock: Landlock::Absent,
            patience: Duration::from_secs(60),
            tasks: TaskSet::new("absent"),
        }))
    };
    let (dir, tar) = (tempfile::tempdir().unwrap(), layer(&[Item::file("f", b"x")]));
    tokio::task::block_in_place(|| {
        let weak = make(false).weakness().unwrap();
        assert!(weak.reason == "NoLandlock" && !weak.blocks && weak.message.contains("seccomp"), "{weak:?}");
        unpack(&make(false), dir.path(), &tar, Whiteouts::Overlay).unwrap();
        let weak = make(true).weakness().unwrap();
        assert!(weak.blocks && weak.message.contains("not unpacked"), "{weak:?}");
        let e = unpack(&make(true), dir.path(), &tar, Whiteouts::Overlay).expect_err("required");
        assert!(e.kind() == Kind::FailedPrecondition && e.chain().contains("no Landlock"), "{}", e.chain());
    });
    // This kernel has it, and a probe says so; a program that is no unpacker is found out.
    let program = |p: &str| Confined::probe(Some(p.into()), true, TaskSet::new("probe"));
    let found = program(env!("CARGO_BIN_EXE_proxmox-lxcri")).await.unwrap();
    assert_ne!(found.landlock, Landlock::Absent);
    assert!(program("/bin/false").await.is_err());
    assert!(program("/bin/echo").await.is_err());
    assert_eq!(program("/nowhere").await.expect_err("missing").kind(), Kind::FailedPrecondition);
}

/// Confinement costs a copy of the bytes and two processes a layer; work is on two cores instead of one.
#[tokio::test(flavor = "multi_thread")]
async fn speed() {
    let mut noise = 1_u64;
    let mut random = |n: usize| -> Vec<u8> {
        let step = |_| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if noise >> 62 == 0 { (noise >> 33) as u8 } else { b'a' + (noise >> 40 & 7) as u8 }
        };
        (0..n).map(step).collect()
    };
    let mut items: Vec<Item> = (0..100).map(|n| Item::file(&format!("d{}/f{n}", n % 20), &random(60_000))).collect();
    items.extend((0..1000).map(|n| Item::file(&format!("small/{n}"), b"0123456789")));
    let tar = layer(&items);
    let blob = gzip(&tar);
    let tasks = TaskSet::new("speed");
    let run = |by: &Unpacker| {
        let dir = tempfile::tempdir().unwrap();
        let expected = Expected { blob: Some((digest_of(&blob), blob.len() as u64)), diff_id: digest_of(&tar) };
        let start = Instant::now();
        let (reader, verifier) = open(Box::new(Cursor::new(blob.clone())), Compression::Gzip, expected, by);
        by.unpack(Place::Folder(dir.path()), reader, Whiteouts::Overlay, &Limits::default()).unwrap();
        verifier.verify().unwrap();
        start.elapsed()
    };
    let by = confined(&tasks);
    let best = |by: &Unpacker| (0..3).map(|_| run(by)).min().unwrap();
    let (there, here) = tokio::task::block_in_place(|| (best(&by), best(&Unpacker::Here)));
    let ratio = there.as_secs_f64() / here.as_secs_f64();
    println!("figure: unpacking {} MiB behind walls takes {ratio:.2} of the time in the daemon", tar.len() >> 20);
    // Generous: the machine may be busy, and a debug build is slow where a release is not.
    assert!(ratio < 3.0, "{there:?} against {here:?}");
}
