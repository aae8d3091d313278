//! The configuration: sources over one another, all that is wrong at once, every key documented, defaulted, and refused what it
//! can't be; the legacy program's made into ours.
//!
//! Needs no daemon and no root. Leaves nothing.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // tests write files plainly

use std::collections::BTreeSet;
use std::ffi::OsString;

use camino::Utf8Path;
use proxmox_lxcri::core::config::{self, Config, Entry, Key, LayerDriver, Router, Sources, all_keys, legacy};

/// Keys that have values: not those within a list of tables.
fn own_keys() -> impl Iterator<Item = &'static Key> {
    all_keys().iter().filter(|k| !k.path.contains("[]"))
}

/// Files in a folder of their own, with environment and flags.
struct Given {
    folder: tempfile::TempDir,
    sources: Sources,
}

fn given(main: &str, more: &[(&str, &str)], environment: &[(&str, &str)], set: &[&str]) -> Given {
    let folder = tempfile::tempdir().expect("a folder");
    let path = Utf8Path::from_path(folder.path()).expect("UTF-8").to_owned();
    std::fs::write(path.join("config.toml"), main).expect("a file");
    std::fs::create_dir(path.join("conf.d")).expect("a folder");
    for (name, text) in more {
        std::fs::write(path.join("conf.d").join(name), text).expect("a file");
    }
    let sources = Sources {
        file: path.join("config.toml"),
        required: true,
        folder: Some(path.join("conf.d")),
        environment: environment.iter().map(|(n, v)| (OsString::from(n), OsString::from(v))).collect(),
        set: set.iter().map(ToString::to_string).collect(),
    };
    Given { folder, sources }
}

impl Given {
    fn refused(&self) -> Vec<String> {
        let problems = self.sources.load().expect_err("refused");
        let folder = format!("{}/", self.folder.path().display());
        problems.0.iter().map(|p| p.to_string().replace(&folder, "")).collect()
    }
}

#[test]
fn each_source_is_over_the_one_before() {
    let main = "[log]\nlevel = \"warn\"\n[runtime]\npids_limit = 1\nlog_line_max = 1000\ncdi_spec_dirs = [\"/a\", \"/b\"]\n\
                [images.proxies]\n\"a.example\" = \"direct\"\n\"b.example\" = \"direct\"\n";
    let more = [
        ("20-b.toml", "[runtime]\npids_limit = 3\n[images.proxies]\n\"b.example\" = \"http://p:1\"\n"),
        ("10-a.toml", "[runtime]\npids_limit = 2\nlog_line_max = 2000\ncdi_spec_dirs = [\"/c\"]\n"),
        (".hidden.toml", "nonsense"),
        ("30-c.toml.bak", "nonsense"),
    ];
    let environment = [
        ("PROXMOX_LXCRI__RUNTIME__LOG_LINE_MAX", "3000"),
        ("PROXMOX_LXCRI__HANDLERS__PROXMOX_LXC__IDS", "70000"),
        ("PROXMOX_LXCRI__NETWORK__PLUGIN_DIRS", "[\"/opt/a\"]"),
        ("PROXMOX_LXCRI__LOG__LEVEL", "debug"),
        ("PROXMOX_LXCRI", "not ours"),
    ];
    let set = ["log.level=info,h2=warn", "images.proxies.\"*.c.example\"=direct", "server.stream.idle_timeout=90s"];
    let given = given(main, &more, &environment, &set);
    let loaded = given.sources.load().unwrap_or_else(|e| panic!("{e}"));
    let config = &loaded.config;
    assert_eq!((config.runtime.pids_limit, config.runtime.log_line_max), (3, 3000));
    assert_eq!(config.runtime.cdi_spec_dirs, ["/c"], "lists are replaced");
    let proxies: Vec<_> = config.images.proxies.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    assert_eq!(proxies, [("*.c.example", "direct"), ("a.example", "direct"), ("b.example", "http://p:1")]);
    assert_eq!((config.log.level.as_str(), config.handlers.proxmox_lxc.ids), ("info,h2=warn", 70_000));
    assert_eq!((config.network.plugin_dirs[0].as_str(), config.network.plugin_dirs.len()), ("/opt/a", 1));
    assert_eq!(config.server.stream.idle_timeout.get().as_secs(), 90);
    let origin = |key: &str| loaded.origins(key).iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert!(origin("runtime.pids_limit").ends_with("conf.d/20-b.toml:2"), "{}", origin("runtime.pids_limit"));
    assert_eq!(origin("runtime.log_line_max"), "environment PROXMOX_LXCRI__RUNTIME__LOG_LINE_MAX");
    assert_eq!((origin("log.level").as_str(), origin("log.format").as_str()), ("--config-set", "default"));
}

