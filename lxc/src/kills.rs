//! `kills`: how often the kernel has killed for memory in a container's group, asked while the group is still there.
//!
//! liblxc removes the group before it tells its caller that the container has ended, and the kernel counts nowhere else
//! (cgroup v1) or among all others of the groups above (v2). Its hook `stop` runs in between and is this verb; the
//! container's parent reads what was noted. A group that is gone, or without such a count, notes nothing.

use std::path::Path;

use crate::create::put;
use crate::options::Options;

/// `kills GROUP FILE`.
pub fn note(options: &Options) -> Result<(), String> {
    let [group, file] = options.rest.as_slice() else { return Err("kills: a group and a file".into()) };
    let Some(count) = counted(Path::new(group)) else { return Ok(()) };
    // A container that liblxc takes for rebooting ends twice, the second time with a new group.
    put(file, &format!("{}\n", count.max(noted(file).unwrap_or(0))))
}

/// What was noted in a file.
pub fn noted(file: &str) -> Option<u64> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn counted(group: &Path) -> Option<u64> {
    // v2 has the first, v1 the second.
    let text = ["memory.events", "memory.oom_control"].iter().find_map(|f| std::fs::read_to_string(group.join(f)).ok());
    text?.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noting(folder: &Path) -> Option<u64> {
        let file = folder.join("kills").to_str().expect("UTF-8").to_owned();
        let rest = vec![folder.to_str().expect("UTF-8").to_owned(), file.clone()];
        note(&Options { rest, ..Options::default() }).expect("noted");
        noted(&file)
    }

    #[test]
    fn both_versions_are_counted_and_the_larger_stays() {
        let folder = std::env::temp_dir().join(format!("lxcri-kills-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        assert_eq!(noting(&folder), None);
        let put = |file: &str, text: &str| put(folder.join(file).to_str().expect("UTF-8"), text).expect("written");
        put("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        assert_eq!(noting(&folder), Some(2));
        put("memory.events", "low 0\nhigh 0\nmax 4\noom 3\noom_kill 3\noom_group_kill 0\n");
        assert_eq!(noting(&folder), Some(3));
        put("memory.events", "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n");
        assert_eq!(noting(&folder), Some(3));
        for file in ["memory.oom_control", "memory.events", "kills"] {
            std::fs::remove_file(folder.join(file)).expect("removed");
        }
        std::fs::remove_dir(&folder).expect("removed");
    }
}
