//! Exec, Attach and PortForward: what is asked for is checked, then the caller gets a URL of the streaming server.

use tonic::Status;

use crate::api::v1;
use crate::core::engine::Wanted;
use crate::core::error::{Error, Result};
use crate::cri::Front;
use crate::cri::streaming::token::Request;

/// Most ports of one request.
const MAX_PORTS: usize = 100;

impl Front {
    pub(super) fn exec_url(&self, request: v1::ExecRequest) -> Result<String, Status> {
        let v1::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request;
        let wanted = wanted("exec", tty, stdin, stdout, stderr)?;
        if cmd.is_empty() {
            return Err(Error::invalid("exec: cmd is missing").into());
        }
        let container = self.engine.reachable(self.scope, &container_id)?.id.to_string();
        Ok(self.streaming.url(Request::Exec { scope: self.scope, container, command: cmd, wanted })?)
    }

    pub(super) fn attach_url(&self, request: v1::AttachRequest) -> Result<String, Status> {
        let v1::AttachRequest { container_id, tty, stdin, stdout, stderr } = request;
        let wanted = wanted("attach", tty, stdin, stdout, stderr)?;
        let container = self.engine.attachable(self.scope, &container_id, wanted)?.id.to_string();
        Ok(self.streaming.url(Request::Attach { scope: self.scope, container, wanted })?)
    }

    pub(super) fn port_forward_url(&self, request: v1::PortForwardRequest) -> Result<String, Status> {
        let v1::PortForwardRequest { pod_sandbox_id, port } = request;
        if port.len() > MAX_PORTS {
            return Err(Error::invalid(format!("port: more than {MAX_PORTS}")).into());
        }
        let parse = |p: i32| u16::try_from(p).ok().filter(|p| *p > 0);
        let parse = |p: i32| parse(p).ok_or_else(|| Error::invalid(format!("port: {p} is not a port")));
        let ports = port.into_iter().map(parse).collect::<Result<_>>()?;
        let pod = self.engine.ready_pod(self.scope, &pod_sandbox_id)?.id.to_string();
        Ok(self.streaming.url(Request::PortForward { scope: self.scope, pod, ports })?)
    }
}

fn wanted(what: &str, tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<Wanted> {
    if tty && stderr {
        return Err(Error::invalid(format!("{what}: tty and stderr can't go together: a terminal has one output")));
    }
    if !(stdin || stdout || stderr) {
        return Err(Error::invalid(format!("{what}: one of stdin, stdout and stderr must be set")));
    }
    Ok(Wanted { tty, stdin, stdout, stderr })
}
