//! The micro-kernel of all bfloat16 arithmetic: rows of pairs times a panel of columns, summed in float32.
//!
//! A panel is what [`crate::packed`] describes. A lane sums up one column, so there is nothing to add up at the end: a
//! step broadcasts one pair of each row and multiplies it with the pairs of up to sixty-four columns. Six rows by four
//! registers of columns keep twenty-four sums in registers and need ten loads for twenty-four products.
//!
//! Invariant (batch invariance): an output is one chain over its pairs, from the first to the last. How many rows and
//! columns share a tile, and where a chain is put down in memory and taken up again, is about speed only.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // as in the parent

use crate::lanes::{LANES, Lanes, Pairs, PortablePairs};
use crate::packed::PANEL;

/// Pairs that all rows go through before the next ones: a panel's are then at most 40 KiB, which stay in the first-level
/// cache.
const DEPTH: usize = 160;
/// Pairs that a stream asks the memory for ahead of use: 2 KiB.
const AHEAD: usize = 512;
/// Rows of a tile of four registers of columns.
const ROWS: usize = 6;

/// What a product reads and writes, besides the panel.
pub(crate) trait Operands {
    /// First pair of a row.
    fn row(&self, index: usize) -> *const u32;
    /// Where a row's results go.
    fn out(&self, index: usize) -> *mut f32;
    /// Factor on what is there already; absent where nothing is.
    fn before(&self, index: usize) -> Option<f32>;
}

/// Shape of a product.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// Rows.
    pub count: usize,
    /// From a row's pair to its next one.
    pub step: usize,
    /// Elements of a row: of an odd number, the last pair of a row has only its first element.
    pub length: usize,
    /// Columns: at most [`PANEL`].
    pub width: usize,
}

/// A panel's pairs from some depth on.
#[derive(Clone, Copy)]
struct Part {
    panel: *const u32,
    width: usize,
    first: usize,
    end: usize,
    /// The last pair has one element.
    half: bool,
    /// Pairs, in all columns, to ask the memory for ahead of use.
    ahead: usize,
}

/// Pairs with the micro-kernel, compiled once for each instruction set.
pub(crate) trait Multiply: Pairs {
    /// `out[row][column] = out[row][column] * before[row] + row · column` for all rows and the panel's columns.
    ///
    /// # Safety
    /// The operands' pointers hold what the shape says, `panel` has `width` columns of `length` elements.
    unsafe fn multiply(operands: &dyn Operands, panel: *const u32, shape: Shape);
}

