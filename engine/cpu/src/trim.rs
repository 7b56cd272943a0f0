//! Gives memory back that loading has freed.
//!
//! The C library keeps what is freed for the next allocation. After loading there is none, and what was kept (a few
//! percent of the weights) would stand beside the memory plan for as long as the engine runs.

/// Returns free pages to the system, where the C library can.
#[allow(unsafe_code)]
pub(crate) fn return_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it may be called at any time from any thread; it touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
