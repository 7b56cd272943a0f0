//! Integer weights as the kernels read them, and how floats become them.
//!
//! Sixteen rows lie interleaved as a block: one sequential stream that a decode step reads once. A block of eight-bit
//! weights is a line of sixteen float32 scales, then a line for every four columns (see [`crate::lanes::Bytes`]). A block
//! of four-bit weights is, group of columns after group, a line of scales and then a line for every eight columns, the
//! first four in the low halves of the bytes. Rows and columns that fill up a block or line are zero bytes; they meet
//! activations that are zero, or their results are dropped.
//!
//! Invariant: a weight is `scale * (stored - offset)`, the offset being 128 or 8. The layout is the same on every
//! instruction set.

use engine_memory::{IntegerFormat, LINE_BYTES, TILE_ROWS};

use crate::store::{Line, Store};

/// Rows of a block.
pub(crate) const BLOCK: usize = TILE_ROWS as usize;
const _: () = assert!(LINE_BYTES as usize == size_of::<Line>());
/// Longest row: longer sums of products could leave 32 bits.
pub(crate) const COLUMNS_MAX: usize = 1 << 17;

/// A matrix of integers. Its rows come in `parts` of `part_rows`, each of which begins with a block of its own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Integers {
    pub format: IntegerFormat,
    pub columns: usize,
    pub part_rows: usize,
    pub lines: Store<Line>,
}

/// Lines of a block of rows of `columns`.
pub(crate) fn block_lines(format: IntegerFormat, columns: usize) -> usize {
    format.block_lines(columns as u64) as usize
}

impl Integers {
    /// The lines of a part.
    pub fn part(&self, part: usize) -> &[Line] {
        let lines = block_lines(self.format, self.columns) * self.part_rows.div_ceil(BLOCK);
        &self.lines[part * lines..(part + 1) * lines]
    }

    /// Writes row `row` as floats.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let lines = block_lines(self.format, self.columns);
        let row_of_part = row % self.part_rows;
        let block = &self.part(row / self.part_rows)[row_of_part / BLOCK * lines..][..lines];
        let lane = row_of_part % BLOCK * 4;
        let float = |line: &Line| {
            let bytes: [u8; 4] = std::array::from_fn(|at| line.0[lane + at]);
            f32::from_ne_bytes(bytes)
        };
        match self.format {
            IntegerFormat::Int8 => {
                let scale = float(&block[0]);
                for (values, line) in out.chunks_mut(4).zip(&block[1..]) {
                    for (value, byte) in values.iter_mut().zip(&line.0[lane..]) {
                        *value = scale * (f32::from(*byte) - 128.0);
                    }
                }
            }
            IntegerFormat::Int4 { group } => {
                let mut rest = block;
                for values in out.chunks_mut(group as usize) {
                    let count = values.len().div_ceil(8);
                    let scale = float(&rest[0]);
                    for (eight, line) in values.chunks_mut(8).zip(&rest[1..=count]) {
                        for (at, value) in eight.iter_mut().enumerate() {
                            let nibble = line.0[lane + at % 4] >> (at / 4 * 4) & 15;
                            *value = scale * (f32::from(nibble) - 8.0);
                        }
                    }
                    rest = &rest[count + 1..];
                }
            }
        }
    }
}

/// Fills an [`Integers`] row by row.
#[derive(Debug)]
pub(crate) struct Packer {
    format: IntegerFormat,
    columns: usize,
    part_rows: usize,
    lines: Vec<Line>,
    next: usize,
    /// Of the row that is being quantised.
    stored: Vec<u8>,
    scales: Vec<f32>,
}

impl Packer {
    /// Room for `rows` rows of `columns` in parts of `part_rows`.
    pub fn new(format: IntegerFormat, rows: usize, columns: usize, part_rows: usize) -> Self {
        let parts = rows.div_ceil(part_rows.max(1));
        let blocks = parts * part_rows.div_ceil(BLOCK);
        Self {
            format,
            columns,
            part_rows,
            lines: vec![Line::ZERO; blocks * block_lines(format, columns)],
            next: 0,
            stored: Vec::with_capacity(columns),
            scales: Vec::new(),
        }
    }

    /// Quantises the next row.
    pub fn push(&mut self, row: &[f32]) {
        let mut stored = std::mem::take(&mut self.stored);
        let mut scales = std::mem::take(&mut self.scales);
        stored.clear();
        scales.clear();
        match self.format {
            IntegerFormat::Int8 => {
                scales.push(scale8(row));
                round_into(row, scales[0], -127.0, 127.0, 128, &mut stored);
            }
            IntegerFormat::Int4 { group } => {
                for values in row.chunks(group as usize) {
                    let scale = scale4(values);
                    scales.push(scale);
                    round_into(values, scale, -8.0, 7.0, 8, &mut stored);
                }
            }
        }
        self.put(&scales, &stored);
        (self.stored, self.scales) = (stored, scales);
    }

