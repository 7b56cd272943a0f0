//! A part of a mapped file that can be kept as long as it is needed.

use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// Bytes of a mapped file; clones share the mapping.
#[derive(Clone, Debug)]
pub struct Mapped {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Mapped {
    /// The bytes of `map` in `range`; `None` where they are not all there.
    pub(crate) fn new(map: &Arc<Mmap>, range: Range<usize>) -> Option<Self> {
        map.get(range.clone())?;
        Some(Self {
            map: Arc::clone(map),
            range,
        })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}
