//! liblxc, loaded at run time: the few calls that are needed, from versions 5 to 7.
//!
//! `struct lxc_container` is public and only ever grew at its end, as did the attach options; what is used here is the same
//! in all of those versions. Other versions are refused by name. Used by the verbs of the helper; one thread.
#![allow(unsafe_code)] // a C library

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint, c_void};
use std::ptr::null;

/// Versions that were tried.
const MAJORS: std::ops::RangeInclusive<u32> = 5..=7;

/// From this version on liblxc knows no cgroup v1.
const WITHOUT_V1: u32 = 7;
/// Longest value that is asked for, in bytes: a path and its kind.
const VALUE_MAX: usize = 8192;
/// So many characters of a value are in an error.
const TOLD_MAX: usize = 100;
const CGROUPS: &str = "/sys/fs/cgroup";

/// `struct lxc_container`, as far as it is used. Functions that are not are pointers.
#[repr(C)]
struct RawContainer {
    names: [*mut c_char; 3],
    locks: [*mut c_void; 2],
    numthreads: c_int,
    lxc_conf: *mut c_void,
    error_string: *mut c_char,
    error_num: c_int,
    daemonize: bool,
    config_path: *mut c_char,
    is_defined: unsafe extern "C" fn(*mut Self) -> bool,
    state: unsafe extern "C" fn(*mut Self) -> *const c_char,
    is_running: unsafe extern "C" fn(*mut Self) -> bool,
    freezers: [*const c_void; 2],
    init_pid: unsafe extern "C" fn(*mut Self) -> c_int,
    load_config: unsafe extern "C" fn(*mut Self, *const c_char) -> bool,
    start: unsafe extern "C" fn(*mut Self, c_int, *const *const c_char) -> bool,
    startl: *const c_void,
    stop: unsafe extern "C" fn(*mut Self) -> bool,
    want_daemonize: unsafe extern "C" fn(*mut Self, bool) -> bool,
    want_close_all_fds: unsafe extern "C" fn(*mut Self, bool) -> bool,
    files: [*const c_void; 2],
    set_config_item: unsafe extern "C" fn(*mut Self, *const c_char, *const c_char) -> bool,
    destroy: unsafe extern "C" fn(*mut Self) -> bool,
    save_config: unsafe extern "C" fn(*mut Self, *const c_char) -> bool,
    create: CreateFunction<Self>,
    changes: [*const c_void; 3],
    shutdown: unsafe extern "C" fn(*mut Self, c_int) -> bool,
    clear: [*const c_void; 2],
    get_config_item: unsafe extern "C" fn(*mut Self, *const c_char, *mut c_char, c_int) -> c_int,
    unused: [*const c_void; 11],
    attach: unsafe extern "C" fn(*mut Self, ExecFunction, *mut c_void, *mut AttachOptions, *mut c_int) -> c_int,
}

/// Template, storage (kind, options), flags, the template's arguments.
type CreateFunction<C> =
    unsafe extern "C" fn(*mut C, *const c_char, *const c_char, *mut c_void, c_int, *const *const c_char) -> bool;

/// What runs inside.
pub type ExecFunction = unsafe extern "C" fn(*mut c_void) -> c_int;

/// `lxc_attach_options_t`, with room for what later versions add.
#[repr(C)]
struct AttachOptions {
    attach_flags: c_int,
    namespaces: c_int,
    personality: c_long,
    initial_cwd: *const c_char,
    uid: c_uint,
    gid: c_uint,
    env_policy: c_int,
    extra_env_vars: *const c_void,
    extra_keep_env: *const c_void,
    stdin_fd: c_int,
    stdout_fd: c_int,
    stderr_fd: c_int,
    log_fd: c_int,
    more: [*const c_void; 8],
}

/// Keep the personality of the container.
const SET_PERSONALITY: c_int = 4;
/// Without it liblxc leaves the seccomp profile away, too.
const LSM_EXEC: c_int = 8;
const DETECT_PERSONALITY: c_long = 0xffff_ffff;
const CLEAR_ENV: c_int = 1;
/// What `lxc-attach` does: the container's groups, capabilities, personality and profiles.
const AS_ITS_TOOL: c_int = 0xffff;

/// `struct lxc_log`.
#[repr(C)]
struct Log {
    name: *const c_char,
    lxcpath: *const c_char,
    file: *const c_char,
    level: *const c_char,
    prefix: *const c_char,
    quiet: bool,
}

/// The library.
pub struct Library {
    handle: *mut c_void,
    version: String,
}

/// A container of it.
pub struct Container(*mut RawContainer);

fn text(value: &str) -> Result<CString, String> {
    CString::new(value).map_err(|_| format!("{value:?}: a NUL is in it"))
}

fn has_v2() -> bool {
    rustix::fs::statfs(CGROUPS).is_ok_and(|f| f.f_type == libc::CGROUP2_SUPER_MAGIC)
}

