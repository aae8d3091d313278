//! Whose a guest is: a line in its notes. Tags are for people and shared by the whole cluster; they decide nothing.
//!
//! Pure. A guest without the line, or with another installation's, is never touched.

use super::error::{ApiError, ErrorKind};

/// What the line begins with.
const MARK: &str = "proxmox-lxcri:";
/// Most bytes of notes that Proxmox takes.
const MAX_NOTES: usize = 8192;

/// Which installation and pod a guest belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The installation's id.
    pub installation: String,
    /// The pod's id.
    pub pod: String,
}

impl Identity {
    /// Notes for people, with the line at their end.
    pub fn notes(&self, text: &str) -> Result<String, ApiError> {
        let invalid = |why: &str| Err(ApiError::new(ErrorKind::Invalid, "notes", why));
        let word = |w: &str| !w.is_empty() && w.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if !word(&self.installation) || !word(&self.pod) {
            return invalid("an identity is of letters, digits and hyphens");
        }
        if text.lines().any(|l| l.trim_start().starts_with(MARK)) {
            return invalid("the text has a line that reads as an identity");
        }
        let notes = format!("{}\n\n{MARK} installation={} pod={}\n", text.trim_end(), self.installation, self.pod);
        if notes.len() > MAX_NOTES { invalid("more than 8 KiB") } else { Ok(notes.trim_start().to_owned()) }
    }

    /// The identity in notes; None if there is none, or not exactly one.
    pub fn find(notes: &str) -> Option<Self> {
        let mut marks = notes.lines().filter_map(|l| l.trim().strip_prefix(MARK));
        let (Some(mark), None) = (marks.next(), marks.next()) else { return None };
        let mut words = mark.split_whitespace();
        let found = Self {
            installation: words.next()?.strip_prefix("installation=")?.to_owned(),
            pod: words.next()?.strip_prefix("pod=")?.to_owned(),
        };
        words.next().is_none().then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_line_counts() {
        let id = Identity { installation: "0a-1".into(), pod: "abc".into() };
        for text in ["", "Pod default/web\nimages: a, b"] {
            let notes = id.notes(text).expect("notes");
            assert!(notes.starts_with(text.split('\n').next().unwrap_or_default()));
            assert_eq!(Identity::find(&notes), Some(id.clone()));
        }
        let line = "proxmox-lxcri: installation=0a-1 pod=abc";
        for none in [
            "",
            "installation=0a-1 pod=abc",
            "see proxmox-lxcri: installation=0a-1 pod=abc",
            &format!("{line} x"),
            &format!("{line}\n{line}"),
        ] {
            assert_eq!(Identity::find(none), None, "{none}");
        }
        assert!(id.notes(line).is_err() && id.notes(&"x".repeat(9000)).is_err());
        assert!(Identity { pod: "a b".into(), ..id }.notes("").is_err());
    }
}
