//! What happens when a mapped weight file cannot be read any more.
//!
//! The kernel then sends SIGBUS to whoever touches a page of it, in the middle of loading or of a step. Nothing can go on:
//! the process ends at once, so that its kubelet starts another, and says why. Without this it would end as well, silently.

#![allow(unsafe_code)]

/// Exit status of sysexits.h for an error of input or output.
const EX_IOERR: libc::c_int = 74;

const MESSAGE: &[u8] = b"error: a weight file could not be read where it is mapped (SIGBUS): it was truncated or replaced \
in place while it was served, or its disk failed. Put files in place with a rename, and look at the node's disk\n";

/// Only what a signal handler may call.
extern "C" fn end(_: libc::c_int) {
    // SAFETY: both are safe in a signal handler; the message lives as long as the process.
    unsafe {
        libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
        libc::_exit(EX_IOERR);
    }
}

/// Lets the process end with a message when a mapped file fails.
pub fn watch() {
    let handler: extern "C" fn(libc::c_int) = end;
    // SAFETY: the handler calls only what a handler may; nothing else in this process handles SIGBUS.
    unsafe {
        libc::signal(libc::SIGBUS, handler as libc::sighandler_t);
    }
}
