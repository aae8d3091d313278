//! The one table from failures to gRPC codes. A message is the failure with all its causes.

use tonic::{Code, Status};

use crate::core::error::{Error, Kind};

/// What a kubelet makes the reason of a container that waits (pkg/kubelet/images/types.go).
const SIGNATURE_REFUSED: &str = "SignatureValidationFailed";

/// gRPC code of a kind.
pub fn code(kind: Kind) -> Code {
    match kind {
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::PermissionDenied => Code::PermissionDenied,
        // With any other code kubelets see no reason in the message.
        Kind::Untrusted => Code::Unknown,
        Kind::Aborted => Code::Aborted,
        Kind::Internal => Code::Internal,
    }
}

impl From<Error> for Status {
    fn from(e: Error) -> Self {
        let code = code(e.kind());
        let message = match e.kind() {
            Kind::Untrusted => format!("{SIGNATURE_REFUSED}: {}", e.chain()),
            _ => e.chain(),
        };
        match code {
            // Kubelets ask for what they have just removed.
            Code::NotFound => tracing::debug!(?code, message, "request refused or failed"),
            _ => tracing::warn!(?code, message, "request refused or failed"),
        }
        Status::new(code, message)
    }
}
