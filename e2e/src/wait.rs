//! Level-triggered waiting.

use std::time::{Duration, Instant};

/// Polls until `look` returns a value; panics after `within` with what was seen last.
///
/// `look` returns `Err` with a description of what it saw instead of what it wants.
pub fn eventually<T>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        let seen = match look() {
            Ok(value) => return value,
            Err(seen) => seen,
        };
        assert!(
            start.elapsed() < within,
            "{what}: not within {within:?}; last seen: {seen}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}
