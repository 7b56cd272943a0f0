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
/// Rows of a tile of one or two registers of columns.
const ROWS_OF_FEW: usize = 8;

/// A row of a product.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    /// First pair.
    pub from: *const u32,
    /// Where the results go.
    pub out: *mut f32,
    /// Factor on what is there already, if [`Shape::adds`].
    pub before: f32,
}

/// What a product reads and writes, besides the panel.
pub(crate) trait Operands {
    /// The rows from `first` on.
    fn gather(&self, first: usize, rows: &mut [Row]);
    /// What to ask the memory for, line by line, while the rows from this one on are multiplied; absent where that is
    /// for the panel to say.
    fn ahead(&self, _index: usize) -> Option<*const u32> {
        None
    }
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
    /// Whether the product is added to what is there.
    pub adds: bool,
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
    /// There are sums to go on from.
    adds: bool,
}

/// What a tile asks the memory for, at each of its steps: a line for each register of columns.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const u32,
    /// From a step's lines to the next one's.
    step: usize,
    /// From a line to the next one of the step.
    line: usize,
}

impl Ahead {
    /// For the `index`-th tile of rows. The first one reads the panel's part from memory, and asks for what follows a bit
    /// later. The next four each ask for a quarter of the next part; further ones have nothing to ask for.
    #[inline(always)]
    fn new(part: Part, index: usize) -> Self {
        let start = part.panel.wrapping_add(part.first * part.width);
        let depth = part.end - part.first;
        match index {
            0 => Self {
                start: start.wrapping_add(AHEAD),
                step: part.width,
                line: LANES,
            },
            1..=4 => Self {
                start: start.wrapping_add(depth * (part.width + (index - 1) * LANES)),
                step: LANES,
                line: 0,
            },
            _ => Self::nothing(start),
        }
    }

    /// The same line again and again, which is there already.
    #[inline(always)]
    fn nothing(start: *const u32) -> Self {
        Self {
            start,
            step: 0,
            line: 0,
        }
    }
}

/// Pairs with the micro-kernel, compiled once for each instruction set.
pub(crate) trait Multiply: Pairs {
    /// `out = out * before + row · column`, or without what was there before, for all rows and the panel's columns.
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
        let part = Part {
            panel,
            width,
            first,
            end,
            half: end == pairs && length % 2 == 1,
            adds: shape.adds || first > 0,
        };
        // The operands' wish, once, else the panel's.
        let ahead = |index: usize, row: usize| match operands.ahead(row) {
            Some(start) if first == 0 => Ahead {
                start,
                step: LANES,
                line: 0,
            },
            Some(start) => Ahead::nothing(start),
            None => Ahead::new(part, index),
        };
        let mut row = 0;
        unsafe {
            // Few columns: more rows hide the latency of the sums. With still more, their addresses would not fit into
            // registers, and be read again at each step.
            while C < 4 && row + ROWS_OF_FEW <= count {
                let ahead = ahead(row / ROWS_OF_FEW, row);
                tile::<P, ROWS_OF_FEW, C, RAGGED>(operands, row, part, shape.step, ahead);
                row += ROWS_OF_FEW;
            }
            // A ragged panel is the last one of a matrix, if that: not worth the code of all heights.
            let highest = if RAGGED { 1 } else { ROWS };
            // Tiles of equal height, since a low one is bound by the latency of its chains.
            let tiles = (count - row).div_ceil(highest);
            let (start, rest) = (row, count - row);
            for index in 0..tiles {
                let (row, next) = (index * rest / tiles, (index + 1) * rest / tiles);
                let at = start + row;
                let (step, ahead) = (shape.step, ahead(index, at));
                match next - row {
                    2 if !RAGGED => tile::<P, 2, C, RAGGED>(operands, at, part, step, ahead),
                    3 if !RAGGED => tile::<P, 3, C, RAGGED>(operands, at, part, step, ahead),
                    4 if !RAGGED => tile::<P, 4, C, RAGGED>(operands, at, part, step, ahead),
                    5 if !RAGGED => tile::<P, 5, C, RAGGED>(operands, at, part, step, ahead),
                    ROWS if !RAGGED => tile::<P, ROWS, C, RAGGED>(operands, at, part, step, ahead),
                    _ => tile::<P, 1, C, RAGGED>(operands, at, part, step, ahead),
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
    ahead: Ahead,
) {
    unsafe {
        let nothing = Row {
            from: std::ptr::null(),
            out: std::ptr::null_mut(),
            before: 1.0,
        };
        let mut rows = [nothing; R];
        operands.gather(row, &mut rows);
        let mut sums = [[P::zero(); C]; R];
        if part.adds {
            for r in 0..R {
                // What an earlier part has put down is taken up as it is.
                let factor = if part.first > 0 { 1.0 } else { rows[r].before };
                let factor = P::Wide::splat(factor);
                for c in 0..C {
                    let held = columns::<RAGGED>(part.width, c);
                    let from = rows[r].out.wrapping_add(c * LANES).cast_const();
                    let old = if held == LANES {
                        P::Wide::load(from)
                    } else {
                        P::Wide::load_part(from, held)
                    };
                    sums[r][c] = P::from_wide(old.mul(factor));
                }
            }
        }
        let mut at = part.first;
        while at + usize::from(part.half) < part.end {
            add::<P, R, C, RAGGED, false>(&mut sums, &rows, step, part, at, ahead);
            at += 1;
        }
        if part.half {
            add::<P, R, C, RAGGED, true>(&mut sums, &rows, step, part, at, ahead);
        }
        for r in 0..R {
            for c in 0..C {
                let held = columns::<RAGGED>(part.width, c);
                let to = rows[r].out.wrapping_add(c * LANES);
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
    rows: &[Row; R],
    step: usize,
    part: Part,
    at: usize,
    ahead: Ahead,
) {
    unsafe {
        let from = part.panel.add(at * part.width);
        let ahead_of_step = (at - part.first) * ahead.step;
        let mut factors = [P::splat(0); C];
        for c in 0..C {
            let from = from.wrapping_add(c * LANES);
            prefetch(ahead.start.wrapping_add(ahead_of_step + c * ahead.line));
            let held = columns::<RAGGED>(part.width, c);
            factors[c] = if held == LANES {
                P::load(from.cast())
            } else {
                P::load_part(from.cast(), 2 * held)
            };
        }
        for r in 0..R {
            let pair = rows[r].from.add(at * step);
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
