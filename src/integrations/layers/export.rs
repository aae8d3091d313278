//! Writes what a container has changed as the tar of an image layer
//! (<https://github.com/opencontainers/image-spec/blob/main/layer.md>): the opposite of `unpack`.
//!
//! Called by the image store, blocking. The same changes give the same bytes: entries by name, a folder before what is in
//! it, times of change alone, nothing of the inode numbers. Files with several names are hard links of the first one.
//! Files that are gone when their turn comes are left out; one that is shorter by then fails the layer, as does an owner
//! that the container's user namespace has not. Nothing is kept.

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use tar::{EntryType, Header};

use crate::core::error::{Error, Kind};
use crate::core::ports::RootfsChanges;
use crate::core::spec::{UserNamespace, inner_id};

/// Bytes of a name, and of a link's target, in a header without extensions.
const NAME_MAX: usize = 100;
/// What a number of seven octal digits holds.
const OCTAL_7: u64 = 0o7_777_777;
/// What a number of eleven octal digits holds.
const OCTAL_11: u64 = 0o77_777_777_777;
/// Hides a file of the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// In a folder that hides all that the layers below have in it.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// An overlay's own attributes.
const OVERLAY: &[u8] = b"trusted.overlay.";

/// A layer that can't be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// Reading an entry, or writing.
    #[error("{entry:?}: {what}")]
    Io {
        /// Its name.
        entry: String,
        /// What was to be done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// An entry that layers can't hold.
    #[error("{entry:?}: {why}")]
    Refused {
        /// Its name.
        entry: String,
        /// Why.
        why: String,
    },
}

impl From<ExportError> for Error {
    fn from(e: ExportError) -> Self {
        let message = e.to_string();
        match e {
            ExportError::Io { source, .. } => Error::io(message, source),
            ExportError::Refused { .. } => Error::new(Kind::FailedPrecondition, message),
        }
    }
}

#[derive(PartialEq, Eq)]
enum What {
    Changed,
    Marker,
}

/// Writes the layer, its end included.
pub fn write(changes: &RootfsChanges, out: impl Write) -> Result<(), ExportError> {
    let mut entries: Vec<(Vec<u8>, What)> = changes.changed.iter().map(|p| (p.clone(), What::Changed)).collect();
    for path in &changes.deleted {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        let at = path.iter().rposition(|b| *b == b'/').map_or(0, |n| n + 1);
        entries.push(([&path[..at], WHITEOUT, &path[at..]].concat(), What::Marker));
    }
    for path in &changes.opaque {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        entries.push(([path, b"/", OPAQUE].concat(), What::Marker));
    }
    entries.sort_by(|a, b| by_parts(&a.0, &b.0));
    entries.dedup_by(|a, b| a.0 == b.0);
    let mut writer = Writer { folder: &changes.folder, user: changes.user.as_ref(), out, names: HashMap::new() };
    for (path, what) in entries {
        match what {
            What::Changed => writer.changed(&path)?,
            What::Marker => writer.marker(&path)?,
        }
    }
    writer.end()
}

/// A folder before what is in it, and that before its next neighbour.
fn by_parts(a: &[u8], b: &[u8]) -> Ordering {
    a.split(|c| *c == b'/').cmp(b.split(|c| *c == b'/'))
}

struct Writer<'a, W> {
    folder: &'a OwnedFd,
    user: Option<&'a UserNamespace>,
    out: W,
    /// First name of a file that has more.
    names: HashMap<(u64, u64), Vec<u8>>,
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

