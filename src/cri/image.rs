//! The CRI ImageService.

use tonic::{Request, Response, Status};

use super::{Front, convert, to_wire};
use crate::api::v1;
use crate::core::error::{Error, Result};
use crate::core::ports::{ImageSource, KeyPath, Usage};

type Answer<T> = std::result::Result<Response<T>, Status>;
type ListStream<T> = tokio_stream::Iter<std::vec::IntoIter<std::result::Result<T, Status>>>;

/// How many entries a message of a Stream* list call carries.
pub(super) const CHUNK: usize = 100;

/// A finished list as a stream of messages.
pub(super) fn stream_of<T>(messages: Vec<T>) -> Response<ListStream<T>> {
    Response::new(tokio_stream::iter(messages.into_iter().map(Ok).collect::<Vec<_>>()))
}

impl Front {
    fn images(&self, filter: Option<v1::ImageFilter>) -> Vec<v1::Image> {
        let wanted = filter.and_then(|f| f.image).map(|i| i.image).unwrap_or_default();
        let store = self.engine.images();
        if wanted.is_empty() {
            return store.list().iter().map(|i| to_wire::image(i)).collect();
        }
        store.resolve(&wanted).iter().map(|i| to_wire::image(i)).collect()
    }
}

fn file_system(now: i64, mountpoint: String, usage: Usage) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp: now,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint }),
        used_bytes: Some(v1::UInt64Value { value: usage.bytes }),
        inodes_used: Some(v1::UInt64Value { value: usage.inodes }),
    }
}

#[tonic::async_trait]
impl v1::image_service_server::ImageService for Front {
    async fn list_images(&self, request: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        Ok(Response::new(v1::ListImagesResponse { images: self.images(request.into_inner().filter) }))
    }

    type StreamImagesStream = ListStream<v1::StreamImagesResponse>;

    async fn stream_images(&self, request: Request<v1::StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        let images = self.images(request.into_inner().filter);
        Ok(stream_of(images.chunks(CHUNK).map(|c| v1::StreamImagesResponse { images: c.to_vec() }).collect()))
    }

    async fn image_status(&self, request: Request<v1::ImageStatusRequest>) -> Answer<v1::ImageStatusResponse> {
        let request = request.into_inner();
        let spec = convert::image_spec(request.image)?;
        let Some(image) = self.engine.images().resolve(&spec.image) else {
            return Ok(Response::new(v1::ImageStatusResponse::default()));
        };
        let mut answer = v1::ImageStatusResponse { image: Some(to_wire::image(&image)), ..Default::default() };
        if request.verbose {
            let text =
                serde_json::to_string(&*image).map_err(|e| Error::internal(format!("image {}: {e}", image.id)))?;
            answer.info.insert("info".into(), text);
        }
        Ok(Response::new(answer))
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<v1::PullImageResponse> {
        let request = request.into_inner();
        let spec = convert::image_spec(request.image)?;
        let image = self.engine.images().pull(&spec.image, convert::auth(request.auth)).await?;
        Ok(Response::new(v1::PullImageResponse { image_ref: image.id.to_string() }))
    }

    async fn remove_image(&self, request: Request<v1::RemoveImageRequest>) -> Answer<v1::RemoveImageResponse> {
        let spec = convert::image_spec(request.into_inner().image)?;
        self.engine.images().remove(&spec.image).await?;
        Ok(Response::new(v1::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<v1::ImageFsInfoRequest>) -> Answer<v1::ImageFsInfoResponse> {
        let now = self.engine.clock().now_ns();
        let (folder, usage) = self.engine.images().usage();
        let layers = self.engine.layers().mountpoint();
        Ok(Response::new(v1::ImageFsInfoResponse {
            image_filesystems: vec![file_system(now, folder.to_string(), usage)],
            container_filesystems: vec![file_system(now, layers.to_string(), usage)],
        }))
    }
}

/// "oci:DIR[:NAME]", "oci-archive:FILE", "docker-archive:FILE", "bfc:FILE[:NAME]"; absolute paths only. `key` is of a
/// container.
pub fn source(text: &str, key: Option<KeyPath>) -> Result<ImageSource> {
    let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
    if !rest.starts_with('/') {
        return Err(Error::invalid(format!("{text:?}: the path is not absolute")));
    }
    if key.is_some() && kind != "bfc" {
        return Err(Error::invalid(format!("{text:?}: only containers (bfc:) have keys")));
    }
    match kind {
        "bfc" => Ok(match rest.split_once(".bfc:") {
            Some((path, name)) if !name.is_empty() => {
                ImageSource::Bfc(format!("{path}.bfc").into(), Some(name.to_owned()), key)
            }
            _ => ImageSource::Bfc(rest.into(), None, key),
        }),
        "oci" => Ok(match rest.split_once(':') {
            Some((dir, name)) if !name.is_empty() => ImageSource::OciLayout(dir.into(), Some(name.to_string())),
            _ => ImageSource::OciLayout(rest.into(), None),
        }),
        "oci-archive" => Ok(ImageSource::OciArchive(rest.into())),
        "docker-archive" => Ok(ImageSource::DockerArchive(rest.into())),
        _ => Err(Error::invalid(format!("{text:?}: not one of oci:, oci-archive:, docker-archive:, bfc:"))),
    }
}
