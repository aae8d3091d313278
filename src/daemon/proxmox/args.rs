//! The arguments of `proxmox ...`. Pure.

use clap::{Arg, ArgAction, Command};

fn verb(name: &'static str, about: &'static str) -> Command {
    Command::new(name).about(about)
}

fn need(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).required(true).value_name(name).help(help)
}

fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

fn number(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    option(name, value, help).value_parser(clap::value_parser!(u64))
}

fn list(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    option(name, value, help).action(ArgAction::Append)
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

fn id() -> Arg {
    need("VMID", "Its number")
}

/// All verbs.
pub(super) fn commands() -> Vec<Command> {
    let node = || option("node", "NODE", "Node (default: proxmox.node, else this host)").global(true);
    let json = || switch("json", "JSON instead of a table").global(true);
    let all = [
        verb("ct", "Containers").subcommand_required(true).subcommands(guest()).subcommands(ct()),
        verb("vm", "Virtual machines").subcommand_required(true).subcommands(guest()).subcommands(vm()),
        verb("nodes", "List nodes"),
        verb("storage", "List storages of the node").arg(option(
            "content",
            "KIND",
            "Of those that hold it: rootdir, vztmpl",
        )),
        verb("templates", "List templates of containers, or upload one")
            .arg(option("storage", "STORAGE", "On this storage alone"))
            .arg(option("upload", "FILE", "Upload this file (.tar, .tar.zst, ...)").requires("storage")),
        verb("tasks", "List tasks of the node, or show one")
            .arg(Arg::new("UPID").value_name("UPID").help("Show this task's log"))
            .arg(switch("active", "Only those that go on"))
            .arg(number("limit", "N", "At most so many").default_value("50")),
        verb("vmids", "List the numbers in use in the whole cluster, and the next free one"),
        verb("orphans", "List containers of this installation that belong to no pod that it knows")
            .arg(switch("remove", "Delete them")),
        verb("check", "Whether the API answers, and what the token lacks")
            .arg(option("pool", "POOL", "Pool of the guests").default_value("k8s"))
            .arg(list("storage", "STORAGE", "A storage that is used"))
            .arg(list("bridge", "BRIDGE", "A bridge that is used, or ZONE/VNET")),
    ];
    all.into_iter().map(|c| c.arg(node()).arg(json())).collect()
}

/// Options of what makes a guest.
/// Of a guest that is made. `net`: a network as an example.
fn made(net: &'static str) -> Vec<Arg> {
    vec![
        option("vmid", "VMID", "Number (default: the next free one)"),
        number("memory", "MIB", "Memory (Proxmox's default: 512)"),
        number("cores", "N", "CPUs that it sees"),
        option("cpulimit", "CPUS", "CPU time, fractions too").value_parser(clap::value_parser!(f64)),
        list("net", "NET", net),
        option("tags", "TAGS", "a;b"),
        option("pool", "POOL", "Pool"),
        option("description", "TEXT", "Notes"),
        list("set", "KEY=VALUE", "Any other key of the API"),
        switch("start", "Start it"),
    ]
}

fn words() -> Arg {
    Arg::new("CMD").required(true).num_args(1..).trailing_var_arg(true).allow_hyphen_values(true).value_name("CMD")
}

/// What containers and VMs have in common.
fn guest() -> Vec<Command> {
    vec![
        verb("list", "List those of the node").visible_alias("ls"),
        verb("start", "Start it").arg(id()),
        verb("stop", "Kill it").arg(id()),
        verb("shutdown", "Have it end by itself").args([
            id(),
            number("timeout", "SECONDS", "Time that it has").default_value("60"),
            switch("force", "Kill it then"),
        ]),
        verb("delete", "Delete it and its volumes")
            .visible_alias("rm")
            .args([id(), switch("force", "Also if it runs")]),
        verb("info", "State, configuration and addresses").arg(id()),
        verb("exists", "Exit code 0 if it is there, 1 if not, 3 if that can't be told").arg(id()),
        verb("config", "Show its configuration").arg(id()),
        verb("update", "Change its configuration; tells what waits for the next start").args([
            id(),
            Arg::new("KEY=VALUE").num_args(0..).value_name("KEY=VALUE").help("memory=1024"),
            list("delete", "KEY", "A key that is to go"),
            option("digest", "DIGEST", "Only if the configuration is still this one"),
        ]),
        verb("resize", "Make a disk larger").args([
            id(),
            need("DISK", "rootfs, mp0, scsi0, ..."),
            need("SIZE", "8G, or +1G").allow_hyphen_values(true),
        ]),
        verb("snapshot", "Take a snapshot").args([
            id(),
            need("NAME", "Its name"),
            option("description", "TEXT", "Notes"),
        ]),
        verb("snapshots", "List snapshots").arg(id()),
        verb("delsnapshot", "Remove a snapshot").args([id(), need("NAME", "Its name")]),
        verb("rollback", "Go back to a snapshot").args([
            id(),
            need("NAME", "Its name"),
            switch("start", "Start it then"),
        ]),
        verb("clone", "Copy it, or clone it if it is a template; the new number is printed").args([
            id(),
            option("newid", "VMID", "New number (default: the next free one)"),
            option("name", "NAME", "Name, of a container its host name").visible_alias("hostname"),
            option("description", "TEXT", "Notes"),
            option("pool", "POOL", "Pool"),
            option("snapshot", "NAME", "From this snapshot"),
            option("storage", "STORAGE", "Storage of a full copy"),
            switch("full", "A copy also of a template"),
        ]),
        verb("template", "Make it a template").arg(id()),
    ]
}

fn ct() -> Vec<Command> {
    vec![
        verb("create", "Make one; its number is printed")
            .args([
                need("TEMPLATE", "STORAGE:vztmpl/NAME"),
                option("hostname", "NAME", "Host name"),
                option("rootfs", "STORAGE:GIB", "Root file system (default: local, 4 GiB)"),
                number("swap", "MIB", "Swap"),
                list("mp", "MOUNT", "Mount point: STORAGE:GIB,mp=/data"),
                option("ostype", "TYPE", "debian, alpine, unmanaged, ..."),
                switch("nesting", "Containers inside"),
                switch("privileged", "Its root is root of the node"),
            ])
            .args(made("Network: name=eth0,bridge=vmbr0,ip=dhcp")),
        verb("exec", "Run a command in it; only for containers of this node").args([id(), words()]),
    ]
}

fn vm() -> Vec<Command> {
    vec![
        verb("create", "Make one; its number is printed")
            .args([
                option("name", "NAME", "Name"),
                option("cpu", "TYPE", "Kind of CPU: host, ..."),
                list("disk", "DISK", "SCSI disk: STORAGE:GIB, or STORAGE:0,import-from=STORAGE:import/NAME"),
                switch("agent", "The QEMU guest agent runs in it"),
            ])
            .args(made("Network: virtio,bridge=vmbr0")),
        verb("exec", "Run a command in it by its QEMU guest agent; its output comes at its end").args([
            id(),
            number("timeout", "SECONDS", "Longest wait for its end").default_value("60"),
            switch("stdin", "It reads our standard input, of which at most 64 KiB"),
            switch("direct", "Not by the guest's /bin/sh: CMD is the path of a program"),
            words(),
        ]),
    ]
}