#[test]
fn all_that_is_wrong_is_said_at_once_and_with_its_place() {
    let main = "version = 1\n[server]\nlisten_on = \"/x\"\nroot = 5\nstate = \"run\"\n\n[log]\nformat = \"jsn\"\n\
                [images]\ndriver = \"zfs\"\n[serverr]\na = 1\nb = 2\n";
    let more = [("10.toml", "[proxmox]\nendpoints = [\"https://h\"]\n"), ("20.toml", "a = [\nb = 1\n")];
    let environment = [("PROXMOX_LXCRI__LOG__LEVL", "info"), ("PROXMOX_LXCRI__RUNTIME__PIDS_LIMIT", "many")];
    let set = ["runtime.log_line_max", "log.level=inof", "pids_limit=3", "log=1"];
    let refused = given(main, &more, &environment, &set).refused();
    let has = |what: &str| assert!(refused.iter().any(|r| r.contains(what)), "{what}\n{}", refused.join("\n"));
    has("config.toml:3: server.listen_on: there is no such key; did you mean server.listen?");
    has("config.toml:4: server.root: invalid type: integer `5`, expected");
    has("config.toml:5: server.state: \"run\" is not an absolute path");
    has(
        "config.toml:8: log.format: unknown variant `jsn`, expected one of `text`, `json`, `journald`; did you mean \"json\"?",
    );
    has("config.toml:10: images.zfs.dataset: the zfs driver needs one");
    has("config.toml:11: serverr: there is no such key; did you mean server?");
    has("conf.d/10.toml:2: proxmox.token_id: there is neither a token nor a user");
    has("conf.d/20.toml:");
    has("environment PROXMOX_LXCRI__LOG__LEVL: there is no such key; did you mean PROXMOX_LXCRI__LOG__LEVEL?");
    has("environment PROXMOX_LXCRI__RUNTIME__PIDS_LIMIT: runtime.pids_limit: \"many\" is not TOML");
    has("--config-set: \"runtime.log_line_max\" is not of the form");
    has("--config-set: log.level: \"inof\" is no level (off, error, warn, info, debug, trace); did you mean \"info\"?");
    has("--config-set: pids_limit: there is no such key; did you mean runtime.pids_limit?");
    has("--config-set: log: is a table");
    assert!(!refused.iter().any(|r| r.contains("serverr.a")), "a table that is not known is said once");
}

#[test]
fn a_missing_file_is_one_only_where_it_was_named() {
    let given = given("", &[], &[], &[]);
    let mut sources = given.sources.clone();
    sources.file = sources.file.with_file_name("none.toml");
    assert!(sources.load().expect_err("named").to_string().contains("none.toml can't be read"));
    (sources.required, sources.folder) = (false, Some("/nowhere/conf.d".into()));
    assert_eq!(sources.load().expect("defaults").config, Config::default());
}

#[test]
fn the_legacy_programs_level_is_taken_with_a_warning_and_below_ours() {
    let legacy = [("NEXCAGE_LOG_LEVEL", "warning")];
    let given_legacy = given("", &[], &legacy, &[]);
    let loaded = given_legacy.sources.load().expect("fits");
    assert_eq!((loaded.config.log.level.as_str(), loaded.warnings.len()), ("warn", 1));
    let both = given("", &[], &[legacy[0], ("PROXMOX_LXCRI__LOG__LEVEL", "error")], &[]);
    assert_eq!(both.sources.load().expect("fits").config.log.level, "error");
}

