//! Bytes of integer weights as the CPU keeps them.

use serde::{Deserialize, Serialize};

/// Rows that lie interleaved.
pub const TILE_ROWS: u64 = 16;
/// Bytes of the unit that tiles consist of: a float32 scale, or four bytes of weights, for each interleaved row.
pub const LINE_BYTES: u64 = 64;
/// Columns that share a scale when four-bit weights are made at load.
pub const INT4_GROUP: u32 = 64;

/// A group that is longer than any row.
pub(crate) const WHOLE_ROW: u32 = 1 << 20;

/// How integer weights are stored: symmetric, a float32 scale for each output row or for each group of its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IntegerFormat {
    /// Eight bits, one scale for each output row.
    Int8,
    /// Four bits.
    Int4 {
        /// Columns that share a scale; a multiple of eight.
        group: u32,
    },
}

impl IntegerFormat {
    /// Units of [`LINE_BYTES`] that [`TILE_ROWS`] rows of `columns` take, scales included.
    pub fn block_lines(self, columns: u64) -> u64 {
        match self {
            Self::Int8 => 1 + columns.div_ceil(4),
            Self::Int4 { group } => columns.div_ceil(group.into()) + columns.div_ceil(8),
        }
    }

    /// Bytes of a matrix.
    pub fn bytes(self, rows: u64, columns: u64) -> u64 {
        rows.div_ceil(TILE_ROWS) * self.block_lines(columns) * LINE_BYTES
    }
}

/// Where integer weights come from, which decides what else is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IntegerSource {
    /// Made at load: head and key-value up-projection become eight bits, linear maps the format asked for.
    Load,
    /// Read from the files: linear maps only; head and key-value up-projection stay bfloat16.
    Files,
}
