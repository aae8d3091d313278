//! Connections with ports of a pod, for port-forward.
//!
//! The socket is made inside the pod's network namespace and keeps it; a pod on the node's network needs no entering.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::core::blocking::blocking;
use crate::core::error::{Error, Kind, Result};
use crate::core::records::PodRecord;
use crate::integrations::netns;

/// A port of the loopback interface answers at once or not at all.
const PATIENCE: Duration = Duration::from_secs(10);

/// 127.0.0.1, then ::1 when nobody listens there.
pub(in crate::backends) async fn dial(pod: &PodRecord, port: u16) -> Result<TcpStream> {
    let facts = pod.facts.as_ref().ok_or_else(|| Error::precondition(format!("pod {} is not made yet", pod.id)))?;
    let connected = match &facts.netns {
        Some(path) => netns::in_netns(path, move || connect(port)).await?,
        None => blocking(move || Ok(connect(port))).await?,
    };
    connected.map_err(|e| {
        let kind = match e.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut => Kind::Unavailable,
            _ => Kind::Internal,
        };
        Error::because(kind, format!("connect with port {port} in pod {}", pod.id), e)
    })
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let to = |address: IpAddr| TcpStream::connect_timeout(&SocketAddr::new(address, port), PATIENCE);
    to(Ipv4Addr::LOCALHOST.into()).or_else(|first| to(Ipv6Addr::LOCALHOST.into()).map_err(|_| first))
}