#[test]
fn a_file_that_everybody_may_write_is_warned_of() {
    use std::os::unix::fs::PermissionsExt;
    let given = given("", &[], &[], &[]);
    std::fs::set_permissions(&given.sources.file, std::fs::Permissions::from_mode(0o666)).expect("chmod");
    let warnings = given.sources.load().expect("fits").warnings;
    assert!(matches!(warnings.as_slice(), [one] if one.contains("can be written by everybody")), "{warnings:?}");
}

const PROXMOX: &str = "proxmox.endpoints = [\"https://h:8006\"]\nproxmox.token_id = \"a@pve!bb\"\n";

/// A value for each key that is well formed and can't be, with what else has to be there.
const WRONG: &[(&str, &str, &str)] = &[
    ("version", "2", ""),
    ("server.listen", "\"x.sock\"", ""),
    ("server.local_listen", "\"/run/proxmox-lxcri/proxmox-lxcri.sock\"", ""),
    ("server.root", "\"lib\"", ""),
    ("server.state", "\"/var/lib/proxmox-lxcri\"", ""),
    ("server.grpc_max_message_size", "1000", ""),
    ("server.stream.address", "\"localhost\"", ""),
    ("server.stream.port", "65536", ""),
    ("server.stream.idle_timeout", "\"0s\"", ""),
    ("server.stream.tls_cert_file", "\"x\"", ""),
    ("server.stream.tls_key_file", "\"x\"", ""),
    ("server.stream.max_streams", "0", ""),
    ("log.level", "\"loud\"", ""),
    ("metrics.address", "\"localhost:1\"", ""),
    ("tracing.endpoint", "\"grpc://collector:4317\"", ""),
    ("tracing.endpoint", "\"https://collector:4317/v1\"", ""),
    ("tracing.ca_file", "\"ca.pem\"", "tracing.endpoint = \"https://collector:4317\""),
    ("tracing.ca_file", "\"/ca.pem\"", "tracing.endpoint = \"http://collector:4317\""),
    ("tracing.sampling_per_million", "1000001", ""),
    ("runtime.default_handler", "\"proxmox-lxc\"", ""),
    ("runtime.monitor_path", "\"monitor\"", ""),
    ("runtime.log_line_max", "255", ""),
    ("runtime.log_size_max", "1000", ""),
    ("runtime.exec_sync_drain", "3601", ""),
    ("runtime.pids_limit", "-1", ""),
    ("runtime.default_capabilities", "[\"CAP_ALL\"]", ""),
    ("runtime.seccomp_root", "\"seccomp\"", ""),
    ("runtime.cdi_spec_dirs", "[\"/a\", \"b\"]", ""),
    ("runtime.hooks_dirs", "[\"hooks.d\"]", ""),
    ("runtime.blockio_config_file", "\"blockio.yaml\"", ""),
    ("runtime.rdt_classes", "[\"gold\", \"info\"]", ""),
    ("handlers.crun.policy.drop_capabilities", "[\"NET_ROW\"]", ""),
    ("handlers.crun.policy.max_memory", "1000", ""),
    ("handlers.crun.policy.max_cpus", "-1", ""),
    ("handlers.lxc.policy.drop_capabilities", "[\"NET_ROW\"]", ""),
    ("handlers.lxc.policy.max_memory", "1000", ""),
    ("handlers.lxc.policy.max_cpus", "-1", ""),
    ("handlers.proxmox-lxc.policy.drop_capabilities", "[\"NET_ROW\"]", ""),
    ("handlers.proxmox-lxc.policy.max_memory", "1000", ""),
    ("handlers.proxmox-lxc.policy.max_cpus", "-1", ""),
    ("handlers.proxmox-vm.policy.drop_capabilities", "[\"NET_ROW\"]", ""),
    ("handlers.proxmox-vm.policy.max_memory", "1000", ""),
    ("handlers.proxmox-vm.policy.max_cpus", "-1", ""),
    ("handlers.crun.path", "\"crun\"", ""),
    ("handlers.crun.timeout", "0", ""),
    ("handlers.crun.checkpoint_timeout", "0", ""),
    ("handlers.lxc.helper", "\"a\"", ""),
    ("handlers.lxc.init", "\"a\"", ""),
    ("handlers.lxc.library", "\"liblxc.so.1\"", ""),
    ("handlers.lxc.timeout", "0", ""),
    ("handlers.proxmox-lxc.enabled", "true", ""),
    ("handlers.proxmox-lxc.vmids", "\"1-2\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.storage", "\"\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.template_storage", "\"a b\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.pool", "\"a b\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.first_id", "0", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.ids", "0", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.orphans_after", "\"1ms\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.bridge", "\"vmbr0\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.vlan", "1", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.mtu", "1500", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.firewall", "true", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.rate", "1.5", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.address", "\"dhcp\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.address6", "\"dhcp\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.gateway", "\"10.0.0.1\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-lxc.network.gateway6", "\"fd00::1\"", "handlers.proxmox-lxc.enabled = true"),
    ("handlers.proxmox-vm.enabled", "true", ""),
    ("handlers.proxmox-vm.template", "99", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.vmids", "\"1-2\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.storage", "\"\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.pool", "\"a b\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.memory", "16", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.guest_memory", "16", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.cores", "0", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.port", "0", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.start_timeout", "\"1ms\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.kubelet_root", "\"kubelet\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.orphans_after", "\"1ms\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.images_after", "\"1ms\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.relay_path", "\"relay\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.bridge", "\"a/b\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.vlan", "0", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.mtu", "1", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.rate", "0.0", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.address", "\"dhcp\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.address6", "\"dhcp\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.gateway", "\"10.0.0.1\"", "handlers.proxmox-vm.enabled = true"),
    ("handlers.proxmox-vm.network.gateway6", "\"fd00::1\"", "handlers.proxmox-vm.enabled = true"),
    ("images.config_path", "[\"certs.d\"]", ""),
    ("images.auth_file", "\"auth.json\"", ""),
    ("images.credential_helper_dirs", "[\"bin\"]", ""),
    ("images.credential_helper_timeout", "0", ""),
    ("images.policy_file", "\"policy\"", ""),
    ("images.max_concurrent_downloads", "0", ""),
    ("images.progress_timeout", "0", ""),
    ("images.default_registry", "\"https://docker.io\"", ""),
    ("images.unpacker_path", "\"a\"", ""),
    ("images.zfs.dataset", "\"/rpool\"", ""),
    ("images.zfs.dataset", "\"1rpool/x\"", ""),
    ("images.zfs.zfs_path", "\"zfs\"", ""),
    ("images.zfs.zpool_path", "\"zpool\"", ""),
    ("images.zfs.timeout", "0", ""),
    ("images.zfs.health_interval", "0", ""),
    ("images.zfs.container_quota", "\"much\"", ""),
    ("images.bfc.directories", "[]", "images.bfc.enabled = true"),
    ("images.bfc.key_file", "\"key\"", ""),
    ("network.plugin_dirs", "[]", "network.embedded = true"),
    ("network.conf_dir", "\"net.d\"", ""),
    ("network.embedded_subnet", "\"10.0.0.1/20\"", ""),
    ("network.conf_template", "\"t\"", ""),
    ("network.plugin_timeout", "0", ""),
    ("nri.plugin_dir", "\"plugins\"", ""),
    ("nri.plugin_config_dir", "\"conf.d\"", ""),
    ("nri.connecting_plugins", "true", ""),
    ("nri.socket", "\"nri.sock\"", ""),
    ("nri.registration_timeout", "\"1ms\"", ""),
    ("nri.request_timeout", "\"2m\"", ""),
    ("nri.required_plugins", "[\"a/b\"]", "nri.enabled = true"),
    ("proxmox.endpoints", "[\"http://h\"]", "proxmox.token_id = \"a@pve!bb\""),
    ("proxmox.node", "\"a/b\"", PROXMOX),
    ("proxmox.token_id", "\"a@pve\"", "proxmox.endpoints = [\"https://h\"]"),
    ("proxmox.token_file", "\"token\"", PROXMOX),
    ("proxmox.user", "\"a@pve\"", PROXMOX),
    ("proxmox.password_file", "\"p\"", PROXMOX),
    ("proxmox.ca_file", "\"ca\"", PROXMOX),
    ("proxmox.fingerprint", "\"ab:cd\"", PROXMOX),
    ("proxmox.timeout", "\"1ms\"", PROXMOX),
    ("proxmox.task_timeout", "\"1s\"", PROXMOX),
    ("proxmox.max_parallel", "0", PROXMOX),
    ("proxmox.max_parallel_creates", "65", PROXMOX),
    ("proxmox.lxc_path", "\"lxc\"", PROXMOX),
    ("routing", "[{ match = { name = \"a\" }, handler = \"b\" }]", ""),
    ("images.proxies", "{ a = \"socks://p\" }", ""),
];

