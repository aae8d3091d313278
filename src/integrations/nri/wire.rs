//! The messages of `proto/nri.proto`, and ttrpc's envelopes around them; nothing here can fail.

pub use messages::*;

#[allow(missing_docs, clippy::all)]
mod messages {
    tonic::include_proto!("nri.pkg.api.v1alpha1");
}

/// Asks.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// Full name of the service.
    #[prost(string, tag = "1")]
    pub service: String,
    /// Its method.
    #[prost(string, tag = "2")]
    pub method: String,
    /// Encoded message.
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// How long the answer is waited for, in nanoseconds.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// Answers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// None: success.
    #[prost(message, optional, tag = "1")]
    pub status: Option<Status>,
    /// Encoded message.
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// A failure, with gRPC's codes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// 0: success.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For a human.
    #[prost(string, tag = "2")]
    pub message: String,
}
