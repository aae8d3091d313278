//! Restores: the plan by which a monitor has criu make a container's processes from the images of a checkpoint.
//!
//! Called by the engine when a container is made from a checkpoint; nothing runs yet. The container's streams are the
//! program's 0, 1 and 2, under the names that criu's images have for the old ones (`criu.conf` of the checkpoint). Network, IPC
//! and UTS namespaces are the new pod's, of whose hostname criu is told, since it would give it the old pod's name. TCP connections
//! are closed: the pod has another address. Fails by name for a terminal, a user namespace, a PID namespace of the node or of
//! another container, and mounts that are not where the checkpoint has them.

use std::collections::{BTreeMap, BTreeSet};

use camino::Utf8Path;
use prost::Message;

use super::CrunBackend;
use crate::backends::pods::PATH;
use crate::core::backend::RestoreContext;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::ports::monitor_v1;
use crate::core::spec::{ContainerConfig, NamespaceMode, SandboxConfig};
use crate::utils::atomic::{self, Durability};

/// First word of criu's images.
const COMMON: u32 = 0x5456_4319;
/// Second word of the image of a UTS namespace.
const UTSNS: u32 = 0x5447_3203;
/// Second word of the image of cgroups.
const CGROUPS: u32 = 0x5938_3330;
/// Largest image that is rewritten, in bytes.
const IMAGE_MAX: u64 = 4 << 20;

/// criu's image of a UTS namespace.
#[derive(Clone, PartialEq, Message)]
struct Uts {
    #[prost(string, required, tag = "1")]
    nodename: String,
    #[prost(string, required, tag = "2")]
    domainname: String,
}

/// criu's image of cgroups: which sets of groups there are, and the groups with their properties. What is not looked into stays as
/// it is.
#[derive(Clone, PartialEq, Message)]
struct Cgroups {
    #[prost(message, repeated, tag = "1")]
    sets: Vec<Set>,
    #[prost(message, repeated, tag = "2")]
    controllers: Vec<Controller>,
}

/// The groups of one or more processes, one of each hierarchy.
#[derive(Clone, PartialEq, Message)]
struct Set {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(message, repeated, tag = "2")]
    members: Vec<Member>,
}