/// The problem's key, or one within it.
fn says(text: &str, key: &str) -> Result<(), String> {
    let problems = Config::parse(text, "c.toml").map(|_| "taken".to_owned()).map_err(|e| e.chain());
    let said = problems.err().ok_or("it was taken")?;
    let at = said.split(['\n', ' ']).any(|word| {
        let word = word.trim_end_matches(':');
        word == key || word.strip_prefix(key).is_some_and(|rest| rest.starts_with(['.', '[']))
    });
    if at && said.contains("c.toml:") { Ok(()) } else { Err(said) }
}

#[test]
fn every_key_is_refused_what_can_not_be() {
    let with_values: BTreeSet<&str> = WRONG.iter().map(|(key, _, _)| *key).collect();
    for key in own_keys() {
        let path = &key.path;
        // Of another type than it has.
        let wrong = if key.kind == "number" || key.kind.starts_with("true") { "\"x\"" } else { "1" };
        let wrong = if key.kind.starts_with("number") { "true" } else { wrong };
        says(&format!("{path} = {wrong}\n"), path).unwrap_or_else(|e| panic!("{path} = {wrong}: {e}"));
        // Of its type, where not all of them fit: choices have refused the text "x" by themselves.
        let all_fit = key.kind == "true or false" || key.kind.starts_with('"');
        assert!(
            all_fit || with_values.contains(path.as_str()),
            "{path} ({}): no value is said to be refused",
            key.kind
        );
        if key.kind.starts_with('"') {
            says(&format!("{path} = \"x\"\n"), path).unwrap_or_else(|e| panic!("{path} = \"x\": {e}"));
        }
    }
    for (key, value, more) in WRONG {
        assert!(own_keys().any(|k| k.path == *key), "{key} is no key any more");
        let text = format!("{more}\n{key} = {value}\n");
        says(&text, key).unwrap_or_else(|e| panic!("{text}: {e}"));
    }
}

