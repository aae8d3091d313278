//! Who may what: users, tokens, tickets, roles on paths, as the real API resolves them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::http::{Answer, Call, Failure};
use super::state::{Server, State};
use super::{SECRET, TOKEN};

/// A role's privileges on a path, for a user or token.
#[derive(Debug, Clone)]
pub struct Acl {
    pub path: String,
    pub who: String,
    pub privileges: BTreeSet<String>,
}

/// Users and what they may.
pub struct Access {
    pub tokens: BTreeMap<String, String>,
    pub passwords: BTreeMap<String, String>,
    pub acls: Vec<Acl>,
    /// Privileges that nobody but root has for now.
    pub taken: BTreeSet<String>,
    tickets: BTreeMap<String, (String, String)>,
}

/// Stands in for Proxmox's own program while deploy/proxmox/role.sh runs: notes what it is told, a call a line and a word a field.
const PVEUM: &str = r#"#!/bin/bash
(IFS=$'\t'; echo "$*") >> "$(dirname "$0")/said"
case "$*" in
"user token add "*) echo "{\"full-tokenid\":\"$4!$5\",\"info\":{\"privsep\":\"1\"},\"value\":\"SECRET\"}" ;;
"role list "*) echo '[{"roleid":"Administrator","privs":"VM.GuestAgent.Audit,VM.GuestAgent.Unrestricted"}]' ;;
*" list "*) echo '[]' ;;
esac
"#;

/// Has deploy/proxmox/role.sh make role, user, pool and token, whose secret it writes into `folder`/token; gives what it
/// granted.
fn granted(folder: &Path) -> Vec<Acl> {
    use std::os::unix::fs::PermissionsExt;
    let programs = folder.join("role");
    std::fs::create_dir_all(&programs).expect("a folder");
    for (name, text) in [("pveum", PVEUM.replace("SECRET", SECRET)), ("hostname", "#!/bin/sh\necho node1\n".into())] {
        let file = programs.join(name);
        std::fs::write(&file, text).expect("a program");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("mode");
    }
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/proxmox/role.sh");
    let mut command = Command::new("bash");
    command.args([
        script,
        "--pool",
        "k8s",
        "--storage",
        "local",
        "--bridge",
        "vmbr0",
        "--bridge",
        "zone1/pods",
        "--file",
    ]);
    let out = command.arg(folder.join("token")).env("PATH", path).output().expect("role.sh");
    assert!(out.status.success(), "role.sh: {}", String::from_utf8_lossy(&out.stderr));
    let told = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(told.contains(&format!("token_id = \"{TOKEN}\"")), "{told}");
    let said = std::fs::read_to_string(programs.join("said")).expect("what it said");
    let mut privileges = BTreeSet::new();
    let mut acls = Vec::new();
    for line in said.lines() {
        match line.split('\t').collect::<Vec<_>>().as_slice() {
            ["role", "add", "lxcri", "--privs", list] => {
                privileges = list.split(' ').filter(|p| !p.is_empty()).map(String::from).collect();
            }
            ["acl", "modify", path, "--users" | "--tokens", who, "--roles", "lxcri"] => {
                acls.push(Acl { path: (*path).into(), who: (*who).into(), privileges: privileges.clone() });
            }
            _ => {}
        }
    }
    assert!(!privileges.is_empty() && acls.len() == 8, "{said}");
    acls
}

impl Access {
    pub fn usual(folder: &Path) -> Self {
        let mut acls = granted(folder);
        acls.push(Acl { path: "/".into(), who: "root@pam".into(), privileges: ["*".to_owned()].into() });
        Self {
            tokens: [(TOKEN.to_owned(), SECRET.to_owned())].into(),
            passwords: [("root@pam".to_owned(), "hunter22".to_owned())].into(),
            taken: BTreeSet::new(),
            acls,
            tickets: BTreeMap::new(),
        }
    }

    /// All tickets have run out.
    pub fn expire(&mut self) {
        self.tickets.clear();
    }

    /// A token has what both it and its user have.
    pub fn privileges(&self, who: &str, path: &str) -> BTreeSet<String> {
        let mut found = self.granted(who, path);
        if let Some((user, _)) = who.split_once('!') {
            let users = self.granted(user, path);
            found.retain(|p| users.contains("*") || users.contains(p));
        }
        found.retain(|p| !self.taken.contains(p));
        found
    }