impl Library {
    /// Loads it; "" searches as the loader does.
    pub fn load(path: &str) -> Result<Self, String> {
        let name = text(if path.is_empty() { "liblxc.so.1" } else { path })?;
        // SAFETY: a path; what the library does when it is loaded is what every program that is linked with it gets.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        if handle.is_null() {
            // SAFETY: after a failure there is a text.
            let why = unsafe { CStr::from_ptr(libc::dlerror()) };
            return Err(format!("liblxc can't be loaded: {}", why.to_string_lossy()));
        }
        let mut library = Self { handle, version: String::new() };
        let version = library.symbol(c"lxc_get_version")?;
        // SAFETY: const char *lxc_get_version(void), a text that stays.
        let version = unsafe {
            let version: unsafe extern "C" fn() -> *const c_char = std::mem::transmute(version);
            CStr::from_ptr(version())
        };
        library.version = version.to_string_lossy().into_owned();
        let major = library.version.split('.').next().and_then(|m| m.parse::<u32>().ok());
        match major.filter(|m| MAJORS.contains(m)) {
            Some(m) if m >= WITHOUT_V1 && !has_v2() => Err(format!(
                "liblxc {} works with cgroup v2 alone, and {CGROUPS} of this node is not that: liblxc 5 and 6 do",
                library.version
            )),
            Some(_) => Ok(library),
            None => {
                Err(format!("liblxc {}: versions {} to {} are known", library.version, MAJORS.start(), MAJORS.end()))
            }
        }
    }

    /// "6.0.4".
    pub fn version(&self) -> &str {
        &self.version
    }

    fn symbol(&self, name: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: the handle is open.
        let found = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        if found.is_null() {
            Err(format!("liblxc {} has no {}", self.version, name.to_string_lossy()))
        } else {
            Ok(found)
        }
    }

    /// Its own messages, errors, go to that file and nowhere else.
    pub fn log_to(&self, file: &str, name: &str, lxcpath: &str) -> Result<(), String> {
        let (file, name, lxcpath) = (text(file)?, text(name)?, text(lxcpath)?);
        let log = Log {
            name: name.as_ptr(),
            lxcpath: lxcpath.as_ptr(),
            file: if file.is_empty() { null() } else { file.as_ptr() },
            level: c"ERROR".as_ptr(),
            prefix: c"lxc".as_ptr(),
            quiet: true,
        };
        let call = self.symbol(c"lxc_log_init")?;
        // SAFETY: int lxc_log_init(struct lxc_log *), which copies what it keeps.
        let done = unsafe {
            let call: unsafe extern "C" fn(*const Log) -> c_int = std::mem::transmute(call);
            call(&raw const log)
        };
        if done == 0 { Ok(()) } else { Err("liblxc's log can't be opened".into()) }
    }

    /// The container of that name, with its configuration.
    pub fn container(&self, name: &str, lxcpath: &str) -> Result<Container, String> {
        let container = self.container_or_none(name, lxcpath)?;
        if !container.is_defined() {
            return Err(format!("container {name}: there is none below {lxcpath}"));
        }
        Ok(container)
    }

    /// The same of a name that may have no container yet.
    pub fn container_or_none(&self, name: &str, lxcpath: &str) -> Result<Container, String> {
        let (name_, path) = (text(name)?, text(lxcpath)?);
        let call = self.symbol(c"lxc_container_new")?;
        // SAFETY: struct lxc_container *lxc_container_new(const char *, const char *), which copies its arguments.
        let raw = unsafe {
            let call: unsafe extern "C" fn(*const c_char, *const c_char) -> *mut RawContainer =
                std::mem::transmute(call);
            call(name_.as_ptr(), path.as_ptr())
        };
        match raw.is_null() {
            true => Err(format!("container {name} below {lxcpath}: its configuration can't be read")),
            false => Ok(Container(raw)),
        }
    }
}

impl Container {
    /// Starts it and returns when it has ended, with its wait status as liblxc tells it; false: it did not start.
    pub fn run(&self, argv: &[CString]) -> (bool, i32) {
        let pointers: Vec<*const c_char> = argv.iter().map(|a| a.as_ptr()).chain([null()]).collect();
        let argv = if argv.is_empty() { null() } else { pointers.as_ptr() };
        // SAFETY: the container is alive; the array ends with a null and outlives the call.
        unsafe {
            ((*self.0).want_daemonize)(self.0, false);
            let good = ((*self.0).start)(self.0, 0, argv);
            (good, (*self.0).error_num)
        }
    }

    /// Whether it has a configuration.
    pub fn is_defined(&self) -> bool {
        // SAFETY: the container is alive.
        unsafe { ((*self.0).is_defined)(self.0) }
    }

    /// "RUNNING", "STOPPED" and so on.
    pub fn state(&self) -> String {
        // SAFETY: the container is alive; the answer is a text that stays.
        let state = unsafe { ((*self.0).state)(self.0) };
        if state.is_null() {
            return "UNKNOWN".into();
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(state) }.to_string_lossy().into_owned()
    }

    /// Reads a configuration.
    pub fn load(&self, file: &str) -> Result<(), String> {
        let path = text(file)?;
        // SAFETY: the container is alive.
        match unsafe { ((*self.0).load_config)(self.0, path.as_ptr()) } {
            true => Ok(()),
            false => Err(format!("liblxc can't read the configuration {file}")),
        }
    }