#[test]
fn the_old_file_is_made_into_one_that_fits() {
    let old = r#"{
        "proxmox": {"hosts": ["10.0.0.1", "pve2"], "port": 8007, "token": "root@pam!ci=12345-secret", "node": "pve1",
                    "verify_ssl": true, "timeout": 20, "pct_path": "/usr/sbin/pct", "storage": "fast"},
        "default_runtime": "lxc", "log_level": "warning", "log_file": "/var/log/x", "data_dir": "/srv/x",
        "runtime": {"systemd_cgroup": true, "routing": [{"pattern": "kube-*", "runtime": "crun"}]},
        "container_config": {"crun_name_patterns": ["db.?"], "default_container_type": "lxc"},
        "zfs": {"enabled": true, "base_dataset": "tank/x", "compression": "lz4", "snapshot_retention": {"max_snapshots": 3}},
        "network": {"bridge": "vmbr1", "tag": 7, "ip": "10.0.0.2/24", "dns_servers": ["1.1.1.1"]},
        "security": {"seccomp": true}, "resources": {"memory": 5}, "cache_dir": "/c", "wishes": [1]
    }"#;
    let made = legacy::migrate(old).expect("migrated");
    let notes: Vec<String> = made.notes.iter().map(ToString::to_string).collect();
    assert!(!made.undecided(), "{}", notes.join("\n"));
    let config = Config::parse(&made.text, "new").expect("it fits");
    assert_eq!(config.proxmox.endpoints, ["https://10.0.0.1:8007", "https://pve2:8007"]);
    assert_eq!((config.proxmox.token_id.as_str(), made.secret.as_deref()), ("root@pam!ci", Some("12345-secret")));
    assert!(!made.text.contains("secret") && !notes.join("").contains("secret\""), "{}", made.text);
    assert_eq!((config.runtime.default_handler.as_str(), config.log.level.as_str()), ("proxmox-lxc", "warn"));
    assert_eq!((config.images.driver, config.images.zfs.dataset.as_str()), (LayerDriver::Zfs, "tank/x"));
    assert_eq!(config.handlers.proxmox_lxc.storage, "fast");
    let network = &config.handlers.proxmox_lxc.network;
    assert_eq!((network.bridge.as_str(), network.vlan, network.address.as_str()), ("vmbr1", Some(7), "dhcp"));
    let router = Router::new(&config.routing).expect("rules");
    let none = Default::default();
    let of = |name: &str| router.handler(("default", name), &none, &none);
    assert_eq!((of("kube-proxy"), of("db.1"), of("dbx1")), (Some("crun"), Some("crun"), None));
    // Each key of the old file is in the report.
    for key in
        ["proxmox.pct_path", "zfs.snapshot_retention.max_snapshots", "resources.memory", "wishes", "security.seccomp"]
    {
        assert!(notes.iter().any(|n| n.starts_with(&format!("dropped  {key}: "))), "{key}\n{}", notes.join("\n"));
    }
}

