//! Bfloat16 matrices in panels, the form that [`crate::kernels::panel`] multiplies with.
//!
//! A panel holds [`PANEL`] rows of a matrix `[out, in]`, the last one what is left. It is a sequence of pairs of
//! neighbouring elements: the first pair of each of its rows, then the second of each, and so on. A register then holds
//! one pair of sixteen rows, each of which sums up in a lane of its own, and a decode step walks a panel as one stream.
//!
//! Invariant: the pairs take exactly the bytes of the matrix, except that a row of odd length is filled up with a zero.

#![allow(unsafe_code)]

use half::bf16;

use crate::store::{Line, Store};

/// Rows of a matrix that a panel holds: four registers of sums, which leaves room for six rows of activations.
pub(crate) const PANEL: usize = 64;

/// Values of four bytes in a line.
pub(crate) const LINE: usize = 16;

/// Equal matrices, one after the other, in panels.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Packed {
    /// Panels begin at a line wherever their sizes allow, since a load across two lines costs two.
    lines: Store<Line>,
    pairs: usize,
    rows: usize,
    columns: usize,
}

impl Packed {
    /// Packs row-major matrices of `rows` rows of `columns` elements each.
    pub fn new(values: &[bf16], rows: usize, columns: usize) -> Self {
        let parts = values.len() / (rows * columns).max(1);
        let pairs = parts * rows * columns.div_ceil(2);
        let mut lines = vec![Line::ZERO; pairs.div_ceil(LINE)];
        let part_pairs = rows * columns.div_ceil(2);
        let parts = values.chunks_exact((rows * columns).max(1));
        let to = pairs_of(&mut lines).chunks_exact_mut(part_pairs.max(1));
        for (part, to) in parts.zip(to) {
            let panels = part.chunks(PANEL * columns);
            let to = to.chunks_mut(PANEL * columns.div_ceil(2));
            panels
                .zip(to)
                .for_each(|(from, to)| fill(from, to, columns));
        }
        Self {
            lines: lines.into(),
            pairs,
            rows,
            columns,
        }
    }

    /// Matrices whose lines are there already: `pairs` pairs in all.
    pub fn of(lines: Store<Line>, pairs: usize, rows: usize, columns: usize) -> Self {
        assert!(lines.len() * LINE >= pairs, "{pairs} pairs");
        Self {
            lines,
            pairs,
            rows,
            columns,
        }
    }

    /// Whole lines.
    pub fn lines(&self) -> &Store<Line> {
        &self.lines
    }

    /// First pair of the `part`-th matrix.
    pub fn part(&self, part: usize) -> *const u32 {
        let at = part * self.rows * self.columns.div_ceil(2);
        self.pairs()[at..].as_ptr()
    }

    /// The pairs as they lie in memory, without what fills up the last line.
    pub fn as_bytes(&self) -> &[u8] {
        &self.lines.as_bytes()[..self.pairs * 4]
    }

    /// Widens a row of the first matrix.
    pub fn unpack(&self, row: usize, to: &mut [f32]) {
        let first = row / PANEL * PANEL;
        let width = PANEL.min(self.rows - first);
        let panel = &self.pairs()[first * self.columns.div_ceil(2)..];
        let pairs = panel[row - first..].iter().step_by(width);
        for (to, pair) in to.chunks_mut(2).zip(pairs) {
            let both = [
                f32::from_bits(pair << 16),
                f32::from_bits(pair & 0xffff_0000),
            ];
            to.copy_from_slice(&both[..to.len()]);
        }
    }

    fn pairs(&self) -> &[u32] {
        // SAFETY: lines are nothing but their sixteen pairs each, and there are enough of them.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.pairs) }
    }
}

/// Lines as pairs.
fn pairs_of(lines: &mut [Line]) -> &mut [u32] {
    // SAFETY: lines are nothing but their sixteen pairs each, and borrowed as a whole.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LINE) }
}

/// Packs the rows of one panel.
fn fill(rows: &[bf16], panel: &mut [u32], columns: usize) {
    let width = rows.len() / columns;
    for (at, row) in rows.chunks_exact(columns).enumerate() {
        for (pair, to) in row.chunks(2).zip(panel[at..].iter_mut().step_by(width)) {
            let second = pair.get(1).map_or(0, |value| value.to_bits());
            *to = u32::from(pair[0].to_bits()) | u32::from(second) << 16;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_whatever_the_shape_and_take_their_bytes() {
        for rows in [1, 15, 63, 64, 65, 130] {
            for columns in [1, 2, 5, 64] {
                let values: Vec<bf16> = (0..rows * columns)
                    .map(|at| bf16::from_f32(at as f32))
                    .collect();
                let both = [values.clone(), values.clone()].concat();
                let packed = Packed::new(&both, rows, columns);
                assert_eq!(
                    packed.as_bytes().len(),
                    2 * rows * (columns + columns % 2) * 2
                );
                for (row, expected) in values.chunks_exact(columns).enumerate() {
                    let mut found = vec![f32::NAN; columns];
                    packed.unpack(row, &mut found);
                    let expected: Vec<f32> = expected.iter().map(|value| value.to_f32()).collect();
                    assert_eq!(found, expected, "row {row} of {rows} x {columns}");
                }
                let half = packed.pairs.div_ceil(2);
                assert_eq!(packed.pairs()[..half], packed.pairs()[half..]);
            }
        }
    }
}
