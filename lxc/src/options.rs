//! The helper's arguments: `--name value` pairs and what has no name. Unknown ones are refused.

/// A mount to make before the container.
#[derive(Debug, Default, Clone)]
pub struct Stage {
    /// From where.
    pub source: String,
    /// Where to.
    pub at: String,
    /// Flags of mount_setattr(2).
    pub attributes: u64,
    /// Of everything below, too.
    pub recursive: bool,
    /// User namespace whose ids it has; "": as they are.
    pub users: String,
}

/// What was said.
#[derive(Debug, Default)]
pub struct Options {
    /// liblxc; "": as the loader finds it.
    pub library: String,
    /// Folder of containers.
    pub lxcpath: String,
    /// Name of the container in it.
    pub name: String,
    /// Network namespace in which liblxc listens for its tools; "": that of this process.
    pub net: String,
    /// Plan of the process.
    pub plan: String,
    /// Program that becomes the container's first process.
    pub init: String,
    /// Written with the pid of the process, and its parent's if that stays.
    pub pid_file: String,
    /// Written by an OCI runtime with the pid of what it has made.
    pub runtime_pid_file: String,
    /// Folder that goes with a container when its runtime can't be asked any more.
    pub state: String,
    /// FIFO that lets the first process run.
    pub start: String,
    /// Written with how the first process ended.
    pub status: String,
    /// Where `kills` has noted what it counted.
    pub kills: String,
    /// Where the terminal is sent.
    pub console_socket: String,
    /// Where failures are written.
    pub log: String,
    /// Groups that this process enters first.
    pub cgroups: Vec<String>,
    /// Groups that `delete` removes, with what is in them.
    pub remove: Vec<String>,
    /// Groups that it removes if nobody is in them.
    pub prune: Vec<String>,
    /// Mounts that are made first.
    pub stages: Vec<Stage>,
    /// Root file system of a container that is made by hand.
    pub root: String,
    /// Configuration that it begins with.
    pub config: String,
    /// KEY=VALUE: lines of it.
    pub set: Vec<String>,
    /// KEY=VALUE: environment of a process.
    pub env: Vec<String>,
    /// Its working directory.
    pub cwd: String,
    /// What has no name, and all after `--`.
    pub rest: Vec<String>,
}

impl Options {
    /// Reads them.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        let mut stage = Stage::default();
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let Some(name) = argument.strip_prefix("--") else {
                options.rest.push(argument);
                continue;
            };
            if name.is_empty() {
                options.rest.extend(arguments);
                break;
            }
            let value = arguments.next().ok_or_else(|| format!("--{name}: no value"))?;
            match name {
                "library" => options.library = value,
                "lxcpath" => options.lxcpath = value,
                "name" => options.name = value,
                "net" => options.net = value,
                "plan" => options.plan = value,
                "init" => options.init = value,
                "pid-file" => options.pid_file = value,
                "runtime-pid-file" => options.runtime_pid_file = value,
                "state" => options.state = value,
                "start" => options.start = value,
                "status" => options.status = value,
                "kills" => options.kills = value,
                "console-socket" => options.console_socket = value,
                "log" => options.log = value,
                "root" => options.root = value,
                "config" => options.config = value,
                "set" => options.set.push(value),
                "env" => options.env.push(value),
                "cwd" => options.cwd = value,
                "cgroup" => options.cgroups.push(value),
                "remove" => options.remove.push(value),
                "prune" => options.prune.push(value),
                "stage-at" => stage.at = value,
                "stage-attributes" => {
                    stage.attributes = value.parse().map_err(|_| format!("--{name}: {value:?} is no number"))?;
                }
                "stage-users" => stage.users = value,
                "stage-recursive" => stage.recursive = value == "1",
                "stage" => {
                    stage.source = value;
                    options.stages.push(std::mem::take(&mut stage));
                }
                _ => return Err(format!("--{name} is not known")),
            }
        }
        Ok(options)
    }
}