/// Every key that the legacy program had, in any of its versions, with a value that it took.
const LEGACY: &[(&str, &str)] = &[
    ("proxmox.hosts", "[\"10.0.0.1\"]"),
    ("proxmox.port", "8006"),
    ("proxmox.token", "\"root@pam!ci=secret\""),
    ("proxmox.node", "\"pve1\""),
    ("proxmox.node_cache_duration", "60"),
    ("proxmox.verify_ssl", "true"),
    ("proxmox.timeout", "20"),
    ("proxmox.pct_path", "\"/usr/sbin/pct\""),
    ("proxmox.storage", "\"fast\""),
    ("proxmox.rootfs_size_gb", "8"),
    ("proxmox.ostype", "\"debian\""),
    ("proxmox.unprivileged", "true"),
    ("runtime.root_path", "\"/srv/x\""),
    ("runtime.root", "\"/srv/x\""),
    ("data_dir", "\"/srv/x\""),
    ("cache_dir", "\"/c\""),
    ("temp_dir", "\"/t\""),
    ("runtime.log_level", "\"debug\""),
    ("log_level", "\"debug\""),
    ("runtime.log_path", "\"/l\""),
    ("log_path", "\"/l\""),
    ("log_file", "\"/l\""),
    ("log_format", "\"json\""),
    ("runtime.systemd_cgroup", "true"),
    ("runtime.routing", "[{\"pattern\": \"a\", \"runtime\": \"crun\"}]"),
    ("container_config.routing", "[{\"pattern\": \"a\", \"runtime\": \"crun\"}]"),
    ("container_config.crun_name_patterns", "[\"a*\"]"),
    ("container_config.default_container_type", "\"crun\""),
    ("container_config.default_runtime", "\"crun\""),
    ("runtime_type", "\"crun\""),
    ("default_runtime", "\"crun\""),
    ("storage.zfs_dataset", "\"tank/x\""),
    ("storage.image_path", "\"/i\""),
    ("zfs.base_dataset", "\"tank/x\""),
    ("zfs.enabled", "false"),
    ("zfs.auto_detect", "true"),
    ("zfs.compression", "\"lz4\""),
    ("zfs.deduplication", "false"),
    ("zfs.snapshot_retention.max_snapshots", "3"),
    ("zfs.snapshot_retention.retention_days", "3"),
    ("zfs.snapshot_retention.auto_cleanup", "true"),
    ("network.bridge", "\"vmbr1\""),
    ("networking.bridge", "\"vmbr1\""),
    ("networking.vlan_aware", "true"),
    ("network.vlan_aware", "true"),
    ("network.mtu", "1500"),
    ("network.tag", "7"),
    ("network.name", "\"eth0\""),
    ("network.type", "\"veth\""),
    ("network.ip", "\"10.0.0.2/24\""),
    ("network.gw", "\"10.0.0.1\""),
    ("network.gateway", "\"10.0.0.1\""),
    ("network.rate", "10"),
    ("network.dns_servers", "[\"1.1.1.1\"]"),
    ("networking.dns_servers", "[\"1.1.1.1\"]"),
    ("security.seccomp", "true"),
    ("security.apparmor", "true"),
    ("security.no_new_privileges", "true"),
    ("security.read_only", "true"),
    ("security.readonly_rootfs", "true"),
    ("resources.memory", "5"),
    ("resources.cpu", "5"),
    ("resources.disk", "5"),
    ("resources.network_bandwidth", "5"),
    ("profiles.strict.capabilities.drop", "[\"ALL\"]"),
];

