//! Differences of time stamps in whole seconds; never negative, because clocks disagree.

use jiff::Timestamp;

/// Seconds from `earlier` to `later`, 0 when `later` is not later.
pub fn seconds_between(earlier: Timestamp, later: Timestamp) -> u64 {
    u64::try_from(later.as_second() - earlier.as_second()).unwrap_or(0)
}