impl<W: Write> Writer<'_, W> {
    fn failed<'p>(path: &'p [u8], what: &'static str) -> impl Fn(io::Error) -> ExportError + 'p {
        move |source| ExportError::Io { entry: shown(path), what, source }
    }

    fn refused(path: &[u8], why: impl Into<String>) -> ExportError {
        ExportError::Refused { entry: shown(path), why: why.into() }
    }

    /// An empty file with a name that means something.
    fn marker(&mut self, path: &[u8]) -> Result<(), ExportError> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        self.header(path, header, Vec::new())
    }

    fn changed(&mut self, path: &[u8]) -> Result<(), ExportError> {
        // The root has no name of its own in a layer that could not be misread.
        if path.is_empty() {
            return Ok(());
        }
        let name = std::ffi::OsStr::from_bytes(path);
        let stat = match fs::statat(self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            other => other.map_err(|e| Self::failed(path, "reading its attributes")(e.into()))?,
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(());
        }
        let mut pax = Vec::new();
        let mut header = Header::new_ustar();
        self.attributes(path, &stat, &mut header, &mut pax)?;
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let first = self.names.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| path.to_vec()).clone();
            if first != path {
                header.set_entry_type(EntryType::Link);
                header.set_size(0);
                link_name(&mut header, &mut pax, &first);
                return self.header(path, header, pax);
            }
        }
        self.xattrs(path, &mut pax)?;
        match kind {
            FileType::RegularFile => return self.file(path, &stat, header, pax),
            FileType::Directory => header.set_entry_type(EntryType::Directory),
            FileType::Symlink => {
                header.set_entry_type(EntryType::Symlink);
                let target = fs::readlinkat(self.folder, name, Vec::new());
                let target = target.map_err(|e| Self::failed(path, "reading the link")(e.into()))?;
                link_name(&mut header, &mut pax, target.as_bytes());
            }
            FileType::Fifo => header.set_entry_type(EntryType::Fifo),
            FileType::CharacterDevice | FileType::BlockDevice => {
                let char = kind == FileType::CharacterDevice;
                header.set_entry_type(if char { EntryType::Char } else { EntryType::Block });
                let numbers = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
                let set = header.set_device_major(numbers.0).and_then(|()| header.set_device_minor(numbers.1));
                set.map_err(Self::failed(path, "its device number"))?;
            }
            _ => return Err(Self::refused(path, "a kind of file that layers have not")),
        }
        header.set_size(0);
        if kind == FileType::Directory {
            self.header(&[path, b"/"].concat(), header, pax)
        } else {
            self.header(path, header, pax)
        }
    }

    fn attributes(&self, path: &[u8], stat: &Stat, header: &mut Header, pax: &mut Pax) -> Result<(), ExportError> {
        header.set_mode(stat.st_mode & 0o7777);
        let (uid, gid) = match self.user {
            None => (Some(stat.st_uid), Some(stat.st_gid)),
            Some(user) => (inner_id(&user.uids, stat.st_uid), inner_id(&user.gids, stat.st_gid)),
        };
        let (Some(uid), Some(gid)) = (uid, gid) else {
            let why = format!("its owner {}:{} is nobody in the container", stat.st_uid, stat.st_gid);
            return Err(Self::refused(path, why));
        };
        for (key, id, set) in
            [("uid", u64::from(uid), Header::set_uid as fn(&mut Header, u64)), ("gid", u64::from(gid), Header::set_gid)]
        {
            if id > OCTAL_7 {
                pax.push((key.into(), id.to_string().into_bytes()));
            }
            set(header, id.min(OCTAL_7));
        }
        let (seconds, nanos) = (stat.st_mtime, stat.st_mtime_nsec);
        let plain = u64::try_from(seconds).ok().filter(|s| *s <= OCTAL_11);
        if nanos != 0 || plain.is_none() {
            pax.push(("mtime".into(), time(seconds, nanos).into_bytes()));
        }
        header.set_mtime(plain.unwrap_or(0));
        Ok(())
    }

    fn xattrs(&self, path: &[u8], pax: &mut Pax) -> Result<(), ExportError> {
        let at = [format!("/proc/self/fd/{}/", self.folder.as_raw_fd()).as_bytes(), path].concat();
        let at = PathBuf::from(std::ffi::OsString::from_vec(at));
        let names = match xattr::list(&at) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP)) => return Ok(()),
            other => other.map_err(Self::failed(path, "listing extended attributes"))?,
        };
        let names: BTreeSet<Vec<u8>> = names.map(OsStringExt::into_vec).collect();
        for name in names.into_iter().filter(|n| !n.starts_with(OVERLAY)) {
            // It may have been taken away meanwhile.
            let value = xattr::get(&at, std::ffi::OsStr::from_bytes(&name));
            if let Some(value) = value.map_err(Self::failed(path, "reading an extended attribute"))? {
                if name.contains(&b'=') {
                    return Err(Self::refused(path, "an extended attribute with a name that layers can't hold"));
                }
                pax.push(([b"SCHILY.xattr.", name.as_slice()].concat(), value));
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &[u8], stat: &Stat, mut header: Header, mut pax: Pax) -> Result<(), ExportError> {
        let how = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let name = std::ffi::OsStr::from_bytes(path);
        let file = match fs::openat2(self.folder, name, how, Mode::empty(), resolve) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            other => File::from(other.map_err(|e| Self::failed(path, "opening it")(e.into()))?),
        };
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size > OCTAL_11 {
            pax.push(("size".into(), size.to_string().into_bytes()));
        }
        header.set_entry_type(EntryType::Regular);
        header.set_size(size.min(OCTAL_11));
        self.header(path, header, pax)?;
        let copied = io::copy(&mut file.take(size), &mut self.out).map_err(Self::failed(path, "copying it"))?;
        if copied != size {
            return Err(Self::refused(path, "it became shorter while it was read"));
        }
        self.pad(size).map_err(Self::failed(path, "copying it"))
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let rest = usize::try_from(size % 512).unwrap_or(0);
        if rest > 0 {
            self.out.write_all(&[0; 512][rest..])?;
        }
        Ok(())
    }

    /// The entry's header, after another one with what does not fit into it.
    fn header(&mut self, path: &[u8], mut header: Header, mut pax: Pax) -> Result<(), ExportError> {
        if path.len() > NAME_MAX || !path.is_ascii() {
            pax.push((b"path".to_vec(), path.to_vec()));
        }
        let old = header.as_old_mut();
        let kept = path.len().min(NAME_MAX);
        old.name[..kept].copy_from_slice(&path[..kept]);
        header.set_cksum();
        let io = Self::failed(path, "writing it");
        if !pax.is_empty() {
            pax.sort();
            let data: Vec<u8> = pax.iter().flat_map(|(key, value)| record(key, value)).collect();
            let mut extension = Header::new_ustar();
            extension.set_entry_type(EntryType::XHeader);
            extension.as_old_mut().name[..4].copy_from_slice(b"@pax");
            extension.set_mode(0);
            extension.set_uid(0);
            extension.set_gid(0);
            extension.set_mtime(0);
            extension.set_size(data.len() as u64);
            extension.set_cksum();
            self.out.write_all(extension.as_bytes()).map_err(&io)?;
            self.out.write_all(&data).map_err(&io)?;
            self.pad(data.len() as u64).map_err(&io)?;
        }
        self.out.write_all(header.as_bytes()).map_err(io)
    }

    fn end(mut self) -> Result<(), ExportError> {
        self.out.write_all(&[0; 1024]).and_then(|()| self.out.flush()).map_err(Self::failed(b"", "writing the end"))
    }
}

