//! Waiting for several sockets at once.

#![allow(unsafe_code)]

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Sockets to wait for; keeps its memory.
#[derive(Debug, Default)]
pub(crate) struct Poll(Vec<libc::pollfd>);

impl Poll {
    /// Waits for nothing.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Waits for a socket too.
    pub fn add(&mut self, stream: &TcpStream, reads: bool, writes: bool) {
        let wanted = |is_wanted: bool, event| if is_wanted { event } else { 0 };
        self.0.push(libc::pollfd {
            fd: stream.as_raw_fd(),
            events: wanted(reads, libc::POLLIN) | wanted(writes, libc::POLLOUT),
            revents: 0,
        });
    }

    /// Whether something happened to one of them before the time was over. May return early.
    pub fn wait(&mut self, patience: Duration) -> io::Result<bool> {
        // Rounded up: waiting for nothing would spin.
        let milliseconds = patience.as_millis().saturating_add(1);
        let milliseconds = i32::try_from(milliseconds).unwrap_or(i32::MAX);
        let count = self.0.len() as libc::nfds_t;
        // SAFETY: as many entries as said, which nobody else touches.
        let found = unsafe { libc::poll(self.0.as_mut_ptr(), count, milliseconds) };
        match found {
            0 => Ok(false),
            1.. => Ok(true),
            _ => {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::Interrupted => Ok(true),
                    _ => Err(error),
                }
            }
        }
    }
}
