//! A pod on a node, for containers with odd configurations.

use std::path::PathBuf;

use serde_json::Value;

use super::crictl::{BUSYBOX, Crictl, container_config, read_log, stream_lines};
use super::node::Node;

/// A pod that runs, with what is needed to put busybox containers into it.
pub struct Pod {
    /// Talks to the node's daemon.
    pub crictl: Crictl,
    /// Its folder of logs.
    pub logs: PathBuf,
    /// Its ID.
    pub id: String,
    /// The file with its configuration.
    pub file: String,
}

impl Pod {
    /// Pulls the image and runs a pod of that name.
    pub fn run(node: &Node, name: &str) -> Self {
        let crictl = node.crictl();
        crictl.run(&["pull", BUSYBOX]);
        let id = crictl.run_pod(name);
        let file = crictl.pod_file(name);
        Self { crictl, logs: node.pod_logs(name), id, file }
    }

    /// `change`d configuration of a container that runs a script: its ID, or what crictl says.
    pub fn create(&self, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> Result<String, String> {
        let mut config = container_config(name, BUSYBOX, script);
        change(&mut config);
        let file = self.crictl.file(name, &config);
        let (done, text) = self.crictl.try_run(&["create", "--no-pull", &self.id, &file, &self.file]);
        if done { Ok(text.trim().to_owned()) } else { Err(text) }
    }

    /// Creates and starts it; its ID.
    #[track_caller]
    pub fn running(&self, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
        let id = self.create(name, script, change).expect("created");
        self.crictl.run(&["start", &id]);
        id
    }

    /// Runs it to its end; its exit code and lines.
    #[track_caller]
    pub fn output(&self, name: &str, script: &str, change: impl FnOnce(&mut Value)) -> (i64, Vec<String>) {
        let id = self.running(name, script, change);
        self.ended(name, &id)
    }

    /// Waits for the end of a started container; its exit code and lines.
    pub fn ended(&self, name: &str, id: &str) -> (i64, Vec<String>) {
        let status = self.crictl.wait_exit(id);
        let log = read_log(&self.logs.join(name).join("0.log"));
        let lines = [stream_lines(&log, "stdout"), stream_lines(&log, "stderr")].concat();
        (status["exitCode"].as_i64().unwrap_or(0), lines)
    }

    /// The creation is refused with this code, and the message names all of the words.
    #[track_caller]
    pub fn refused(&self, code: &str, words: &[&str], change: impl FnOnce(&mut Value)) {
        self.refused_as("refused", code, words, change);
    }

    /// The same of a container of that name.
    #[track_caller]
    pub fn refused_as(&self, name: &str, code: &str, words: &[&str], change: impl FnOnce(&mut Value)) {
        let text = self.create(name, "true", change).expect_err("refused").replace("\\\"", "\"");
        assert!(text.contains(&format!("code = {code} ")), "{code} was due: {text}");
        for word in words {
            assert!(text.contains(word), "the message does not name {word:?}: {text}");
        }
    }
}