/// Keys and values of an extension header.
type Pax = Vec<(Vec<u8>, Vec<u8>)>;

fn link_name(header: &mut Header, pax: &mut Pax, target: &[u8]) {
    if target.len() > NAME_MAX || !target.is_ascii() {
        pax.push((b"linkpath".to_vec(), target.to_vec()));
    }
    let kept = target.len().min(NAME_MAX);
    header.as_old_mut().linkname[..kept].copy_from_slice(&target[..kept]);
}

/// Seconds and a fraction; before 1970 the fraction counts backwards.
fn time(seconds: i64, nanos: u64) -> String {
    match (seconds < 0, nanos) {
        (_, 0) => seconds.to_string(),
        (false, _) => format!("{seconds}.{nanos:09}"),
        (true, _) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanos),
    }
}

/// "length key=value\n", where the length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)] // tests write files as they like
mod tests {
    use super::*;
    use crate::core::spec::IdMapping;
    use crate::integrations::layers::pax::parse_pax;
    use crate::integrations::layers::tar::{Kind as EntryKind, TarReader};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    fn changes(folder: &std::path::Path, changed: &[&str]) -> RootfsChanges {
        RootfsChanges {
            folder: File::open(folder).expect("a folder").into(),
            changed: changed.iter().map(|p| p.as_bytes().to_vec()).collect(),
            deleted: vec![b"/d/gone".to_vec(), b"/old".to_vec()],
            opaque: vec![b"/d".to_vec()],
            user: None,
        }
    }