#[derive(Clone, PartialEq, Message)]
struct Member {
    #[prost(bytes = "vec", required, tag = "1")]
    name: Vec<u8>,
    #[prost(bytes = "vec", required, tag = "2")]
    path: Vec<u8>,
    #[prost(uint32, optional, tag = "3")]
    prefix: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct Controller {
    #[prost(bytes = "vec", repeated, tag = "1")]
    names: Vec<Vec<u8>>,
    #[prost(message, repeated, tag = "2")]
    folders: Vec<Group>,
    #[prost(bool, optional, tag = "3")]
    threaded: Option<bool>,
}

/// Without its properties (3): they are dropped where it is read.
#[derive(Clone, PartialEq, Message)]
struct Group {
    #[prost(bytes = "vec", required, tag = "1")]
    name: Vec<u8>,
    #[prost(message, repeated, tag = "2")]
    children: Vec<Group>,
    #[prost(bytes = "vec", optional, tag = "4")]
    permissions: Option<Vec<u8>>,
}

/// Whether containers like that can be restored at all.
pub(super) fn check(pod: &SandboxConfig, config: &ContainerConfig) -> Result<()> {
    let lacks = |what: &str| Err(Error::new(Kind::Unimplemented, format!("handler crun can't restore {what}")));
    if config.tty {
        return lacks("terminals");
    }
    if pod.security.namespaces.user.is_some() || config.security.namespaces.user.is_some() {
        return lacks("user namespaces");
    }
    if config.mounts.iter().any(|m| m.image.is_some()) {
        return lacks("images that are volumes");
    }
    match config.security.namespaces.pid {
        NamespaceMode::Container => Ok(()),
        NamespaceMode::Pod => lacks("shared PID namespaces"),
        NamespaceMode::Node | NamespaceMode::Target => lacks("PID namespaces of others"),
    }
}

impl CrunBackend {
    pub(super) async fn plan_restore(
        &self,
        context: RestoreContext<'_>,
        mut plan: monitor_v1::CreateContainer,
    ) -> Result<monitor_v1::CreateContainer> {
        let RestoreContext { pod, id, config, run_dir, folder } = context;
        check(&pod.config, config)?;
        self.can_checkpoint().await?;
        let (own, bundle) = (folder.to_owned(), run_dir.to_owned());
        let hostname = pod.config.hostname.clone();
        blocking(move || {
            same_mounts(&own.join("spec.dump"), &bundle.join("config.json"))?;
            write_config(&own)?;
            rewrite(&own.join("checkpoint"), "utsns-", |image| renamed(image, &hostname))?;
            rewrite(&own.join("checkpoint"), "cgroup.img", own_groups)?;
            let work = own.join("work");
            std::fs::create_dir(&work).map_err(|e| Error::io(format!("make {work}"), e))
        })
        .await?;
        let (images, work) = (folder.join("checkpoint"), folder.join("work"));
        let (log, pid_file) = (run_dir.join("crun.log"), run_dir.join("pid"));
        let mut args = vec!["restore", "--detach", "--bundle", run_dir.as_str(), "--image-path", images.as_str()];
        args.extend(["--work-path", work.as_str(), "--pid-file", pid_file.as_str()]);
        args.extend(["--manage-cgroups-mode", "ignore", "--file-locks", "--ext-unix-sk", id.as_str()]);
        let oom = plan.create.as_ref().map_or(0, |p| p.oom_score_adj);
        let mut restore = self.call(&log, oom, &args);
        restore.env = vec![format!("PATH={PATH}"), format!("CRIU_CONFIG_FILE={}", folder.join("restore.conf"))];
        restore.deadline_ms = u32::try_from(self.config.checkpoint_timeout.as_millis()).unwrap_or(u32::MAX);
        plan.create = Some(restore);
        // It runs already.
        plan.start = Some(self.call(&log, 0, &["state", id.as_str()]));
        Ok(plan)
    }
}

/// criu has a mount for each mount of the images, and finds what it has to mount there by where it is. Blocks.
fn same_mounts(old: &Utf8Path, new: &Utf8Path) -> Result<()> {
    let mounts = |path: &Utf8Path| -> Result<BTreeMap<String, bool>> {
        let text = std::fs::read(path).map_err(|e| Error::io(format!("read {path}"), e))?;
        let nonsense = |e| Error::because(Kind::InvalidArgument, path.file_name().unwrap_or("").to_owned(), e);
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&text).map_err(nonsense)?;
        let bind = |m: &oci_spec::runtime::Mount| {
            let options = m.options().iter().flatten().any(|o| o == "bind" || o == "rbind");
            (m.destination().display().to_string(), options)
        };
        Ok(spec.mounts().iter().flatten().map(bind).collect())
    };
    let (was, is) = (mounts(old)?, mounts(new)?);
    let odd = was.iter().find(|m| is.get(m.0) != Some(m.1)).or(is.iter().find(|m| was.get(m.0) != Some(m.1)));
    match odd {
        None => Ok(()),
        Some((path, _)) => Err(Error::precondition(format!("the mount at {path:?} is not as in the checkpoint"))),
    }
}

/// Writes what criu has to know, from the names that the streams have in the images. Blocks.
fn write_config(folder: &Utf8Path) -> Result<()> {
    let (from, to) = (folder.join("criu.conf"), folder.join("restore.conf"));
    let text = std::fs::read_to_string(&from).map_err(|e| Error::io(format!("read {from}"), e))?;
    let config = inherited(&text).ok_or_else(|| Error::invalid("criu.conf of the checkpoint is not one of ours"))?;
    atomic::write(to.as_std_path(), config.as_bytes(), 0o600, Durability::Process)
        .map_err(|e| Error::io(format!("write {to}"), e))
}

