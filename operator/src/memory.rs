//! Gives memory that is free back to the system.
//!
//! A plan of a thousand pods and a page of a list are made of small pieces among others that stay, so glibc keeps their
//! pages: 76 MB after a thousand pods were made, of which 14 were in use. It gives whole free pages back when it is told to,
//! which takes some milliseconds; that is done after large passes and the first lists, and now and then.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Shortest time between two.
const PAUSE_MIN: Duration = Duration::from_secs(5);
/// Longest time between two.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Whether it is worth while.
#[derive(Debug, Default)]
pub struct Memory {
    used: AtomicBool,
}

impl Memory {
    /// Much was used for a short time.
    pub fn used(&self) {
        self.used.store(true, Ordering::Relaxed);
    }

    /// Whether free memory should be given back `since` the last time.
    pub fn is_due(&self, since: Duration) -> bool {
        since >= PAUSE_MAX || (since >= PAUSE_MIN && self.used.swap(false, Ordering::Relaxed))
    }
}

/// Pieces from which on glibc asks the system for each by itself, and gives it back when it is freed: buffers of connections and
/// bodies. By itself it does so from 128 kB on, and from ever larger ones once such are freed; and a hole that a buffer leaves among
/// small pieces that stay is never whole again.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const OWN_PAGES_BYTES: libc::c_int = 16 << 10;

/// Has all threads take memory from one arena, and large pieces from none; to be called before there are others. By itself glibc
/// gives each thread its own, and what one thread frees there is of no use to another: with 10,000 pods 50 MB were held for 30 in
/// use, and with one arena 37 for 28. Two threads that mostly wait do not feel its lock: a restart takes the same processor time.
pub fn share() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: mallopt takes no pointer and may be called at any time.
        #[allow(unsafe_code)]
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
            libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES_BYTES);
        }
    }
}

/// Gives free pages back; nothing on systems whose allocator is not glibc's.
pub fn release() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // SAFETY: malloc_trim takes no pointer and may be called at any time from any thread.
        #[allow(unsafe_code)]
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_after_use_and_now_and_then_but_not_all_the_time() {
        let memory = Memory::default();
        assert!(!memory.is_due(PAUSE_MIN));
        memory.used();
        assert!(!memory.is_due(PAUSE_MIN / 2), "too soon");
        assert!(memory.is_due(PAUSE_MIN), "what was used is not forgotten");
        assert!(!memory.is_due(PAUSE_MIN), "once for each use");
        assert!(memory.is_due(PAUSE_MAX));
    }

    /// What other tests take meanwhile is counted too, so this one has a process to itself.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn what_lies_free_between_pieces_that_stay_is_given_back() {
        let mut alone = std::process::Command::new(std::env::current_exe().expect("this program"));
        alone.args([
            "--ignored",
            "--exact",
            "memory::tests::free_pieces_in_a_process_of_their_own",
        ]);
        let output = alone.output().expect("it starts");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}"
        );
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    #[ignore = "run by the test above"]
    fn free_pieces_in_a_process_of_their_own() {
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").expect("linux");
            let pages = text
                .split(' ')
                .nth(1)
                .and_then(|field| field.parse::<u64>().ok());
            pages.expect("a number") * 4096
        };
        let mut pieces: Vec<Vec<u8>> = (0..64_000).map(|_| vec![1; 1000]).collect();
        let kept: Vec<Vec<u8>> = pieces.iter_mut().step_by(16).map(std::mem::take).collect();
        drop(pieces);
        let before = resident();
        release();
        let after = resident();
        assert!(after + (30 << 20) < before, "{before} to {after} bytes");
        assert_eq!(kept.len(), 4000);
    }
}
