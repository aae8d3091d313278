//! Images as volumes: which image a mount means, the detached mounts of their layers, and what each mount shows.
//!
//! Called by a pod's task while it makes a container. Fails with NotFound for an image that is not here and InvalidArgument
//! for a sub path that is not there, is no folder, or leads out. A crash leaves nothing: the mounts are attached nowhere
//! until the monitor moves them into its own namespace, and the layers are held by the container's root file system.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};

use super::Shared;
use crate::core::backend::Volumes;
use crate::core::blocking::blocking;
use crate::core::error::{Error, Result};
use crate::core::ids::Digest;
use crate::core::ports::{Image, ImageStore};
use crate::core::spec::{ContainerConfig, Mount, Propagation, UserNamespace};
use crate::utils::beneath::Root;

/// Most images that one container has as volumes: their descriptors travel in one message.
const MAX: usize = 60;

/// For each mount of the configuration: the image that it is, if it is one.
type Wanted = Vec<Option<Arc<Image>>>;

/// Looks the images up.
pub(super) fn find(images: &dyn ImageStore, config: &ContainerConfig) -> Result<Wanted> {
    config.mounts.iter().map(|m| one(images, m).map_err(|e| named(m, e))).collect()
}

fn named(m: &Mount, e: Error) -> Error {
    e.context(format!("image volume at {:?}", m.container_path))
}

fn one(images: &dyn ImageStore, m: &Mount) -> Result<Option<Arc<Image>>> {
    let Some(spec) = &m.image else { return Ok(None) };
    if m.propagation != Propagation::Private {
        return Err(Error::invalid("an image has nothing to propagate"));
    }
    let image = images.resolve(&spec.image);
    let image = image.ok_or_else(|| Error::not_found(format!("image {:?} is not here: pull it first", spec.image)))?;
    Ok(Some(image))
}

/// Writes what was found into the configuration that statuses show.
pub(super) fn note(wanted: &Wanted, config: &mut ContainerConfig) {
    for (mount, image) in config.mounts.iter_mut().zip(wanted) {
        if let (Some(spec), Some(image)) = (&mut mount.image, image) {
            spec.image_ref = image.repo_digests.first().cloned().unwrap_or_else(|| image.id.to_string());
        }
    }
}

/// Layers that have to stay as long as the container does.
pub(super) fn chains(wanted: &Wanted) -> Vec<Digest> {
    let mut all: Vec<Digest> = wanted.iter().flatten().flat_map(|image| image.chains.iter().cloned()).collect();
    all.sort();
    all.dedup();
    all
}

/// Mounts each image once, and finds out what its mounts show.
pub(super) async fn mount(
    shared: &Shared,
    wanted: Wanted,
    config: &ContainerConfig,
    user: Option<&UserNamespace>,
) -> Result<(Volumes, Vec<OwnedFd>)> {
    let mut images: Vec<Arc<Image>> = Vec::new();
    for image in wanted.iter().flatten() {
        if !images.iter().any(|known| known.id == image.id) {
            images.push(image.clone());
        }
    }
    if images.is_empty() {
        return Ok((Volumes { mount_points: Vec::new(), sources: vec![None; wanted.len()] }, Vec::new()));
    }
    if images.len() > MAX {
        return Err(Error::invalid(format!("{} image volumes: a container can have {MAX}", images.len())));
    }
    let mut fds = Vec::new();
    for image in &images {
        fds.push(shared.ports.layers.mount_volume(&image.chains, user).await?);
    }
    let base = shared.config.state.join("rootfs/volumes");
    let mounts = config.mounts.clone();
    blocking(move || {
        let mount_points: Vec<Utf8PathBuf> = (0..images.len()).map(|n| base.join(n.to_string())).collect();
        for folder in &mount_points {
            super::sandbox_ops::make_private_dir(folder)?;
        }
        let mut sources = Vec::new();
        for (mount, image) in mounts.iter().zip(&wanted) {
            let at = image.as_ref().and_then(|image| images.iter().position(|known| known.id == image.id));
            sources.push(match at {
                Some(n) => Some(mount_points[n].join(shown(&fds[n], mount).map_err(|e| named(mount, e))?)),
                None => None,
            });
        }
        Ok((Volumes { mount_points, sources }, fds))
    })
    .await
}

/// The folder of the image that the mount shows, relative and without links: those of an image may lead anywhere.
fn shown(image: &OwnedFd, mount: &Mount) -> Result<Utf8PathBuf> {
    let wanted = mount.image_sub_path.as_str();
    if wanted.is_empty() {
        return Ok(Utf8PathBuf::new());
    }
    if wanted.contains('\0') || Utf8Path::new(wanted).components().any(|c| c.as_str() == "..") {
        return Err(Error::invalid(format!("sub path {wanted:?} leads out of the image")));
    }
    let root = image.try_clone().map_err(|e| Error::io("duplicate an image's descriptor", e))?;
    let found = Root::from_fd(root).resolve_dir(wanted.as_ref()).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT) => Error::invalid(format!("the image has no {wanted:?}")),
        Some(libc::ENOTDIR) => Error::invalid(format!("{wanted:?} of the image is not a folder")),
        _ => Error::because(crate::core::error::Kind::InvalidArgument, format!("sub path {wanted:?}"), e),
    })?;
    Utf8PathBuf::from_path_buf(found).map_err(|p| Error::invalid(format!("sub path {p:?} is not UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sub_paths_stay_in_the_image_and_have_no_links() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::create_dir_all(dir.path().join("a/b")).expect("folders");
        std::fs::File::create(dir.path().join("a/file")).expect("file");
        for (target, link) in [("/a", "abs"), ("../../../../a/b", "a/up"), ("loop", "loop"), ("/etc", "out")] {
            std::os::unix::fs::symlink(target, dir.path().join(link)).expect("link");
        }
        let shown = |path: &str| {
            let image: OwnedFd = std::fs::File::open(dir.path()).expect("open").into();
            shown(&image, &Mount { image_sub_path: path.into(), ..Default::default() }).map(|p| p.to_string())
        };
        for (path, found) in [("", ""), ("a/b", "a/b"), ("/a/./b/", "a/b"), ("abs/b", "a/b"), ("a/up", "a/b")] {
            assert_eq!(shown(path).expect(path), found, "{path}");
        }
        for (path, why) in [
            ("x", "has no"),
            ("a/file", "not a folder"),
            ("a/file/x", "not a folder"),
            ("loop", "loop"),
            ("out", "has no"),
            ("../x", "leads out"),
            ("a/../../x", "leads out"),
        ] {
            let e = shown(path).expect_err(path);
            assert!(
                e.kind() == crate::core::error::Kind::InvalidArgument && e.chain().contains(why),
                "{path}: {}",
                e.chain()
            );
        }
    }
}
