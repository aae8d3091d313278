//! Where an image's bytes come from: a registry session, or a local layout or archive.
//!
//! Called by the assembly of an image. Sources hand out bytes; layers are compared by the pipeline that reads them.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::manifest::Descriptor;
use crate::core::error::{Error, Kind, Result};
use crate::core::progress::PullProgress;
use crate::integrations::registry::Session;
use crate::utils::tasks::TaskSet;

/// Pieces of a layer that wait for the unpacker; one has up to 400 KiB.
const QUEUE: usize = 4;

/// Why a source failed in the middle of a layer, for the one who reads it as plain bytes.
#[derive(Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Option<Error>>>);

impl Failure {
    pub(super) fn set(&self, error: Error) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    pub(super) fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A layer to be read on a blocking thread.
pub(super) struct LayerBytes {
    pub reader: Box<dyn Read + Send>,
    /// Set when the reader failed.
    pub failure: Failure,
    /// Which place it came from: the next attempt begins after it.
    pub place: usize,
    /// That place's name.
    pub from: String,
}

/// See the module's words.
#[async_trait]
pub(super) trait Source: Send + Sync {
    /// Whether layers are named by the digest of what is read (docker archives name them by their content).
    fn has_blob_digests(&self) -> bool {
        true
    }
    /// A small blob, whole and compared.
    async fn blob(&self, blob: &Descriptor, max: u64) -> Result<Bytes>;
    /// A layer from the first place after `after`; None when there is none left.
    async fn layer(&self, layer: &Descriptor, after: Option<usize>) -> Result<Option<LayerBytes>>;
}

/// A registry.
pub(super) struct RegistrySource {
    pub session: Arc<Session>,
    pub tasks: TaskSet,
    /// Ends the downloads.
    pub cancel: CancellationToken,
    /// Counts what comes.
    pub progress: Arc<PullProgress>,
}

enum Piece {
    Data(Bytes),
    End,
    Failed(Error),
}

#[async_trait]
impl Source for RegistrySource {
    async fn blob(&self, blob: &Descriptor, max: u64) -> Result<Bytes> {
        self.session.blob(&blob.digest, blob.size, max).await
    }

    async fn layer(&self, layer: &Descriptor, after: Option<usize>) -> Result<Option<LayerBytes>> {
        let Some(mut stream) = self.session.stream(&layer.digest, after).await? else { return Ok(None) };
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (place, from) = (stream.index, stream.host.clone());
        let (cancel, digest, progress) = (self.cancel.clone(), layer.digest.clone(), self.progress.clone());
        progress.start(&digest);
        self.tasks.spawn(format!("download {digest}"), async move {
            loop {
                let piece = tokio::select! {
                    () = cancel.cancelled() => {
                        Piece::Failed(Error::new(Kind::Aborted, format!("download of layer {digest} was ended")))
                    }
                    chunk = stream.chunk() => match chunk {
                        Ok(Some(data)) => {
                            progress.add(&digest, data.len() as u64);
                            Piece::Data(data)
                        }
                        Ok(None) => Piece::End,
                        Err(e) => Piece::Failed(e.into()),
                    },
                };
                let last = !matches!(piece, Piece::Data(_));
                // Nobody reads on when the unpacker has failed.
                if sender.send(piece).await.is_err() || last {
                    return;
                }
            }
        });
        let failure = Failure::default();
        let reader = Box::new(PieceReader { receiver, current: Bytes::new(), failure: failure.clone(), ended: false });
        Ok(Some(LayerBytes { reader, failure, place, from }))
    }
}

struct PieceReader {
    receiver: mpsc::Receiver<Piece>,
    current: Bytes,
    failure: Failure,
    ended: bool,
}

impl Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.receiver.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                Some(Piece::Failed(error)) => {
                    self.failure.set(error);
                    return Err(io::Error::other("the download failed"));
                }
                None => return Err(io::Error::other("the download was ended")),
            }
        }
        let n = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}
