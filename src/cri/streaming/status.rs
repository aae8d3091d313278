//! What became of an exec or attach, as the error stream says it: a `metav1.Status` as JSON (version 4 on), or a text.
//!
//! Pure.

use bytes::Bytes;
use serde_json::json;

use crate::core::error::Error;

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It ended well.
    Success,
    /// The process ended with this code, not 0.
    Exit(i32),
    /// It could not be done, or not to its end.
    Failed(String),
}

impl Outcome {
    /// Of a failure, with its causes.
    pub fn failed(what: &str, error: &Error) -> Self {
        Self::Failed(format!("{what}: {}", error.chain()))
    }

    /// As a client of version 4 on reads it, or an older one (which is told nothing of a success).
    pub fn to_wire(&self, json: bool) -> Bytes {
        let text = match self {
            Self::Success => String::new(),
            Self::Exit(code) => format!("command terminated with non-zero exit code: exit status {code}"),
            Self::Failed(why) => why.clone(),
        };
        if !json {
            return text.into();
        }
        let status = match self {
            Self::Success => json!({"metadata": {}, "status": "Success"}),
            Self::Exit(code) => json!({
                "metadata": {}, "status": "Failure", "message": text, "reason": "NonZeroExitCode",
                "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            }),
            Self::Failed(why) => json!({
                "metadata": {}, "status": "Failure", "message": text, "reason": "InternalError",
                "details": {"causes": [{"message": why}]}, "code": 500,
            }),
        };
        status.to_string().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_where_kubectl_looks_for_it() {
        let status: serde_json::Value = serde_json::from_slice(&Outcome::Exit(7).to_wire(true)).expect("JSON");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0], json!({"reason": "ExitCode", "message": "7"}));
        let status: serde_json::Value = serde_json::from_slice(&Outcome::Success.to_wire(true)).expect("JSON");
        assert_eq!(status["status"], "Success");
        assert!(Outcome::Success.to_wire(false).is_empty());
        assert!(Outcome::Exit(7).to_wire(false).ends_with(b"exit status 7"));
    }
}
