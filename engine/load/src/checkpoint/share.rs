//! A rank's rows of a stored tensor: a part of its bytes, and of its scales.

use super::{Scales, StoredTensor};

/// The rows that the spec of `whole` says, of bytes and scales that are the whole tensor's.
pub(crate) fn of(whole: StoredTensor<'_>) -> StoredTensor<'_> {
    let Some(share) = whole.spec.share else {
        return whole;
    };
    let rows = whole.spec.shape.first().copied().unwrap_or_default();
    let row_bytes = whole.bytes.len() / share.of.max(1);
    let scales = whole.scales.map(|scales| {
        let block_rows = (scales.blocks.rows as usize).max(1);
        let row_bytes = scales.bytes.len() / share.of.div_ceil(block_rows).max(1);
        let first = share.first / block_rows;
        let end = (share.first + rows).div_ceil(block_rows);
        Scales {
            bytes: &scales.bytes[first * row_bytes..end * row_bytes],
            rows_before: share.first % block_rows,
            ..scales
        }
    });
    StoredTensor {
        bytes: &whole.bytes[share.first * row_bytes..(share.first + rows) * row_bytes],
        scales,
        ..whole
    }
}