impl Multiply for PortablePairs {
    unsafe fn multiply(operands: &dyn Operands, panel: *const u32, shape: Shape) {
        unsafe { multiply::<Self>(operands, panel, shape) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Multiply, Operands, Shape, multiply};
    use crate::lanes::{Avx2Pairs, Avx512Bf16Pairs, Avx512Pairs};

    /// The features of the pairs, whose methods become single instructions only under them.
    macro_rules! compile {
        ($pairs:ty, $features:literal, $name:ident) => {
            impl Multiply for $pairs {
                #[inline(always)]
                unsafe fn multiply(operands: &dyn Operands, panel: *const u32, shape: Shape) {
                    unsafe { $name(operands, panel, shape) }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn $name(operands: &dyn Operands, panel: *const u32, shape: Shape) {
                unsafe { multiply::<$pairs>(operands, panel, shape) }
            }
        };
    }

    compile!(Avx2Pairs, "avx2,fma", avx2);
    compile!(
        Avx512Pairs,
        "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
        avx512
    );
    compile!(
        Avx512Bf16Pairs,
        "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma",
        avx512_bf16
    );
}

/// See [`Multiply::multiply`].
#[inline(always)]
unsafe fn multiply<P: Pairs>(operands: &dyn Operands, panel: *const u32, shape: Shape) {
    debug_assert!(shape.width <= PANEL);
    const { assert!(PANEL == 4 * LANES) };
    unsafe {
        match shape.width {
            PANEL => rows::<P, 4, false>(operands, panel, shape),
            32 => rows::<P, 2, false>(operands, panel, shape),
            LANES => rows::<P, 1, false>(operands, panel, shape),
            _ => rows::<P, 4, true>(operands, panel, shape),
        }
    }
}

/// All rows, in tiles, by all columns, in `C` registers; `RAGGED` masks what is beyond the width.
#[inline(always)]
unsafe fn rows<P: Pairs, const C: usize, const RAGGED: bool>(
    operands: &dyn Operands,
    panel: *const u32,
    shape: Shape,
) {
    let Shape {
        count,
        length,
        width,
        ..
    } = shape;
    let pairs = length.div_ceil(2);
    let depth = pairs.div_ceil(pairs.div_ceil(DEPTH));
    for first in (0..pairs).step_by(depth) {
        let end = pairs.min(first + depth);
        let mut part = Part {
            panel,
            width,
            first,
            end,
            half: end == pairs && length % 2 == 1,
            ahead: AHEAD,
        };
        if count > ROWS {
            // The first rows bring in what all rows will need next.
            part.ahead = depth * width;
        }
        let mut row = 0;
        unsafe {
            // Few columns: more rows fill the registers.
            while C == 1 && row + 16 <= count {
                tile::<P, 16, C, RAGGED>(operands, row, part, shape.step);
                row += 16;
            }
            while C == 2 && row + 12 <= count {
                tile::<P, 12, C, RAGGED>(operands, row, part, shape.step);
                row += 12;
            }
            // A ragged panel is the last one of a matrix, if that: not worth the code of all heights.
            let highest = if RAGGED { 1 } else { ROWS };
            // Tiles of equal height, since a low one is bound by the latency of its chains.
            let tiles = (count - row).div_ceil(highest);
            let (start, rest) = (row, count - row);
            for index in 0..tiles {
                let (row, next) = (index * rest / tiles, (index + 1) * rest / tiles);
                let at = start + row;
                match next - row {
                    2 if !RAGGED => tile::<P, 2, C, RAGGED>(operands, at, part, shape.step),
                    3 if !RAGGED => tile::<P, 3, C, RAGGED>(operands, at, part, shape.step),
                    4 if !RAGGED => tile::<P, 4, C, RAGGED>(operands, at, part, shape.step),
                    5 if !RAGGED => tile::<P, 5, C, RAGGED>(operands, at, part, shape.step),
                    ROWS if !RAGGED => tile::<P, ROWS, C, RAGGED>(operands, at, part, shape.step),
                    _ => tile::<P, 1, C, RAGGED>(operands, at, part, shape.step),
                }
            }
        }
    }
}

/// `R` rows from `row` on by `C` registers of columns.
#[inline(always)]
unsafe fn tile<P: Pairs, const R: usize, const C: usize, const RAGGED: bool>(
    operands: &dyn Operands,
    row: usize,
    part: Part,
    step: usize,
) {
    unsafe {
        let mut sums = [[P::zero(); C]; R];
        for r in 0..R {
            let out = operands.out(row + r);
            let factor = if part.first > 0 {
                Some(1.0)
            } else {
                operands.before(row + r)
            };
            if let Some(factor) = factor {
                let factor = P::Wide::splat(factor);
                for c in 0..C {
                    let held = columns::<RAGGED>(part.width, c);
                    let from = out.wrapping_add(c * LANES).cast_const();
                    let old = if held == LANES {
                        P::Wide::load(from)
                    } else {
                        P::Wide::load_part(from, held)
                    };
                    sums[r][c] = P::from_wide(old.mul(factor));
                }
            }
        }
        let mut rows = [std::ptr::null::<u32>(); R];
        for r in 0..R {
            rows[r] = operands.row(row + r);
        }
        let mut at = part.first;
        while at + usize::from(part.half) < part.end {
            add::<P, R, C, RAGGED, false>(&mut sums, &rows, step, part, at);
            at += 1;
        }
        if part.half {
            add::<P, R, C, RAGGED, true>(&mut sums, &rows, step, part, at);
        }
        for r in 0..R {
            let out = operands.out(row + r);
            for c in 0..C {
                let held = columns::<RAGGED>(part.width, c);
                let to = out.wrapping_add(c * LANES);
                if held == LANES {
                    sums[r][c].wide().store(to);
                } else {
                    sums[r][c].wide().store_part(to, held);
                }
            }
        }
    }
}

/// Adds the products of one pair of each row; of a `HALF` one, only those of its first element.
#[inline(always)]
unsafe fn add<P: Pairs, const R: usize, const C: usize, const RAGGED: bool, const HALF: bool>(
    sums: &mut [[P; C]; R],
    rows: &[*const u32; R],
    step: usize,
    part: Part,
    at: usize,
) {
    unsafe {
        let from = part.panel.add(at * part.width);
        let mut factors = [P::splat(0); C];
        for c in 0..C {
            let from = from.wrapping_add(c * LANES);
            prefetch(from.wrapping_add(part.ahead));
            let held = columns::<RAGGED>(part.width, c);
            factors[c] = if held == LANES {
                P::load(from.cast())
            } else {
                P::load_part(from.cast(), 2 * held)
            };
        }
        for r in 0..R {
            let pair = rows[r].add(at * step);
            let value = if HALF {
                P::splat(u32::from(pair.cast::<u16>().read_unaligned()))
            } else {
                P::splat(pair.read_unaligned())
            };
            for c in 0..C {
                sums[r][c] = sums[r][c].add_products(value, factors[c]);
            }
        }
    }
}

/// Columns that the `c`-th register holds.
#[inline(always)]
fn columns<const RAGGED: bool>(width: usize, c: usize) -> usize {
    if RAGGED {
        width.saturating_sub(c * LANES).min(LANES)
    } else {
        LANES
    }
}

/// Asks for a cache line; any address will do.
#[inline(always)]
pub(super) fn prefetch(at: *const u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that touches nothing; every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
