//! Who we are: an API token, or a user's ticket that is renewed; and the files their secrets are in.
//!
//! Used by the transport for every request. Secrets are in memory only, in types without a readable `Debug`. A token file
//! that has changed is read again when the API no longer takes the old one.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use super::error::ErrorKind;
use crate::core::config::Proxmox as Settings;
use crate::core::error::{Error, Result};
use crate::utils::secret_file;

/// Largest secret in bytes.
const MAX_SECRET: u64 = 4096;
/// A ticket lives two hours; it is renewed after one.
const RENEW_AFTER: Duration = Duration::from_secs(3600);

/// Text that shows up nowhere.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// Reads a secret from a file that nobody else may read.
pub(super) fn read_secret(key: &str, path: &Utf8Path) -> Result<Secret> {
    let failed = |e: std::io::Error| Error::io(format!("{key}: {path}"), e);
    let file = std::fs::OpenOptions::new()
        .read(true)
        // A FIFO in its place must not hang the start.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let refuse = |why: String| Err(Error::precondition(format!("{key}: {path}: {why}")));
    if !meta.is_file() {
        return refuse("not a regular file".into());
    }
    if let Some(why) = secret_file::known_to_others(&meta) {
        return refuse(why);
    }
    let mut text = String::new();
    file.take(MAX_SECRET + 1).read_to_string(&mut text).map_err(failed)?;
    let text = text.trim();
    if text.is_empty() || text.len() as u64 > MAX_SECRET || text.chars().any(char::is_control) {
        return refuse("is not one line with a secret".into());
    }
    Ok(Secret::new(text))
}

/// How requests are authenticated.
pub(super) enum Auth {
    Token { id: String, file: Utf8PathBuf, secret: RwLock<Held<Secret>> },
    Ticket { user: String, password: Secret, ticket: RwLock<Held<Option<Ticket>>>, login: tokio::sync::Mutex<Login> },
}

/// What requests are authenticated with, and the how many-th it is: a request that was refused knows with which it was sent.
#[derive(Default)]
pub(super) struct Held<T> {
    what: T,
    generation: u64,
}

/// The latest login that has failed: who waited for it does not try the same.
#[derive(Default)]
pub(super) struct Login {
    pub(super) failed: Option<(Instant, ErrorKind, String)>,
}

/// Whether it was poisoned does not matter: it is changed in one step.
fn read<T>(held: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    held.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(held: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    held.write().unwrap_or_else(PoisonError::into_inner)
}

impl Auth {
    /// Whom tasks are said to be of: `lxcri@pve!node1`, `root@pam`.
    pub(super) fn who(&self) -> &str {
        match self {
            Self::Token { id, .. } => id,
            Self::Ticket { user, .. } => user,
        }
    }
}

/// A user's session.
#[derive(Clone)]
pub(super) struct Ticket {
    cookie: Secret,
    csrf: Secret,
    since: Instant,
}

/// Answer of `/access/ticket`.
#[derive(Deserialize)]
pub(super) struct TicketAnswer {
    ticket: Option<String>,
    #[serde(rename = "CSRFPreventionToken")]
    csrf: Option<String>,
    #[serde(rename = "NeedTFA", default, deserialize_with = "super::lenient::bool")]
    second_factor: bool,
}

impl TicketAnswer {
    /// The ticket; what is missing otherwise.
    pub(super) fn ticket(self) -> std::result::Result<Ticket, &'static str> {
        if self.second_factor {
            return Err("the user has a second factor, which a daemon can't give: use an API token");
        }
        match (self.ticket, self.csrf) {
            (Some(ticket), Some(csrf)) => {
                Ok(Ticket { cookie: Secret::new(ticket), csrf: Secret::new(csrf), since: Instant::now() })
            }
            _ => Err("an answer without a ticket"),
        }
    }
}

impl Ticket {
    pub(super) fn is_fresh(&self) -> bool {
        self.since.elapsed() < RENEW_AFTER
    }

    /// What renews it: the ticket itself, as the password.
    pub(super) fn as_password(&self) -> Secret {
        self.cookie.clone()
    }

    pub(super) fn headers(&self) -> Option<HeaderMap> {
        let cookie = utf8_percent_encode(self.cookie.reveal(), NON_ALPHANUMERIC);
        let mut headers = HeaderMap::new();
        headers.insert(header::COOKIE, sensitive(&format!("PVEAuthCookie={cookie}"))?);
        headers.insert(HeaderName::from_static("csrfpreventiontoken"), sensitive(self.csrf.reveal())?);
        Some(headers)
    }
}

impl Auth {
    /// As the configuration says.
    pub(super) fn load(settings: &Settings) -> Result<Self> {
        if settings.user.is_empty() {
            let secret = read_secret("proxmox.token_file", &settings.token_file)?;
            let (id, file) = (settings.token_id.clone(), settings.token_file.clone());
            return Ok(Self::Token { id, file, secret: RwLock::new(Held { what: secret, generation: 0 }) });
        }
        let file = settings.password_file.as_ref();
        let file = file.ok_or_else(|| Error::invalid("proxmox.password_file: a user needs one"))?;
        let password = read_secret("proxmox.password_file", file)?;
        let user = settings.user.clone();
        Ok(Self::Ticket { user, password, ticket: RwLock::default(), login: tokio::sync::Mutex::default() })
    }