    fn granted(&self, who: &str, path: &str) -> BTreeSet<String> {
        let above = |acl: &&Acl| acl.path == "/" || path == acl.path || path.starts_with(&format!("{}/", acl.path));
        // The nearest path counts alone.
        let fits: Vec<_> = self.acls.iter().filter(|a| a.who == who).filter(above).collect();
        let nearest = fits.iter().map(|a| a.path.len()).max();
        fits.iter().filter(|a| Some(a.path.len()) == nearest).flat_map(|a| a.privileges.clone()).collect()
    }
}

impl State {
    /// Whether `who` has `privilege` on `path`; a guest's pool counts, too.
    pub fn may(&self, who: &str, path: &str, privilege: &str) -> bool {
        let has = |path: &str| {
            let found = self.access.privileges(who, path);
            found.contains("*") || found.contains(privilege)
        };
        let guest = path.strip_prefix("/vms/").and_then(|id| self.guests.get(&id.parse().ok()?));
        // A guest is put into its pool when it is made.
        let pool = guest.filter(|g| !g.half).map(|g| g.pool.clone());
        has(path) || pool.is_some_and(|p| !p.is_empty() && has(&format!("/pool/{p}")))
    }

    /// The same as the API's refusal.
    pub fn need(&self, who: &str, path: &str, privilege: &str) -> Result<(), Failure> {
        if self.may(who, path, privilege) {
            return Ok(());
        }
        Err(Failure::new(403, format!("Permission check failed ({path}, {privilege})")))
    }
}

impl Server {
    /// Who asks; 401 otherwise.
    pub fn who(&self, authorization: &str, cookie: &str, csrf: &str, call: &Call) -> Result<String, Failure> {
        if call.path == "/access/ticket" && call.method == "POST" {
            return Ok(String::new());
        }
        let state = self.lock();
        if let Some(token) = authorization.strip_prefix("PVEAPIToken=") {
            let (id, secret) = token.split_once('=').unwrap_or((token, ""));
            let known = state.access.tokens.get(id).is_some_and(|s| s == secret);
            return known.then(|| id.to_owned()).ok_or_else(|| Failure::new(401, "invalid token value!"));
        }
        let Some(ticket) = cookie.strip_prefix("PVEAuthCookie=") else { return Err(Failure::new(401, "No ticket")) };
        let Some((user, right)) = state.access.tickets.get(&super::http::decode(ticket)) else {
            return Err(Failure::new(401, "permission denied - invalid PVE ticket"));
        };
        if call.method != "GET" && csrf != right {
            return Err(Failure::new(401, "Permission denied - invalid csrf token"));
        }
        Ok(user.clone())
    }

    /// POST /access/ticket.
    pub fn new_ticket(&self, call: &Call) -> Answer {
        let get = |name: &str| call.params.get(name).cloned().unwrap_or_default();
        let (user, password) = (get("username"), get("password"));
        let serial = self.next();
        let mut state = self.lock();
        let by_ticket = state.access.tickets.get(&password).is_some_and(|(u, _)| *u == user);
        if !by_ticket && state.access.passwords.get(&user) != Some(&password) {
            return Err(Failure::new(401, "authentication failure"));
        }
        let ticket = format!("PVE:{user}:{serial:08X}::c2lnbmF0dXJl+/{serial}==");
        let csrf = format!("{serial:08X}:csrf+{serial}");
        state.access.tickets.insert(ticket.clone(), (user.clone(), csrf.clone()));
        Ok(json!({ "username": user, "ticket": ticket, "CSRFPreventionToken": csrf, "cap": {} }))
    }

    /// GET /access/permissions.
    pub fn permissions(&self, call: &Call) -> Answer {
        let state = self.lock();
        let asked = call.params.get("path").cloned();
        let paths = asked.map_or_else(|| state.access.acls.iter().map(|a| a.path.clone()).collect(), |p| vec![p]);
        let all = paths.into_iter().map(|path| {
            let found = state.access.privileges(&call.user, &path);
            (path, found.into_iter().map(|p| (p, json!(1))).collect::<serde_json::Map<_, _>>().into())
        });
        Ok(Value::Object(all.collect()))
    }
}