    /// Takes the next row as it is: the scale of each group (one for eight bits) and each column's stored value.
    pub fn put(&mut self, scales: &[f32], stored: &[u8]) {
        let (part, row) = (self.next / self.part_rows, self.next % self.part_rows);
        let blocks = part * self.part_rows.div_ceil(BLOCK) + row / BLOCK;
        let lines = block_lines(self.format, self.columns);
        let block = &mut self.lines[blocks * lines..(blocks + 1) * lines];
        let lane = row % BLOCK * 4;
        let set = |line: &mut Line, scale: f32| {
            line.0[lane..lane + 4].copy_from_slice(&scale.to_ne_bytes());
        };
        match self.format {
            IntegerFormat::Int8 => {
                set(&mut block[0], scales[0]);
                for (line, four) in block[1..].iter_mut().zip(stored.chunks(4)) {
                    line.0[lane..lane + four.len()].copy_from_slice(four);
                }
            }
            IntegerFormat::Int4 { group } => {
                let mut rest = block;
                for (scale, values) in scales.iter().zip(stored.chunks(group as usize)) {
                    let (here, later) = rest.split_at_mut(1 + values.len().div_ceil(8));
                    set(&mut here[0], *scale);
                    for (line, eight) in here[1..].iter_mut().zip(values.chunks(8)) {
                        let bytes = &mut line.0[lane..lane + 4];
                        let (low, high) = eight.split_at(eight.len().min(4));
                        bytes[..low.len()].copy_from_slice(low);
                        for (byte, value) in bytes.iter_mut().zip(high) {
                            *byte |= value << 4;
                        }
                    }
                    rest = later;
                }
            }
        }
        self.next += 1;
    }

    /// The matrix.
    pub fn finish(self) -> Integers {
        Integers {
            format: self.format,
            columns: self.columns,
            part_rows: self.part_rows,
            lines: self.lines.into(),
        }
    }
}

/// Appends the integers nearest to `values / scale`, ties to even, plus `offset`.
fn round_into(values: &[f32], scale: f32, lowest: f32, highest: f32, offset: u8, to: &mut Vec<u8>) {
    // 1.5 * 2^23: a sum with it ends in the rounded integer, in two's complement. Rounding by name is a call.
    const MAGIC: f32 = 12_582_912.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    to.extend(values.iter().map(|value| {
        let rounded = (value * inverse).clamp(lowest, highest) + MAGIC;
        (rounded.to_bits() as u8).wrapping_add(offset)
    }));
}

/// The scale that puts the largest magnitude on 127; a NaN where the row holds something that is no number, so that its
/// products are none either.
fn scale8(row: &[f32]) -> f32 {
    if !row.iter().all(|value| value.is_finite()) {
        return f32::NAN;
    }
    row.iter()
        .fold(0f32, |largest, value| largest.max(value.abs()))
        / 127.0
}

/// The scale that puts the value of the largest magnitude, with its sign, on -8: symmetric four bits have one more step
/// below zero than above, which the more distant end gets.
fn scale4(group: &[f32]) -> f32 {
    if !group.iter().all(|value| value.is_finite()) {
        return f32::NAN;
    }
    let extreme = group.iter().fold(0f32, |extreme, value| {
        if value.abs() > extreme.abs() {
            *value
        } else {
            extreme
        }
    });
    extreme / -8.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::noise;

    fn packed(
        format: IntegerFormat,
        rows: usize,
        columns: usize,
        part_rows: usize,
    ) -> (Vec<f32>, Integers) {
        let values = noise((rows * columns) as u64, rows * columns);
        let mut packer = Packer::new(format, rows, columns, part_rows);
        values.chunks(columns).for_each(|row| packer.push(row));
        (values, packer.finish())
    }

    #[test]
    fn a_row_is_read_back_within_half_a_step() {
        let int4 = |group| IntegerFormat::Int4 { group };
        for (format, columns, group) in [
            (IntegerFormat::Int8, 37, 37),
            (IntegerFormat::Int8, 64, 64),
            (int4(32), 100, 32),
            (int4(64), 64, 64),
            (int4(128), 7, 128),
        ] {
            // 40 rows in parts of 20: every part ends with a block that is not full.
            let (values, integers) = packed(format, 40, columns, 20);
            let mut row = vec![0.0; columns];
            for (index, expected) in values.chunks(columns).enumerate() {
                integers.read_row(index, &mut row);
                for (found, expected) in row.chunks(group).zip(expected.chunks(group)) {
                    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
                    // With four bits the end opposite the extreme one may be cut off by up to a whole step.
                    let step = match format {
                        IntegerFormat::Int8 => largest / 127.0 * 0.5001,
                        IntegerFormat::Int4 { .. } => largest / 8.0 * 1.0001,
                    };
                    for (found, expected) in found.iter().zip(expected) {
                        assert!(
                            (found - expected).abs() <= step,
                            "{format:?} {found} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zero_and_what_is_no_number_stays_none() {
        for format in [IntegerFormat::Int8, IntegerFormat::Int4 { group: 32 }] {
            let mut packer = Packer::new(format, 3, 40, 3);
            packer.push(&[0.0; 40]);
            let mut bad = [1.0; 40];
            bad[35] = f32::INFINITY;
            packer.push(&bad);
            bad[35] = f32::NAN;
            packer.push(&bad);
            let integers = packer.finish();
            let mut row = [1.0; 40];
            integers.read_row(0, &mut row);
            assert_eq!(row, [0.0; 40]);
            for index in 1..3 {
                integers.read_row(index, &mut row);
                assert!(row[35].is_nan(), "{format:?}");
            }
        }
    }
}
