//! Tasks: what the API does after it has answered. Waited for with a deadline, shown while they go on, found again.
//!
//! An accepted call is no success: only the task's exit status counts. A task outlives us; after a restart
//! [`Proxmox::active_tasks`] finds it by its guest, and [`Proxmox::resume`] waits on.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::error::{ApiError, ErrorKind, NO_STATUS};
use super::ids::{Upid, Vmid};
use super::lanes::Permit;
use super::transport::{Form, Proxmox, path, plain};

/// First and longest time between looks at a task. In between it is a part of the task's age ([`pause`]), so that what is lost
/// after its end is a part of what it took.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// That part.
const PART: u32 = 4;
/// How long a task holds its place in its node's queue: what hangs is not to keep others from what is well.
const LENT: Duration = Duration::from_secs(60);
/// Lines of a log that are asked for at once.
const PAGE: u64 = 500;
/// Most lines of one log.
const MAX_LINES: usize = 100_000;
/// Lines of a failed task's log that its error shows.
const TAIL: usize = 5;

/// A task under way. Dropping it stops nothing.
#[derive(Debug)]
pub struct Running {
    api: Proxmox,
    upid: Upid,
    lanes: Vec<Permit>,
}

/// A task that has ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Without a word.
    Ok,
    /// With so many warnings, which are in its log.
    Warnings(u32),
}

impl Task {
    /// How it stands; None: it goes on.
    pub fn outcome(&self) -> Option<Result<Ended, ApiError>> {
        self.endtime?;
        outcome(&format!("task {}", self.upid), "stopped", self.status.as_deref())
    }
}

/// A task in a list.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Task {
    /// Its id.
    pub upid: Upid,
    /// What it does.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// What it does it to.
    #[serde(default, deserialize_with = "super::lenient::string")]
    pub id: String,
    /// Who started it.
    #[serde(default)]
    pub user: String,
    /// When, in seconds since 1970.
    #[serde(default, deserialize_with = "super::lenient::u64")]
    pub starttime: u64,
    /// When it ended.
    #[serde(default, deserialize_with = "super::lenient::opt_u64")]
    pub endtime: Option<u64>,
    /// How it ended; "RUNNING" or nothing while it goes on.
    #[serde(default)]
    pub status: Option<String>,
}

#[derive(Deserialize)]
struct Status {
    status: String,
    exitstatus: Option<String>,
}

#[derive(Deserialize)]
struct Line {
    #[serde(default, deserialize_with = "super::lenient::u64")]
    n: u64,
    #[serde(default, deserialize_with = "super::lenient::string")]
    t: String,
}

/// How long to wait before the next look at a task of that age.
pub(super) fn pause(age: Duration) -> Duration {
    (age / PART).clamp(POLL.0, POLL.1)
}

/// How a task stands by its status; None: it goes on.
fn outcome(call: &str, status: &str, exit: Option<&str>) -> Option<Result<Ended, ApiError>> {
    if status != "stopped" {
        return None;
    }
    Some(match exit {
        Some("OK") => Ok(Ended::Ok),
        Some(text) => match text.strip_prefix("WARNINGS:").and_then(|n| n.trim().parse().ok()) {
            Some(n) => Ok(Ended::Warnings(n)),
            None => Err(ApiError::task(call, text)),
        },
        None => Err(ApiError::new(ErrorKind::TaskFailed, call, NO_STATUS)),
    })
}

impl Running {
    pub(super) fn new(api: Proxmox, upid: Upid, lanes: Vec<Permit>) -> Self {
        Self { api, upid, lanes }
    }

    /// Its id: worth noting before it is waited for.
    pub fn upid(&self) -> &Upid {
        &self.upid
    }

    /// Waits for its end, at most the configured time.
    pub async fn wait(self) -> Result<Ended, ApiError> {
        let limit = self.api.task_patience();
        self.wait_for(limit).await
    }

