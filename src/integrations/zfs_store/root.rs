//! The dataset that holds everything: made, or taken over from whoever made it for us, and mounted where the node sees it.
//!
//! Called by the store's opening, and by its health when a pool is back. What belongs to somebody else, or holds anything of his, is
//! refused by name. Repeatable: a crash leaves a part of it for the next start.

use super::state::OWNER;
use super::{Inner, blocking, kept, mount, path_of};
use crate::core::error::{Error, Result};
use crate::fail_point;
use crate::integrations::zfs::{Dataset, Flavor, Property, Reason, Source, ZfsError};

/// Bytes that a file system of zfs-fuse refers to before anything is in it, and some more.
const EMPTY: u64 = 120 << 10;

impl Inner {
    /// Makes what is missing of the datasets that hold everything, and takes those that are there only if they are ours.
    pub(super) async fn prepare(&self) -> Result<()> {
        let root = &self.config.dataset;
        let folder = self.config.folder.clone();
        let kept = self.kept_below();
        self.take_dead_mount_away().await?;
        blocking({
            let folder = folder.clone();
            move || {
                [&folder, &kept].into_iter().try_for_each(|folder| {
                    std::fs::create_dir_all(folder).map_err(|e| Error::io(format!("make folder {folder}"), e))
                })
            }
        })
        .await?;
        let property = |k, v: &str| Property::new(k, v).map_err(ZfsError::from);
        // For it and all below: snapshots that others make by themselves would keep what is removed.
        const WISHED: [(&str, &str); 3] =
            [("canmount", "noauto"), ("atime", "off"), ("com.sun:auto-snapshot", "false")];
        let asked: Vec<&str> = ["type", OWNER, "mountpoint"].into_iter().chain(WISHED.map(|(name, _)| name)).collect();
        let there = match self.zfs.get(root, &asked).await {
            Ok(all) => all.get(root.as_str()).cloned(),
            Err(e) if e.reason() == Reason::NotFound => None,
            Err(e) => return Err(e.into()),
        };
        match there {
            None => {
                let own = [(OWNER, self.config.owner.as_str()), ("mountpoint", folder.as_str())];
                let all: Vec<_> =
                    own.into_iter().chain(WISHED).map(|(k, v)| property(k, v)).collect::<Result<_, _>>()?;
                self.zfs.create(root, &all).await?;
            }
            Some(known) => {
                let tag = known.get(OWNER).filter(|v| v.source != Source::Elsewhere);
                match tag {
                    Some(tag) if tag.text == self.config.owner => {}
                    Some(tag) => {
                        return Err(Error::precondition(format!(
                            "dataset {root} belongs to another installation ({}); if that one is gone: zfs set {OWNER}={} {root}",
                            tag.text, self.config.owner
                        )));
                    }
                    None => {
                        self.must_be_empty(root).await?;
                        self.zfs.set(root, &property(OWNER, &self.config.owner)?).await?;
                    }
                }
                if known.get("mountpoint").is_none_or(|v| v.text != folder.as_str()) {
                    self.zfs.set(root, &property("mountpoint", folder.as_str())?).await?;
                }
                // What somebody has set on it himself stays as he wants it.
                let unset = |name: &str| known.get(name).is_none_or(|v| v.source == Source::Elsewhere);
                for (name, value) in WISHED.into_iter().filter(|(name, _)| unset(name)) {
                    self.zfs.set(root, &property(name, value)?).await?;
                }
            }
        }
        fail_point!("zfs.open.root");
        for part in ["layers", "containers"] {
            let properties =
                [property(OWNER, &self.config.owner)?, property("mountpoint", "none")?, property("canmount", "off")?];
            let none = match self.zfs.flavor() {
                Flavor::Kernel(..) => &properties[..],
                // zfs-fuse does not mount what has no mountpoint, and takes canmount=off as well.
                Flavor::Fuse => &properties[..2],
            };
            let dataset = self.place(part)?;
            match self.zfs.create(&dataset, none).await {
                Err(e) if e.reason() == Reason::Exists => self.must_be_ours(&dataset).await?,
                done => done?,
            }
        }
        self.mount_root().await
    }

    /// A dataset that somebody else has made is taken only if there is nothing in it that the mount point would take away.
    async fn must_be_empty(&self, root: &Dataset) -> Result<()> {
        let all = self.zfs.get_all(root, &["type", "referenced", "mounted", "mountpoint"]).await?;
        let of = |name: &str| {
            let value = all.get(root.as_str()).and_then(|p| p.get(name));
            value.map_or_else(String::new, |v| v.text.clone())
        };
        if of("type") != "filesystem" {
            return Err(Error::precondition(format!(
                "dataset {root} is there and is no file system: name another one"
            )));
        }
        if all.len() == 1 && self.holds_nothing(root, of).await? {
            return Ok(());
        }
        Err(Error::precondition(format!(
            "dataset {root} is there, is not of this installation, and is not empty: name another one, or a child of it that is not \
             there yet; if all of it may be taken over: zfs set {OWNER}={} {root}",
            self.config.owner
        )))
    }

    /// Whether a file system is without a file. `of`: its properties.
    async fn holds_nothing(&self, root: &Dataset, of: impl Fn(&str) -> String) -> Result<bool> {
        let name = root.to_string();
        let no_entry = |path: &std::path::Path| -> Result<bool> {
            let mut entries =
                std::fs::read_dir(path).map_err(|e| Error::io(format!("look into {}", path.display()), e))?;
            Ok(entries.next().is_none())
        };
        match (self.zfs.flavor(), of("mounted").as_str()) {
            (Flavor::Kernel(..), _) => blocking(move || no_entry(&path_of(&mount::by_kernel(&name, false)?))).await,
            (Flavor::Fuse, "yes") => {
                let place = std::path::PathBuf::from(of("mountpoint"));
                blocking(move || no_entry(&place)).await
            }
            // It can't be looked at without taking it.
            (Flavor::Fuse, _) => Ok(of("referenced").parse::<u64>().is_ok_and(|bytes| bytes <= EMPTY)),
        }
    }

    async fn must_be_ours(&self, dataset: &Dataset) -> Result<()> {
        let told = self.zfs.get(dataset, &[OWNER]).await?;
        let tag = told.get(dataset.as_str()).and_then(|p| p.get(OWNER));
        match tag.is_some_and(|t| t.source != Source::Elsewhere && t.text == self.config.owner) {
            true => Ok(()),
            false => Err(Error::precondition(format!(
                "dataset {dataset} is there and is not of this installation; if it may be taken over: zfs set {OWNER}={} {dataset}",
                self.config.owner
            ))),
        }
    }

    /// What a zfs-fuse that has ended left of the mount of the dataset that holds everything.
    async fn take_dead_mount_away(&self) -> Result<()> {
        let folder = self.config.folder.clone();
        match self.zfs.flavor() {
            Flavor::Fuse => blocking(move || Ok(kept::attached(&folder).map(drop)?)).await,
            Flavor::Kernel(..) => Ok(()),
        }
    }

    /// Mounts the dataset that holds everything where the node can see it.
    pub(super) async fn mount_root(&self) -> Result<()> {
        self.take_dead_mount_away().await?;
        let folder = self.config.folder.clone();
        let mounted = blocking(move || Ok(mount::space(&folder).is_ok_and(|s| s.is_some())));
        if mounted.await? {
            return Ok(());
        }
        Ok(self.zfs.mount(&self.config.dataset).await?)
    }
}