    /// Sets a line of the configuration.
    pub fn set(&self, key: &str, value: &str) -> Result<(), String> {
        let (key_, value_) = (text(key)?, text(value)?);
        // SAFETY: the container is alive; what is kept is copied.
        match unsafe { ((*self.0).set_config_item)(self.0, key_.as_ptr(), value_.as_ptr()) } {
            true => Ok(()),
            false => {
                let (begin, more) = match value.char_indices().nth(TOLD_MAX) {
                    Some((at, _)) => (&value[..at], "..."),
                    None => (value, ""),
                };
                Err(format!("liblxc refuses {key} = {begin:?}{more}"))
            }
        }
    }

    /// What the configuration says; "" is nothing.
    pub fn get(&self, key: &str) -> Result<String, String> {
        let key_ = text(key)?;
        let mut value = vec![0u8; VALUE_MAX];
        // SAFETY: the container is alive; the library writes no more than it is told to, and a NUL at the end.
        let length = unsafe {
            ((*self.0).get_config_item)(self.0, key_.as_ptr(), value.as_mut_ptr().cast(), VALUE_MAX as c_int)
        };
        match usize::try_from(length) {
            Ok(n) if n < VALUE_MAX => Ok(String::from_utf8_lossy(&value[..n]).into_owned()),
            _ => Err(format!("liblxc does not tell {key}")),
        }
    }

    /// Writes the configuration into the container's folder.
    pub fn save(&self) -> Result<(), String> {
        // SAFETY: the container is alive.
        match unsafe { ((*self.0).save_config)(self.0, null()) } {
            true => Ok(()),
            false => Err("liblxc can't write the configuration".into()),
        }
    }

    /// Makes a root file system by a template.
    pub fn create(&self, template: &str, arguments: &[String]) -> Result<(), String> {
        let name = text(template)?;
        let arguments = arguments.iter().map(|a| text(a)).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = arguments.iter().map(|a| a.as_ptr()).chain([null()]).collect();
        let argv = pointers.as_ptr();
        // SAFETY: the container is alive; the array ends with a null and outlives the call.
        match unsafe { ((*self.0).create)(self.0, name.as_ptr(), null(), std::ptr::null_mut(), 0, argv) } {
            true => Ok(()),
            false => Err(format!("template {template} failed")),
        }
    }

    /// Starts it with its own init, which outlives this process.
    pub fn start_beside(&self) -> bool {
        // SAFETY: the container is alive.
        unsafe {
            ((*self.0).want_daemonize)(self.0, true);
            ((*self.0).want_close_all_fds)(self.0, true);
            ((*self.0).start)(self.0, 0, null())
        }
    }

    /// Asks its init to end, and waits so many seconds. What became of it, [`Container::state`] tells.
    pub fn shut_down(&self, seconds: c_int) {
        // SAFETY: the container is alive.
        unsafe { ((*self.0).shutdown)(self.0, seconds) };
    }

    /// Kills it. What became of it, [`Container::state`] tells.
    pub fn stop(&self) {
        // SAFETY: the container is alive.
        unsafe { ((*self.0).stop)(self.0) };
    }

    /// Removes it with its root file system.
    pub fn destroy(&self) -> bool {
        // SAFETY: the container is alive.
        unsafe { ((*self.0).destroy)(self.0) }
    }

    /// Runs `function` as root inside all namespaces of the container, under its seccomp profile, with this process'
    /// streams and groups. The pid of the process.
    pub fn attach(&self, function: ExecFunction, payload: *mut c_void) -> Option<i32> {
        self.attach_with(SET_PERSONALITY | LSM_EXEC, function, payload)
    }

    /// The same as `lxc-attach` does it: in the container's groups, with what capabilities it has.
    pub fn attach_as_its_tool(&self, function: ExecFunction, payload: *mut c_void) -> Option<i32> {
        self.attach_with(AS_ITS_TOOL, function, payload)
    }

    fn attach_with(&self, attach_flags: c_int, function: ExecFunction, payload: *mut c_void) -> Option<i32> {
        let mut options = AttachOptions {
            attach_flags,
            namespaces: -1,
            personality: DETECT_PERSONALITY,
            initial_cwd: null(),
            uid: 0,
            gid: 0,
            env_policy: CLEAR_ENV,
            extra_env_vars: null(),
            extra_keep_env: null(),
            stdin_fd: 0,
            stdout_fd: 1,
            stderr_fd: 2,
            log_fd: -libc::EBADF,
            more: [null(); 8],
        };
        let mut pid = 0;
        // SAFETY: the container is alive, the options are those of the version or longer, the payload is the caller's.
        let done = unsafe { ((*self.0).attach)(self.0, function, payload, &raw mut options, &raw mut pid) };
        (done == 0 && pid > 0).then_some(pid)
    }

    /// Pid of its first process; None: it does not run.
    pub fn init_pid(&self) -> Option<i32> {
        // SAFETY: the container is alive.
        Some(unsafe { ((*self.0).init_pid)(self.0) }).filter(|pid| *pid > 0)
    }
}
