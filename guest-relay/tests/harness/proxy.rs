//! A TCP proxy between relay and agent, whose connections a test cuts.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// The proxy; it listens as long as the test runs.
pub struct Proxy {
    pub address: SocketAddr,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub fn to(agent: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let open: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let all = open.clone();
        std::thread::spawn(move || {
            for from in listener.incoming().flatten() {
                let Ok(to) = TcpStream::connect(agent) else { continue };
                all.lock().unwrap().extend([from.try_clone().unwrap(), to.try_clone().unwrap()]);
                copy(from.try_clone().unwrap(), to.try_clone().unwrap());
                copy(to, from);
            }
        });
        Self { address, open }
    }

    /// Cuts all connections, whatever is under way; how many there were.
    pub fn cut(&self) -> usize {
        let all = std::mem::take(&mut *self.open.lock().unwrap());
        all.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
        all.len() / 2
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    });
}