    /// The same for a time of its own.
    pub async fn wait_for(self, limit: Duration) -> Result<Ended, ApiError> {
        self.watch(limit, None).await
    }

    /// Waits and hands on each line of its log.
    pub async fn wait_with(self, mut line: impl FnMut(&str) + Send) -> Result<Ended, ApiError> {
        let limit = self.api.task_patience();
        self.watch(limit, Some(&mut line)).await
    }

    async fn watch(
        mut self,
        limit: Duration,
        mut each: Option<&mut (dyn FnMut(&str) + Send)>,
    ) -> Result<Ended, ApiError> {
        let since = tokio::time::Instant::now();
        let deadline = since + limit;
        let call = format!("task {}", self.upid);
        let mut shown = 0;
        loop {
            let late = || {
                let why = format!("has not ended after {} s; it goes on", limit.as_secs());
                ApiError::new(ErrorKind::Timeout, &call, why)
            };
            let status = tokio::time::timeout_at(deadline, self.api.task_status(&self.upid)).await;
            let outcome = match status.map_err(|_| late())? {
                Ok(status) => outcome(&call, &status.status, status.exitstatus.as_deref()),
                // The task does not care whether we can see it.
                Err(e) if passing(&e) && tokio::time::Instant::now() < deadline => None,
                Err(e) => return Err(e),
            };
            if since.elapsed() > LENT {
                self.lanes.retain(|place| !place.lent);
            }
            if let Some(each) = each.as_deref_mut() {
                // What can't be shown is no failure.
                for line in self.api.task_log(&self.upid, shown).await.unwrap_or_default() {
                    shown = shown.max(line.n);
                    each(&line.t);
                }
            }
            match outcome {
                Some(Err(e)) if *e.kind() == ErrorKind::TaskFailed => return Err(self.explain(e).await),
                Some(done) => return done,
                None if tokio::time::Instant::now() >= deadline => return Err(late()),
                None => tokio::time::sleep(pause(since.elapsed())).await,
            }
        }
    }

    /// Adds the end of the log to a failure that says little by itself.
    async fn explain(&self, e: ApiError) -> ApiError {
        let Ok(lines) = self.api.task_lines(&self.upid).await else { return e };
        let said: Vec<_> =
            lines.iter().map(|l| l.trim()).filter(|t| !t.is_empty() && !t.starts_with("TASK ")).collect();
        let tail = self.api.0.auth.redact(plain(&said[said.len().saturating_sub(TAIL)..].join("; ")));
        if tail.is_empty() || e.message().contains(&tail) {
            return e;
        }
        ApiError::new(e.kind().clone(), format!("task {}", self.upid), format!("{} ({tail})", e.message()))
    }
}

/// Whether a look at a task may just be repeated.
fn passing(e: &ApiError) -> bool {
    matches!(e.kind(), ErrorKind::Unreachable | ErrorKind::NoAnswer | ErrorKind::Timeout | ErrorKind::Busy)
}

impl Proxmox {
    async fn task_status(&self, upid: &Upid) -> Result<Status, ApiError> {
        self.get(&path(&["nodes", upid.node(), "tasks", upid.as_str(), "status"]), Form::new()).await
    }

    async fn task_log(&self, upid: &Upid, start: u64) -> Result<Vec<Line>, ApiError> {
        let form = vec![("start".to_owned(), start.to_string()), ("limit".to_owned(), PAGE.to_string())];
        self.get(&path(&["nodes", upid.node(), "tasks", upid.as_str(), "log"]), form).await
    }

    /// The lines of a task's log.
    pub async fn task_lines(&self, upid: &Upid) -> Result<Vec<String>, ApiError> {
        let mut all = Vec::new();
        while all.len() < MAX_LINES {
            let page = self.task_log(upid, all.len() as u64).await?;
            let last = (page.len() as u64) < PAGE;
            all.extend(page.into_iter().map(|l| l.t));
            if last {
                break;
            }
        }
        Ok(all)
    }