    #[test]
    fn all_kinds_of_entries_come_back_as_they_were() {
        let temp = tempfile::tempdir().expect("a folder");
        let root = temp.path();
        std::fs::create_dir(root.join("d")).expect("folder");
        std::fs::write(root.join("d/file"), "content").expect("file");
        std::fs::set_permissions(root.join("d/file"), std::fs::Permissions::from_mode(0o4755)).expect("mode");
        chown(root.join("d/file"), Some(3_000_000), Some(7)).expect("owner");
        std::fs::set_permissions(root.join("d/file"), std::fs::Permissions::from_mode(0o4755)).expect("mode");
        std::fs::hard_link(root.join("d/file"), root.join("d/second")).expect("link");
        xattr::set(root.join("d"), "trusted.of_test", b"a\n=b").expect("attribute");
        symlink("x".repeat(150), root.join("d/link")).expect("link");
        let long = format!("d/{}ü", "n".repeat(120));
        std::fs::write(root.join(&long), "").expect("file");
        let now = |secs, nanos| fs::Timespec { tv_sec: secs, tv_nsec: nanos };
        let times = fs::Timestamps { last_access: now(0, 0), last_modification: now(-2, 750_000_000) };
        fs::utimensat(fs::CWD, root.join(&long), &times, AtFlags::empty()).expect("times");
        let names = ["d/second", "d", "d/file", "d/link", &long, "not there"];
        let mut tar = Vec::new();
        write(&changes(root, &names), &mut tar).expect("a layer");
        let mut again = Vec::new();
        let mut backwards = names;
        backwards.reverse();
        write(&changes(root, &backwards), &mut again).expect("a layer");
        assert_eq!(tar, again, "the same changes, other bytes");

        let mut reader = TarReader::new(tar.as_slice());
        let mut entries = Vec::new();
        while let Some(entry) = reader.next_entry().expect("an entry") {
            entries.push(entry);
        }
        let names: Vec<_> = entries.iter().map(|e| shown(&e.path)).collect();
        assert_eq!(names, [".wh.old", "d/", "d/.wh..wh..opq", "d/.wh.gone", "d/file", "d/link", &long, "d/second"]);
        let file = &entries[4];
        assert_eq!((file.kind, file.mode, file.uid, file.gid, file.size), (EntryKind::File, 0o4755, 3_000_000, 7, 7));
        let meta = std::fs::metadata(root.join("d/file")).expect("file");
        assert_eq!(file.mtime, (meta.mtime(), u32::try_from(meta.mtime_nsec()).expect("nanoseconds")));
        assert_eq!(entries[1].xattrs, [(b"trusted.of_test".to_vec(), b"a\n=b".to_vec())]);
        assert_eq!((entries[5].kind, entries[5].link.len()), (EntryKind::Symlink, 150));
        assert_eq!(entries[6].mtime, (-2, 750_000_000));
        assert_eq!((entries[7].kind, shown(&entries[7].link)), (EntryKind::HardLink, "d/file".into()));
    }

    #[test]
    fn owners_are_the_containers() {
        let temp = tempfile::tempdir().expect("a folder");
        std::fs::write(temp.path().join("f"), "").expect("file");
        chown(temp.path().join("f"), Some(100_005), Some(100_006)).expect("owner");
        let map = vec![IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
        let user = Some(UserNamespace { uids: map.clone(), gids: map });
        let mut tar = Vec::new();
        write(&RootfsChanges { user: user.clone(), ..changes(temp.path(), &["f"]) }, &mut tar).expect("a layer");
        let mut reader = TarReader::new(tar.as_slice());
        let mut entries = std::iter::from_fn(|| reader.next_entry().expect("an entry"));
        let file = entries.find(|e| e.path == b"f").expect("the file");
        assert_eq!((file.uid, file.gid), (5, 6));
        chown(temp.path().join("f"), Some(5), None).expect("owner");
        let refused = write(&RootfsChanges { user, ..changes(temp.path(), &["f"]) }, &mut Vec::new());
        assert!(refused.expect_err("nobody").to_string().contains("nobody in the container"));
    }

    proptest::proptest! {
        #[test]
        fn records_are_read_as_they_were(key in "[a-z.]{1,30}", value in proptest::collection::vec(proptest::num::u8::ANY, 0..1100)) {
            let one = (key.into_bytes(), value);
            let parsed = parse_pax(&record(&one.0, &one.1)).expect("a record");
            proptest::prop_assert_eq!(parsed, [one]);
        }
    }
}