#[test]
fn every_key_of_the_legacy_program_has_its_own_fate() {
    for (key, value) in LEGACY {
        let mut json = (*value).to_owned();
        for part in key.rsplit('.') {
            json = format!("{{\"{part}\": {json}}}");
        }
        let made = legacy::migrate(&json).expect(&json);
        let note = made.notes.iter().find(|n| n.key == *key).unwrap_or_else(|| panic!("{key}: {:?}", made.notes));
        assert!(!note.to_string().contains("no such key was ever read"), "{key}: {note}");
    }
}

#[test]
fn what_somebody_has_to_decide_is_said() {
    for (old, key) in [
        (r#"{"proxmox": {"verify_ssl": false}}"#, "proxmox.verify_ssl"),
        (r#"{"proxmox": {"token": "abc"}}"#, "proxmox.token"),
        (r#"{"security": {"apparmor": false}}"#, "security.apparmor"),
        (r#"{"zfs": {"enabled": true}}"#, "zfs.enabled"),
        (r#"{"zfs": {"deduplication": true}}"#, "zfs.deduplication"),
        (r#"{"default_runtime": "qemu"}"#, "default_runtime"),
        (r#"{"default_runtime": "crun", "runtime_type": "lxc"}"#, "runtime_type"),
        (r#"{"runtime": {"routing": [{"pattern": "a"}]}}"#, "runtime.routing"),
        (r#"{"log_level": 3}"#, "log_level"),
        (r#"{"data_dir": "relative"}"#, "(the whole)"),
        (r#"{"proxmox": {"hosts": ["h"]}}"#, "(the whole)"),
    ] {
        let made = legacy::migrate(old).expect(old);
        let found = made.notes.iter().any(|n| n.key == key && matches!(n.fate, legacy::Fate::Decide(_)));
        assert!(found, "{old}: {:?}", made.notes);
    }
    for bad in ["", "[]", "{", "7"] {
        assert!(legacy::migrate(bad).is_err(), "{bad}");
    }
}

proptest::proptest! {
    #[test]
    fn no_old_file_panics(keys in proptest::collection::vec(("[a-z_.]{1,12}", "[a-z*?(\\[]{0,6}"), 0..6), known in 0usize..9) {
        let table = ["proxmox", "runtime", "zfs", "network", "security", "container_config", "storage", "resources", "profiles"][known];
        let inner: serde_json::Map<_, _> = keys.into_iter().map(|(k, v)| (k, serde_json::Value::String(v))).collect();
        let _ = legacy::migrate(&serde_json::json!({ table: inner }).to_string());
    }
}

#[test]
fn the_default_file_is_the_default_and_names_every_key() {
    let text = config::default_text();
    assert_eq!(Config::parse(&text, "default").expect("our own text"), Config::default(), "{text}");
    for key in own_keys() {
        let line =
            |l: &str| l.trim_start_matches('#').starts_with(&format!("{} =", key.path.rsplit('.').next().unwrap()));
        assert!(text.lines().any(line), "{}", key.path);
    }
}

#[test]
fn what_is_dumped_is_read_to_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = camino::Utf8Path::from_path(folder.path()).expect("UTF-8");
    std::fs::write(folder.join("c.toml"), "[log]\nlevel = \"debug\"\n[images.proxies]\n\"*.x\" = \"direct\"\n")
        .expect("a file");
    let sources = Sources {
        file: folder.join("c.toml"),
        required: true,
        folder: None,
        environment: Vec::new(),
        set: vec!["runtime.pids_limit=7".into()],
    };
    let loaded = sources.load().expect("fits");
    let entries = config::dump(&loaded);
    let text = Entry::file(&entries);
    assert_eq!(Config::parse(&text, "dump").expect("our own text"), loaded.config, "{text}");
    let origin = |key: &str| entries.iter().find(|e| e.key == key).expect(key).origin.clone();
    assert_eq!(origin("log.level"), format!("{folder}/c.toml:2"));
    assert_eq!(origin("images.proxies"), format!("{folder}/c.toml:4"));
    assert_eq!((origin("runtime.pids_limit"), origin("log.format")), ("--config-set".into(), "default".into()));
    let mut other = loaded.config.clone();
    other.log.level = "info".into();
    other.images.proxies.clear();
    assert_eq!(config::differences(&loaded.config, &other), ["images.proxies", "log.level"]);
}

#[test]
fn the_reference_in_the_documents_is_this() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
    let text = std::fs::read_to_string(path).expect("docs/configuration.md");
    assert!(text == config::reference(), "docs/configuration.md: proxmox-lxcri config reference > {path}");
}

#[test]
fn every_key_is_documented_and_in_the_schema() {
    let keys = all_keys();
    assert!(keys.len() > 80, "{}", keys.len());
    for key in keys {
        assert!(key.about.len() > 5, "{} says nothing of itself", key.path);
        assert!(!key.kind.is_empty(), "{}", key.path);
    }
    // All that the program writes is a key that it knows.
    let text = config::schema().to_string();
    let mut open = vec![(String::new(), serde_json::to_value(Config::default()).expect("JSON"))];
    while let Some((path, value)) = open.pop() {
        let Some(map) = value.as_object().filter(|m| !m.is_empty() || path.is_empty()) else {
            assert!(keys.iter().any(|k| k.path == path), "{path} is no key");
            continue;
        };
        for (name, value) in map {
            assert!(text.contains(&format!("\"{name}\"")), "{name} is not in the schema");
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            open.push((path, value.clone()));
        }
    }
}

#[test]
fn what_is_written_is_taken_to_be_the_same() {
    let rule = "[[routing]]\nmatch = { labels = { \"a.b/c\" = \"x|y\" }, name = \"z\" }\nhandler = \"lxc\"\n";
    for text in ["", rule, "[images.proxies]\n\"*.x\" = \"direct\"\n[server.stream]\nidle_timeout = \"1h30m\"\n"] {
        let config = Config::parse(text, "c.toml").expect(text);
        let written = toml::to_string(&config).expect("TOML");
        assert_eq!(Config::parse(&written, "again").expect(&written), config, "{written}");
    }
}