    /// The tasks in a list. One of somebody else with an id that is none to us, as of a user whose name is beyond ASCII, is left out.
    async fn task_list(&self, node: &str, form: Form) -> Result<Vec<Task>, ApiError> {
        let at = path(&["nodes", node, "tasks"]);
        let all: Vec<Value> = self.get(&at, form).await?;
        let mut tasks = Vec::new();
        for task in all {
            let ours = task["upid"].as_str().is_some_and(|upid| upid.contains(&format!(":{}:", self.0.auth.who())));
            match Task::deserialize(task) {
                Ok(task) => tasks.push(task),
                Err(_) if !ours => {}
                Err(e) => return Err(ApiError::new(ErrorKind::Protocol, format!("GET {at}"), e.to_string())),
            }
        }
        Ok(tasks)
    }

    /// Waits for a task that another call, or another process, has started.
    pub fn resume(&self, upid: Upid) -> Running {
        Running::new(self.clone(), upid, Vec::new())
    }

    /// Tells a task to end.
    pub async fn abort(&self, upid: &Upid) -> Result<(), ApiError> {
        self.delete(&path(&["nodes", upid.node(), "tasks", upid.as_str()]), Form::new()).await
    }

    /// Tasks of a node that go on, of one guest if one is named.
    pub async fn active_tasks(&self, node: &str, vmid: Option<Vmid>) -> Result<Vec<Task>, ApiError> {
        let mut form = vec![("source".to_owned(), "active".to_owned())];
        form.extend(vmid.map(|v| ("vmid".to_owned(), v.to_string())));
        let tasks = self.task_list(node, form).await?;
        // Those that have just ended are still among them.
        Ok(tasks.into_iter().filter(|t| t.endtime.is_none()).collect())
    }

    /// Tasks of a kind of one guest that were started by us: those that go on and the latest that have ended.
    pub async fn own_tasks(&self, node: &str, vmid: Vmid, kind: &str) -> Result<Vec<Task>, ApiError> {
        let form = [("source", "all".to_owned()), ("vmid", vmid.to_string()), ("typefilter", kind.to_owned())];
        let form = form.map(|(k, v)| (k.to_owned(), v)).to_vec();
        let all = self.task_list(node, form).await?;
        let (id, who) = (vmid.to_string(), self.0.auth.who());
        Ok(all.into_iter().filter(|t| t.upid.kind() == kind && t.upid.id() == id && t.upid.user() == who).collect())
    }

    /// The latest tasks of a node, those that go on first.
    pub async fn tasks(&self, node: &str, limit: u32) -> Result<Vec<Task>, ApiError> {
        let form = vec![("source".to_owned(), "all".to_owned()), ("limit".to_owned(), limit.to_string())];
        self.task_list(node, form).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes() {
        let see =
            |status: &str, exit: Option<&str>| outcome("task", status, exit).map(|o| o.map_err(|e| e.kind().clone()));
        assert_eq!(see("running", None), None);
        assert_eq!(see("stopped", Some("OK")), Some(Ok(Ended::Ok)));
        assert_eq!(see("stopped", Some("WARNINGS: 2")), Some(Ok(Ended::Warnings(2))));
        assert_eq!(see("stopped", Some("CT 100 already running")), Some(Err(ErrorKind::AlreadyRunning)));
        assert_eq!(see("stopped", Some("unexpected status")), Some(Err(ErrorKind::TaskFailed)));
        assert_eq!(see("stopped", None), Some(Err(ErrorKind::TaskFailed)));
    }

    #[test]
    fn the_end_of_a_task_is_seen_within_a_part_of_what_it_took() {
        let ms = Duration::from_millis;
        for (age, expected) in [(0, 20), (40, 20), (400, 100), (2000, 500), (60_000, 1000)] {
            assert_eq!(pause(ms(age)), ms(expected), "{age} ms");
        }
    }
}