/// The streams of the dump as descriptors of the restore. None: anything else is in it.
fn inherited(text: &str) -> Option<String> {
    let mut config = "tcp-close\n".to_owned();
    for line in text.lines() {
        let (name, stream) = line.strip_prefix("external file[")?.split_once("] # ")?;
        let (mount, inode) = name.split_once(':')?;
        let hex = |text: &str| !text.is_empty() && text.len() <= 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let fd = ["stdin", "stdout", "stderr"].iter().position(|s| *s == stream)?;
        if !hex(mount) || !hex(inode) {
            return None;
        }
        config.push_str(&format!("inherit-fd fd[{fd}]:file[{name}]\n"));
    }
    Some(config)
}

/// Rewrites the images whose names begin so. Blocks.
fn rewrite(images: &Utf8Path, names: &str, how: impl Fn(&[u8]) -> Option<Vec<u8>>) -> Result<()> {
    for entry in images.read_dir_utf8().map_err(|e| Error::io(format!("list {images}"), e))? {
        let entry = entry.map_err(|e| Error::io(format!("list {images}"), e))?;
        if !entry.file_name().starts_with(names) {
            continue;
        }
        let path = entry.path();
        let failed = |e| Error::io(format!("image {path}"), e);
        if entry.metadata().map_err(failed)?.len() > IMAGE_MAX {
            return Err(Error::invalid(format!("{} of the checkpoint is too large", entry.file_name())));
        }
        let old = std::fs::read(path).map_err(failed)?;
        let new = how(&old);
        let new =
            new.ok_or_else(|| Error::invalid(format!("{} of the checkpoint makes no sense", entry.file_name())))?;
        atomic::write(path.as_std_path(), &new, 0o600, Durability::Process).map_err(failed)?;
    }
    Ok(())
}

/// The image of cgroups without their limits: the new container's groups have their own, and their parents need not have what the
/// old ones had. Without the hierarchies, too, in whose root a process of the container is (v2 beside v1): criu has put down all
/// groups of the node there, and would make each of them again below the new container's.
fn own_groups(image: &[u8]) -> Option<Vec<u8>> {
    let mut cgroups = Cgroups::decode(message_of(image, CGROUPS)?).ok()?;
    let members = cgroups.sets.iter().flat_map(|s| &s.members);
    let foreign: BTreeSet<Vec<u8>> = members.filter(|m| m.path == b"/").map(|m| m.name.clone()).collect();
    for set in &mut cgroups.sets {
        set.members.retain(|m| !foreign.contains(&m.name));
    }
    cgroups.controllers.retain(|c| !c.names.iter().any(|name| foreign.contains(name)));
    Some(image_of(CGROUPS, &cgroups))
}

/// The image of a UTS namespace with another name, which criu gives the namespace that it joins. "": the name stays.
fn renamed(image: &[u8], hostname: &str) -> Option<Vec<u8>> {
    let mut uts = Uts::decode(message_of(image, UTSNS)?).ok()?;
    if !hostname.is_empty() {
        uts.nodename = hostname.to_owned();
    }
    Some(image_of(UTSNS, &uts))
}

