//! Tasks of the server: ids, states, logs.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::http::{Answer, Call, Failure};
use super::state::{NODE, Server, What};

/// One task.
#[derive(Debug, Clone)]
pub struct Task {
    pub upid: String,
    pub kind: String,
    pub id: String,
    pub user: String,
    pub start: u64,
    pub end: Option<u64>,
    pub exit: Option<String>,
    pub log: Vec<String>,
}

impl Task {
    fn node(&self) -> &str {
        self.upid.split(':').nth(1).unwrap_or(NODE)
    }
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or_default()
}

impl Server {
    pub fn next(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed)
    }

    /// Starts a task; `work` fails with its exit status.
    pub fn start<F>(self: &Arc<Self>, call: &Call, kind: &str, id: &str, fault: Option<What>, work: F) -> Value
    where
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        let (serial, start) = (self.next(), now());
        let node = call.parts.get(1).map_or(NODE, String::as_str);
        let upid = format!("UPID:{node}:{serial:08X}:{:08X}:{start:08X}:{kind}:{id}:{}:", serial * 7, call.user);
        let task = Task {
            upid: upid.clone(),
            kind: kind.into(),
            id: id.into(),
            user: call.user.clone(),
            start,
            end: None,
            exit: None,
            log: vec![format!("{kind} {id}")],
        };
        {
            let mut state = self.lock();
            state.tasks.push(task);
            let now = state.tasks.iter().filter(|t| t.kind == kind && t.exit.is_none()).count();
            let most = state.most.entry(kind.to_owned()).or_default();
            *most = now.max(*most);
        }
        let (server, name) = (self.clone(), upid.clone());
        let since = Instant::now();
        tokio::spawn(async move {
            let exit = match fault {
                Some(What::TaskEnds(text)) => text,
                fault => match (work.await, fault) {
                    (Ok(()), Some(What::TaskWarns(n))) => format!("WARNINGS: {n}"),
                    (Ok(()), _) => "OK".into(),
                    (Err(e), _) => e,
                },
            };
            server.was_busy(since);
            let mut state = server.lock();
            if let Some(task) = state.tasks.iter_mut().find(|t| t.upid == name && t.exit.is_none()) {
                let last = match exit.as_str() {
                    "OK" => "TASK OK".to_owned(),
                    warnings if warnings.starts_with("WARNINGS") => format!("TASK {warnings}"),
                    error => format!("TASK ERROR: {error}"),
                };
                task.log.push(last);
                task.exit = Some(exit);
                task.end = Some(now());
            }
        });
        json!(upid)
    }

    /// GET and DELETE below /nodes/N/tasks.
    pub fn task_call(&self, call: &Call) -> Answer {
        let parts: Vec<&str> = call.parts.iter().skip(3).map(String::as_str).collect();
        let get = |name: &str| call.params.get(name).cloned().unwrap_or_default();
        let mut state = self.lock();
        let Some((upid, rest)) = parts.split_first() else {
            let source = get("source");
            let (vmid, kind, limit) = (get("vmid"), get("typefilter"), get("limit").parse().unwrap_or(50));
            let wanted = |t: &&Task| {
                (source == "all" || (source == "active") == t.end.is_none()) && (vmid.is_empty() || t.id == vmid)
                    && (kind.is_empty() || t.kind == kind)
                    // Who may not audit the node sees his own.
                    && (t.user == call.user || call.user == "root@pam")
            };
            let list = state.tasks.iter().rev().filter(wanted).take(limit).map(|t| {
                let mut row = json!({ "upid": t.upid, "type": t.kind, "id": t.id, "user": t.user, "node": t.node(), "pid": 1, "pstart": 1, "starttime": t.start });
                if let (Some(end), Some(exit)) = (t.end, &t.exit) {
                    row["endtime"] = json!(end);
                    row["status"] = json!(exit);
                }
                row
            });
            return Ok(list.collect());
        };
        let Some(task) = state.tasks.iter_mut().find(|t| t.upid == *upid) else {
            return Err(Failure::param("upid", "no such task"));
        };
        match (call.method.as_str(), rest) {
            ("GET", ["status"]) => {
                let status = if task.exit.is_some() { "stopped" } else { "running" };
                let mut answer = json!({ "upid": task.upid, "node": task.node(), "pid": 1, "pstart": 1, "starttime": task.start, "type": task.kind, "id": task.id, "user": task.user, "status": status });
                if let Some(exit) = &task.exit {
                    answer["exitstatus"] = json!(exit);
                }
                Ok(answer)
            }
            ("GET", ["log"]) => {
                let start: usize = get("start").parse().unwrap_or(0);
                let limit = get("limit").parse().unwrap_or(50);
                let lines = task.log.iter().enumerate().skip(start).take(limit);
                Ok(lines.map(|(n, t)| json!({ "n": n + 1, "t": t })).collect())
            }
            ("DELETE", []) => {
                task.exit.get_or_insert_with(|| "interrupted by signal".into());
                task.end.get_or_insert_with(now);
                Ok(Value::Null)
            }
            _ => Err(Failure::new(501, format!("Method '{} {}' not implemented", call.method, call.path))),
        }
    }
}