    /// The header of a token, or of a ticket that is fresh, and which one it is; None: there is none.
    pub(super) fn headers(&self) -> Option<(HeaderMap, u64)> {
        match self {
            Self::Token { id, secret, .. } => {
                let held = read(secret);
                let value = sensitive(&format!("PVEAPIToken={id}={}", held.what.reveal()))?;
                Some((HeaderMap::from_iter([(header::AUTHORIZATION, value)]), held.generation))
            }
            Self::Ticket { ticket, .. } => {
                let held = read(ticket);
                let fresh = held.what.as_ref().filter(|t| t.is_fresh())?;
                Some((fresh.headers()?, held.generation))
            }
        }
    }

    /// After the refusal of what was sent with `generation`: whether there is something else to authenticate with. A token's file
    /// is read again; without its ticket a user needs another one.
    pub(super) fn renew(&self, generation: u64) -> bool {
        match self {
            Self::Token { file, secret, .. } => {
                let mut held = write(secret);
                if held.generation != generation {
                    return true;
                }
                let Ok(fresh) = read_secret("proxmox.token_file", file) else { return false };
                if held.what == fresh {
                    return false;
                }
                *held = Held { what: fresh, generation: generation + 1 };
                true
            }
            Self::Ticket { ticket, .. } => {
                // Of those whose one was refused the first takes it away; whoever is next logs in for all.
                let mut held = write(ticket);
                if held.generation == generation {
                    held.what = None;
                }
                true
            }
        }
    }

    /// The ticket that has run out, which renews itself.
    pub(super) fn old_ticket(&self) -> Option<Secret> {
        match self {
            Self::Token { .. } => None,
            Self::Ticket { ticket, .. } => write(ticket).what.take().map(|t| t.as_password()),
        }
    }

    /// Another ticket, from now on.
    pub(super) fn hold(&self, fresh: Ticket) {
        if let Self::Ticket { ticket, .. } = self {
            let mut held = write(ticket);
            *held = Held { what: Some(fresh), generation: held.generation + 1 };
        }
    }

    /// The text without our secrets.
    pub(super) fn redact(&self, text: String) -> String {
        match self {
            Self::Token { secret, .. } => text.replace(read(secret).what.reveal(), "[secret]"),
            Self::Ticket { password, ticket, .. } => {
                let text = text.replace(password.reveal(), "[secret]");
                match &read(ticket).what {
                    Some(t) => text.replace(t.csrf.reveal(), "[secret]").replace(t.cookie.reveal(), "[secret]"),
                    None => text,
                }
            }
        }
    }
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods)]
    fn files_of_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(dir.path().join("token")).unwrap();
        let put = |text: &str, mode: u32| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put("0b5e-secret\n", 0o600);
        let secret = read_secret("token_file", &path).unwrap();
        assert_eq!(secret.reveal(), "0b5e-secret");
        assert!(!format!("{secret:?}").contains("0b5e"));
        let settings = Settings { token_id: "a@pve!tok".into(), token_file: path.clone(), ..Settings::default() };
        let auth = Auth::load(&settings).unwrap();
        assert!(!format!("{:?}", auth.headers()).contains("0b5e"), "headers are marked");
        assert_eq!(auth.redact("bad 0b5e-secret here".into()), "bad [secret] here");
        put("other", 0o400);
        assert!(auth.renew(0) && !auth.renew(1));
        assert!(auth.renew(0), "what was sent with the old one meanwhile");
        for (text, mode) in [("x", 0o640), ("x", 0o604), ("", 0o600), ("a\nb", 0o600), (&"x".repeat(5000), 0o600)] {
            put(text, mode);
            let e = read_secret("token_file", &path).unwrap_err().chain();
            assert!(e.contains("token_file") && !e.contains("xx"), "{e}");
        }
        assert!(read_secret("token_file", Utf8Path::new("/dev/null")).is_err());
        assert!(read_secret("token_file", Utf8Path::new("/no/such")).is_err());
    }

    #[test]
    fn a_fresh_ticket_is_not_taken_away_and_shows_up_nowhere() {
        let ticket = |text: &str| Ticket {
            cookie: Secret::new(text),
            csrf: Secret::new(format!("csrf-{text}")),
            since: Instant::now(),
        };
        let (user, password) = ("root@pam".to_owned(), Secret::new("hunter22"));
        let auth = Auth::Ticket { user, password, ticket: RwLock::default(), login: Default::default() };
        assert!(auth.headers().is_none() && auth.old_ticket().is_none());
        auth.hold(ticket("PVE:one"));
        let (_, first) = auth.headers().expect("a ticket");
        assert!(auth.renew(first) && auth.renew(first) && auth.headers().is_none());
        auth.hold(ticket("PVE:two"));
        assert!(auth.renew(first) && auth.headers().is_some(), "refused with the old one: the fresh one stays");
        assert_eq!(auth.redact("PVE:two, csrf-PVE:two, hunter22".into()), "[secret], [secret], [secret]");
    }
}