/// The only message of an image: two magics, a length, the message.
fn message_of(image: &[u8], magic: u32) -> Option<&[u8]> {
    let word = |n: usize| image.get(n * 4..n * 4 + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if [word(0)?, word(1)?] != [COMMON, magic] {
        return None;
    }
    let message = image.get(12..)?;
    (message.len() == usize::try_from(word(2)?).ok()?).then_some(message)
}

fn image_of(magic: u32, message: &impl Message) -> Vec<u8> {
    // A message that was read has 4 MiB at most.
    let length = u32::try_from(message.encoded_len()).unwrap_or(u32::MAX);
    let mut image = [COMMON, magic, length].map(u32::to_le_bytes).concat();
    image.extend(message.encode_to_vec());
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_keep_their_names_and_nothing_else_gets_into_the_configuration() {
        assert_eq!(
            inherited("external file[cb:f00bf] # stdout\nexternal file[cb:f00c0] # stderr\n").as_deref(),
            Some("tcp-close\ninherit-fd fd[1]:file[cb:f00bf]\ninherit-fd fd[2]:file[cb:f00c0]\n")
        );
        assert_eq!(inherited("").as_deref(), Some("tcp-close\n"));
        for bad in [
            "action-script /x",
            "external file[cb:f00bf] # other",
            "external file[cb:f00bf]",
            "external file[x:1] # stdout",
            "external file[1:] # stdout",
            "external mnt[/x]:y # stdout",
        ] {
            assert_eq!(inherited(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_hostname_is_the_new_pods() {
        let image = image_of(UTSNS, &Uts { nodename: "old".into(), domainname: "(none)".into() });
        assert_eq!(image[8..12], u32::try_from(image.len() - 12).unwrap().to_le_bytes());
        assert_eq!(renamed(&image, "").as_deref(), Some(&*image));
        let new = renamed(&image, "a-longer-name").unwrap();
        let uts = Uts::decode(message_of(&new, UTSNS).unwrap()).unwrap();
        assert_eq!((uts.nodename.as_str(), uts.domainname.as_str()), ("a-longer-name", "(none)"));
        for cut in 0..image.len() {
            assert_eq!(renamed(&image[..cut], "x"), None, "{cut}");
        }
        assert_eq!(renamed(&image_of(CGROUPS, &Cgroups::default()), "x"), None, "another image");
    }

    /// A group as criu has it.
    #[derive(Clone, PartialEq, Message)]
    struct Full {
        #[prost(string, required, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        children: Vec<Full>,
        #[prost(string, repeated, tag = "3")]
        properties: Vec<String>,
        #[prost(string, optional, tag = "4")]
        permissions: Option<String>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct FullController {
        #[prost(string, repeated, tag = "1")]
        names: Vec<String>,
        #[prost(message, repeated, tag = "2")]
        folders: Vec<Full>,
        #[prost(bool, optional, tag = "3")]
        threaded: Option<bool>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct FullCgroups {
        #[prost(message, repeated, tag = "1")]
        sets: Vec<Set>,
        #[prost(message, repeated, tag = "2")]
        controllers: Vec<FullController>,
    }

    #[test]
    fn groups_lose_their_properties_and_nothing_else() {
        let group = |name: &str, children, properties: &[&str]| Full {
            name: name.into(),
            children,
            properties: properties.iter().map(ToString::to_string).collect(),
            permissions: Some(format!("of {name}")),
        };
        let member = |name: &str, path: &str| Member { name: name.into(), path: path.into(), prefix: Some(6) };
        let image = |own: &[&str], whole: bool| {
            let folders = vec![group("tests", vec![group("old", vec![group("init", vec![], own)], own)], own)];
            let controller = FullController { names: vec!["cpu".into()], folders, threaded: Some(true) };
            let unified = FullController { names: vec!["".into()], threaded: None, ..controller.clone() };
            let set = |id: u32, path: &str| {
                let members = [Some(member("cpu", path)), whole.then(|| member("", "/"))];
                Set { id, members: members.into_iter().flatten().collect() }
            };
            let sets = vec![set(2, "/tests/old"), set(3, "/tests/old/init")];
            let controllers = [Some(controller), whole.then_some(unified)].into_iter().flatten().collect();
            image_of(CGROUPS, &FullCgroups { sets, controllers })
        };
        let (with, without) = (image(&["cgroup.subtree_control", "cpu.max"], false), image(&[], false));
        assert_ne!(with, without);
        assert_eq!(own_groups(&with).as_deref(), Some(&*without));
        // A hierarchy that the container has no group in.
        assert_eq!(own_groups(&image(&["cpu.max"], true)).as_deref(), Some(&*without));
        for cut in 0..with.len() {
            assert_eq!(own_groups(&with[..cut]), None, "{cut}");
        }
    }
}
