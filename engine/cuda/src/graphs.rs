//! Recorded decode steps.
//!
//! A step of few kernels' time would otherwise wait for hundreds of launches. Steps are rounded up to a power of two of
//! rows and of context parts, so that few graphs serve all; padding rows attend to nothing and are cached nowhere.
//! Invariant: a graph holds the same launches as the pass it was recorded from, over fixed addresses.

use std::collections::HashMap;

use kernels::driver::ArenaGraph;

use crate::layout::CudaLimits;

/// Rows and parts of a recorded step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GraphKey {
    pub rows: usize,
    pub splits: usize,
}

impl GraphKey {
    /// The recorded shape that serves a decode step.
    pub fn of(rows: usize, splits: usize, limits: &CudaLimits) -> Self {
        Self {
            rows: rows.next_power_of_two().min(limits.sequences_max),
            splits: splits.next_power_of_two().min(limits.splits_max()),
        }
    }
}

/// At most one graph for each power of two of rows and of parts.
pub(crate) type Graphs = HashMap<GraphKey, ArenaGraph>;

#[cfg(test)]
mod tests {
    use super::*;
    use engine_memory::ResidentDtype;

    #[test]
    fn shapes_are_rounded_up_within_the_limits() {
        let limits = CudaLimits {
            resident: ResidentDtype::Bfloat16,
            kv_blocks: 1,
            block_size: 16,
            model_len_max: 1500,
            batched_tokens_max: 64,
            sequences_max: 12,
            parts_bytes: 0,
            graphs: true,
        };
        let key = |rows, splits| {
            let key = GraphKey::of(rows, splits, &limits);
            (key.rows, key.splits)
        };
        assert_eq!(key(1, 1), (1, 1));
        assert_eq!(key(5, 2), (8, 2));
        assert_eq!(key(9, 3), (12, 3));
    }
}
