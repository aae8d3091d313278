//! Blots secrets out of text that is to be handed on: those that are known, and whatever looks like one.
//!
//! Too much is blotted out rather than too little. Knows nothing of where the text is from; nothing here can fail.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::{Captures, Regex};

/// In the place of a secret.
pub const BLOT: &str = "<redacted>";
/// Shorter ones would be found in everything.
const SHORTEST: usize = 4;

/// Secrets that are known, longest first.
pub struct Redactor {
    secrets: Vec<String>,
}

const WORDS: &str = "password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential";

fn pattern(text: &str) -> Regex {
    // Written down here and tried by a test.
    #[allow(clippy::expect_used)]
    Regex::new(text).expect("a pattern of ours")
}

/// `NAME = value`, `"NAME": "value"`: the names that say that it is one.
static NAMED: LazyLock<Regex> = LazyLock::new(|| {
    pattern(&format!(
        r#"(?i)([\w.-]*(?:{WORDS})[\w.-]*)(\\?["']?\s*[:=]\s*)(\\?"(?:[^"\\]|\\[^"])*\\?"|'[^']*'|[^\s,;}}&"']+)"#
    ))
});
/// `--password value`.
static FLAG: LazyLock<Regex> = LazyLock::new(|| pattern(&format!(r"(?i)(--?[\w-]*(?:{WORDS})[\w-]*)(\s+)([^\s-]\S*)")));

/// The rest, with what stays of each.
static OTHERS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    [
        (r"(?s)-----BEGIN ([A-Z0-9 ]*)PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\z)", "<redacted>"),
        (r#"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s"'@]+@"#, "${1}<redacted>@"),
        (
            r#"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|csrfpreventiontoken|x-registry-auth)(\\?["']?\s*[:=]\s*)[^\r\n]+"#,
            "${1}${2}<redacted>",
        ),
        (r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", "${1} <redacted>"),
        (r"(?i)\b(PVEAPIToken|PVEAuthCookie)=[^\s;]+", "${1}=<redacted>"),
        (r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*", "<redacted>"),
    ]
    .into_iter()
    .map(|(text, stays)| (pattern(text), stays))
    .collect()
});

impl Redactor {
    /// One that knows `secrets`.
    pub fn new(secrets: impl IntoIterator<Item = String>) -> Self {
        let known: BTreeSet<String> = secrets.into_iter().filter(|s| s.len() >= SHORTEST).collect();
        let mut secrets: Vec<String> = known.into_iter().collect();
        secrets.sort_by_key(|s| std::cmp::Reverse(s.len()));
        Self { secrets }
    }

    /// `text` without them.
    pub fn clean(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for secret in &self.secrets {
            if text.contains(secret.as_str()) {
                text = text.replace(secret.as_str(), BLOT);
            }
        }
        for (pattern, stays) in OTHERS.iter() {
            text = pattern.replace_all(&text, *stays).into_owned();
        }
        let text = FLAG.replace_all(&text, |c: &Captures<'_>| format!("{}{}{BLOT}", &c[1], &c[2]));
        NAMED
            .replace_all(&text, |c: &Captures<'_>| match says_where(&c[1]) {
                true => c[0].to_owned(),
                false => format!("{}{}\"{BLOT}\"", &c[1], &c[2]),
            })
            .into_owned()
    }
}

/// Names of what only says where a secret is, or whose.
fn says_where(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["_file", "_path", "_dir", "_dirs", "_id", "_timeout"].iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_and_what_looks_like_one_is_blotted_out() {
        let redactor = Redactor::new(["hunter2-known".to_owned(), "abc".into(), "hunter2-known-longer".into()]);
        for text in [
            "x hunter2-known y",
            "GET https://user:hunter2@registry.example/v2/",
            "GET https://hunter2@registry.example/v2/",
            "authorization: Basic dXNlcjpodW50ZXIyaHVudGVyMg== hunter2",
            "sent Bearer hunter2hunter2 to it",
            "PVEAPIToken=user@pve!node=hunter2",
            "password=hunter2 and on",
            "DB_PASSWORD='hunter2 hunter2'",
            "{\"auth-token\": \"hunter2 hunter2\", \"x\": 1}",
            "{\"msg\":\"{\\\"password\\\":\\\"hunter2\\\"}\"}",
            "api_key: hunter2",
            "run --db-password hunter2 --all",
            "run --token=hunter2",
            "-----BEGIN EC PRIVATE KEY-----\nhunter2\n-----END EC PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\nhunter2 and its end is cut",
            "eyJhbGciOiJIUzI1NiJ9.hunter2.hunter2",
        ] {
            let clean = redactor.clean(text);
            assert!(!clean.contains("hunter2") && clean.contains(BLOT), "{text:?} -> {clean:?}");
        }
        assert_eq!(redactor.clean("hunter2-known-longer"), BLOT);
        assert_eq!(redactor.clean("run --db-password hunter2 --all"), "run --db-password <redacted> --all");
    }

    #[test]
    fn the_rest_stays() {
        let redactor = Redactor::new(["abc".to_owned(), String::new()]);
        for text in [
            "an abc of pods",
            "token_file = \"/etc/proxmox-lxcri/token\"  # default",
            "token_id = \"lxcri@pve!node\"",
            "pulled docker.io/library/busybox@sha256:0123",
            "unix:///run/proxmox-lxcri/proxmox-lxcri.sock",
            "https://registry.example:5000/v2/",
        ] {
            assert_eq!(redactor.clean(text), text);
        }
    }
}
