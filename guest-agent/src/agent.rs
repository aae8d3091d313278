//! The agent's loop: accepts nodes and lets each connection do what it can.
//!
//! Called by `main`. Ends only when it can't begin. A connection that has proved who it is ends those before it: a node that connects
//! again has given the old one up, whatever the guest knows of that.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::keeper::Keeper;
use crate::session::Session;
use crate::settings::Settings;
use crate::{logs, monitor, roots};

/// Connections that have proved nothing yet.
const STRANGERS: usize = 4;
/// A node that says nothing for so long is asked, and after `PROBES` such times without an answer it is gone.
const SILENCE: Duration = Duration::from_secs(20);
const PROBES: u32 = 3;
/// The longest sleep: monitors that have ended are reaped then, if nothing happens.
const SLEEP: Duration = Duration::from_secs(60);

/// Serves for ever.
pub fn run(settings: Settings) -> Result<(), String> {
    let made = |path: &std::path::Path| {
        std::fs::create_dir_all(path)
            .and_then(|()| std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700)))
            .map_err(|e| format!("{}: {e}", path.display()))
    };
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    made(&settings.run_dir)?;
    made(&settings.data_dir)?;
    roots::prepare(&settings).and_then(|()| logs::prepare(&settings)).map_err(|e| e.to_string())?;
    let listener = listen(&settings).map_err(|e| format!("listen at {}: {e}", settings.listen))?;
    let mut sessions: Vec<Session> = Vec::new();
    let mut keeper = Keeper::default();
    loop {
        wait(&listener, &keeper, &mut sessions).map_err(|e| format!("poll: {e}"))?;
        monitor::reap();
        // Before anybody else finds the monitor gone.
        if let Err(e) = keeper.step(&settings) {
            say(&format!("what outlives the monitor: {e}"));
        }
        accept(&settings, &listener, &mut sessions);
        let mut newest = None;
        let mut at = 0;
        while at < sessions.len() {
            let was_up = sessions[at].is_up();
            match sessions[at].step(&settings, &mut keeper) {
                Ok(()) if sessions[at].deadline().is_some_and(|end| end <= Instant::now()) => {
                    say("a connection that proved nothing in its time");
                    sessions.remove(at);
                }
                Ok(()) => {
                    if !was_up && sessions[at].is_up() {
                        newest = Some(at);
                    }
                    at += 1;
                }
                Err(end) => {
                    say(&format!("a connection is over: {end}"));
                    sessions.remove(at);
                }
            }
        }
        if let Err(e) = keeper.refresh(&settings) {
            say(&format!("what outlives the monitor: {e}"));
        }
        if let Some(newest) = newest {
            let mut at = 0;
            sessions.retain(|session| {
                at += 1;
                at - 1 == newest || !session.is_up()
            });
        }
    }
}

fn listen(settings: &Settings) -> rustix::io::Result<OwnedFd> {
    let family = if settings.listen.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&listener, true)?;
    rustix::net::bind(&listener, &settings.listen)?;
    rustix::net::listen(&listener, 8)?;
    Ok(listener)
}

fn wait(listener: &OwnedFd, keeper: &Keeper, sessions: &mut [Session]) -> rustix::io::Result<()> {
    let now = Instant::now();
    let deadline = sessions.iter().filter_map(Session::deadline).min();
    let time = deadline.map_or(SLEEP, |at| at.saturating_duration_since(now).min(SLEEP)) + Duration::from_millis(1);
    let timeout = rustix::time::Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
    let mut wanted: Vec<(BorrowedFd<'_>, PollFlags)> = vec![(listener.as_fd(), PollFlags::IN)];
    wanted.extend(keeper.fd().map(|fd| (fd, PollFlags::IN)));
    sessions.iter_mut().for_each(|session| session.interest(&mut wanted));
    let mut fds: Vec<PollFd<'_>> = wanted.into_iter().map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)).collect();
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(e) => Err(e),
    }
}

fn accept(settings: &Settings, listener: &OwnedFd, sessions: &mut Vec<Session>) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    while let Ok(socket) = rustix::net::accept_with(listener, flags) {
        if sessions.iter().filter(|session| !session.is_up()).count() >= STRANGERS {
            say("too many connections that have proved nothing");
            continue;
        }
        let session = keep_alive(&socket).map_err(|e| e.to_string());
        let session = session.and_then(|()| settings.read_secret()).and_then(|secret| Session::new(socket, &secret));
        match session {
            Ok(session) => sessions.push(session),
            Err(message) => say(&format!("a connection is refused: {message}")),
        }
    }
}

/// A node that is gone without a word is found out.
fn keep_alive(socket: &OwnedFd) -> rustix::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, SILENCE)?;
    sockopt::set_tcp_keepintvl(socket, SILENCE)?;
    sockopt::set_tcp_keepcnt(socket, PROBES)?;
    sockopt::set_tcp_user_timeout(socket, SILENCE.as_millis() as u32 * PROBES)
}

/// For the guest's console.
fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "proxmox-lxcri-guest-agent: {message}");
}
