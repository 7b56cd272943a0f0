//! Recorded decode steps, and the drafting passes after them.
//!
//! A step of few kernels' time would otherwise wait for hundreds of launches. Steps are rounded up to a power of two of
//! rows and of context parts, so that few graphs serve all; padding rows attend to nothing and are cached nowhere.
//! Invariant: a graph holds the same launches as the pass it was recorded from, over fixed addresses.

use std::collections::HashMap;

use kernels::driver::ArenaGraph;

use crate::layout::CudaLimits;

/// What is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PassKind {
    /// The model.
    Step,
    /// Its prediction layer.
    Draft,
}

/// Rows and parts of a recorded pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct GraphKey {
    pub kind: PassKind,
    pub rows: usize,
    /// Rows that want logits: in a step all.
    pub wanted: usize,
    pub splits: usize,
}

impl GraphKey {
    /// The recorded shape that serves a pass in which all rows attend together.
    pub fn of(
        kind: PassKind,
        rows: usize,
        wanted: usize,
        splits: usize,
        limits: &CudaLimits,
    ) -> Self {
        let rows_max = limits.sampled_max().min(limits.batched_tokens_max);
        let rows = rows.next_power_of_two().min(rows_max);
        Self {
            kind,
            rows,
            wanted: match (kind, wanted) {
                (PassKind::Step, _) => rows,
                (PassKind::Draft, 0) => 0,
                (PassKind::Draft, _) => wanted.next_power_of_two().min(limits.sequences_max),
            },
            splits: splits.next_power_of_two().min(limits.splits_max()),
        }
    }
}

/// At most one graph for each kind and power of two of rows, of wanted rows and of parts.
pub(crate) type Graphs = HashMap<GraphKey, ArenaGraph>;

#[cfg(test)]
mod tests {
    use super::*;
    use engine_memory::ResidentDtype;
    use engine_spec::KvCacheDtype;

    #[test]
    fn shapes_are_rounded_up_within_the_limits() {
        let limits = CudaLimits {
            resident: ResidentDtype::Bfloat16,
            kv_cache: KvCacheDtype::Auto,
            kv_blocks: 1,
            block_size: 16,
            model_len_max: 1500,
            batched_tokens_max: 64,
            sequences_max: 12,
            draft_tokens: 0,
            parts_bytes: 0,
            graphs: true,
        };
        let key = |rows, splits| {
            let key = GraphKey::of(PassKind::Step, rows, rows, splits, &limits);
            assert_eq!(key.rows, key.wanted);
            (key.rows, key.splits)
        };
        assert_eq!(key(1, 1), (1, 1));
        assert_eq!(key(5, 2), (8, 2));
        assert_eq!(key(9, 3), (12, 3));
        let drafting = CudaLimits {
            draft_tokens: 2,
            ..limits
        };
        let key = |rows, wanted| {
            let key = GraphKey::of(PassKind::Draft, rows, wanted, 1, &drafting);
            (key.rows, key.wanted)
        };
        assert_eq!(key(36, 12), (36, 12));
        assert_eq!(key(9, 3), (16, 4));
        assert_eq!(key(3, 0), (4, 0));
    }
}
