//! Kernels against float64, and every instruction set against every other.

use engine_core::BlockId;
use proptest::prelude::*;

use super::attend::{
    AttendAll, AttendSplit, Cached, MergeSplits, Queries, Query, Running, SPLIT, scratch_length,
};
use super::paired::{PairedProduct, RoundInPlace};
use super::*;
use crate::packed::{PANEL, Packed};

/// Reproducible values in [-1, 1).
pub(crate) fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn product(
    isa: Isa,
    weight: &[f32],
    input: &[f32],
    length: usize,
    rows: Rows<'_>,
    count: usize,
) -> Vec<f32> {
    let columns = weight.len() / length.max(1);
    let mut out = vec![f32::NAN; count * columns];
    let kernel = Product {
        weight: weight.as_ptr(),
        length,
        columns: 0..columns,
        input: input.as_ptr(),
        input_stride: length,
        rows,
        indices: 0..count,
        out: out.as_mut_ptr(),
        out_stride: columns,
    };
    // SAFETY: the buffers have exactly these sizes.
    unsafe { isa.run(kernel) };
    out
}

#[test]
fn products_are_right_for_every_length_and_equal_on_every_instruction_set() {
    for length in (1..140).chain([200, 256, 257, 1000]) {
        let columns = 3;
        let rows = 6;
        let weight = noise(length as u64, length * columns);
        let input = noise(length as u64 + 7, length * rows);
        let reference = product(Isa::Portable, &weight, &input, length, Rows::From(0), rows);
        for (index, found) in reference.iter().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let exact: f64 = (0..length)
                .map(|k| {
                    f64::from(input[row * length + k]) * f64::from(weight[column * length + k])
                })
                .sum();
            assert!(
                (f64::from(*found) - exact).abs() < 1e-4,
                "{length}: {found} {exact}"
            );
        }
        for isa in Isa::available() {
            let all = product(isa, &weight, &input, length, Rows::From(0), rows);
            assert_eq!(all, reference, "{isa:?} {length}");
            let single = product(isa, &weight, &input, length, Rows::Listed(&[4]), 1);
            assert_eq!(
                single,
                reference[4 * columns..5 * columns],
                "{isa:?} {length}"
            );
        }
    }
}

/// Bits of the nearest bfloat16 of each value.
fn narrowed(values: &[f32]) -> Vec<u16> {
    values
        .iter()
        .map(|value| bf16::from_f32(*value).to_bits())
        .collect()
}

fn paired(
    isa: Isa,
    weight: &[u16],
    input: &[f32],
    length: usize,
    rows: Rows<'_>,
    indices: std::ops::Range<usize>,
) -> Vec<f32> {
    let columns = weight.len() / length;
    let weight: Vec<bf16> = weight.iter().map(|bits| bf16::from_bits(*bits)).collect();
    let packed = Packed::new(&weight, columns, length);
    let mut out = vec![f32::NAN; indices.end * columns];
    let mut input = input.to_vec();
    for row in input.chunks_exact_mut(length) {
        let values = row.as_mut_ptr();
        // SAFETY: a row of this length.
        unsafe { isa.run_paired(RoundInPlace { values, length }) };
    }
    let kernel = PairedProduct {
        weight: packed.part(0),
        length,
        height: columns,
        columns: 0..columns,
        input: input.as_ptr().cast(),
        input_stride: 2 * length,
        rows,
        indices: indices.clone(),
        out: out.as_mut_ptr(),
        out_stride: columns,
    };
    // SAFETY: the buffers have exactly these sizes.
    unsafe { isa.run_paired(kernel) };
    out.split_off(indices.start * columns)
}

#[test]
fn paired_products_are_right_for_every_length_and_equal_on_every_instruction_set() {
    let shapes = (1..140)
        .map(|length| (length, 21))
        .chain([200, 256, 257, 1000].map(|length| (length, 145)));
    for (length, columns) in shapes {
        // Whole panels, registers and tiles, and rests of each.
        let rows = 19;
        let weight = narrowed(&noise(length as u64, length * columns));
        let input = noise(length as u64 + 7, length * rows);
        let reference = paired(
            Isa::Portable,
            &weight,
            &input,
            length,
            Rows::From(0),
            0..rows,
        );
        let wide = |bits: u16| f64::from(bf16::from_bits(bits).to_f32());
        let rounded = narrowed(&input);
        for (index, found) in reference.iter().enumerate() {
            let (row, column) = (index / columns, index % columns);
            let exact: f64 = (0..length)
                .map(|k| wide(rounded[row * length + k]) * wide(weight[column * length + k]))
                .sum();
            assert!(
                (f64::from(*found) - exact).abs() < 1e-4,
                "{length}: {found} {exact}"
            );
        }
        for isa in Isa::available() {
            let all = paired(isa, &weight, &input, length, Rows::From(0), 0..rows);
            assert_eq!(all, reference, "{isa:?} {length}");
            for count in 1..rows {
                let some = paired(isa, &weight, &input, length, Rows::From(1), 0..count);
                let expected = &reference[columns..(1 + count) * columns];
                assert_eq!(some, expected, "{isa:?} {length}: {count} rows");
            }
            let listed = paired(isa, &weight, &input, length, Rows::Listed(&[9, 4, 0]), 1..3);
            let expected = [&reference[4 * columns..5 * columns], &reference[..columns]].concat();
            assert_eq!(listed, expected, "{isa:?} {length}: listed rows");
        }
    }
}

#[test]
fn activations_are_rounded_as_bfloat16_is_and_a_nan_stays_one() {
    let one = [bf16::ONE.to_bits()];
    let halfway = 1.0 + f32::EPSILON * 32768.0;
    let below = f32::from_bits(halfway.to_bits() - 1);
    let values = [
        halfway,
        below,
        -3.2,
        1e30,
        f32::INFINITY,
        f32::NAN,
        0.0,
        -65504.0,
    ];
    for isa in Isa::available() {
        for value in values {
            let [found] = paired(isa, &one, &[value], 1, Rows::From(0), 0..1)[..] else {
                panic!("one value")
            };
            let expected = bf16::from_f32(value).to_f32();
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{isa:?} {value}: {found} {expected}"
            );
        }
    }
}

/// Elementwise exponentials through the silu kernel: `silu(x) = x / (1 + e^-x)`.
#[test]
fn silu_is_accurate_and_equal_on_every_instruction_set() {
    let gate: Vec<f32> = (-2000..2000).map(|n| n as f32 * 0.05).collect();
    let up = vec![1.0; gate.len()];
    let run = |isa: Isa| {
        let mut out = vec![0.0f32; gate.len()];
        let kernel = SiluProduct {
            gate: gate.as_ptr(),
            up: up.as_ptr(),
            out: out.as_mut_ptr(),
            length: gate.len(),
        };
        // SAFETY: three buffers of the same length.
        unsafe { isa.run(kernel) };
        out
    };
    let reference = run(Isa::Portable);
    for (x, found) in gate.iter().zip(&reference) {
        let x = f64::from(*x);
        let exact = x / (1.0 + (-x).exp());
        let error = (f64::from(*found) - exact).abs();
        assert!(error <= exact.abs() * 1e-6 + 1e-35, "{x}: {found} {exact}");
    }
    for isa in Isa::available() {
        assert_eq!(run(isa), reference, "{isa:?}");
    }
}

#[test]
fn norm_may_work_in_place_and_matches_its_definition() {
    for length in [1, 15, 16, 17, 64, 100] {
        let input = noise(length as u64, length);
        let weight = noise(3, length);
        let squares: f64 = input.iter().map(|x| f64::from(*x).powi(2)).sum();
        let rms = (squares / length as f64 + 1e-6).sqrt();
        for isa in Isa::available() {
            let mut values = input.clone();
            let start = values.as_mut_ptr();
            let kernel = RmsNorm {
                input: start,
                weight: weight.as_ptr(),
                out: start,
                length,
                epsilon: 1e-6,
            };
            // SAFETY: buffers of `length` values.
            unsafe { isa.run(kernel) };
            for ((x, w), found) in input.iter().zip(&weight).zip(&values) {
                let exact = f64::from(*x) / rms * f64::from(*w);
                assert!(
                    (f64::from(*found) - exact).abs() < 1e-5,
                    "{isa:?} {found} {exact}"
                );
            }
        }
    }
}

#[test]
fn a_nan_is_not_swallowed() {
    for isa in Isa::available() {
        let mut gate = [1.0, f32::NAN, 2.0];
        let start = gate.as_mut_ptr();
        let kernel = SiluProduct {
            gate: start,
            up: [1.0f32; 3].as_ptr(),
            out: start,
            length: 3,
        };
        // SAFETY: three buffers of three values.
        unsafe { isa.run(kernel) };
        assert!(
            gate[1].is_nan() && gate[0].is_finite() && gate[2].is_finite(),
            "{isa:?}"
        );
    }
}

#[derive(Clone, Debug)]
struct Attention {
    latent: usize,
    rope: usize,
    heads: usize,
    context: usize,
    block_size: usize,
    scale: f32,
}

fn attention() -> impl Strategy<Value = Attention> {
    (
        1usize..70,
        1usize..20,
        1usize..10,
        1usize..200,
        1usize..33,
        0.01f32..20.0,
    )
        .prop_map(
            |(latent, rope, heads, context, block_size, scale)| Attention {
                latent,
                rope,
                heads,
                context,
                block_size,
                scale,
            },
        )
}

/// Keeps the temporary out of the caller's way: the kernel reads, never keeps.
fn attend(
    isa: Isa,
    shape: &Attention,
    cache: &[f32],
    blocks: &[BlockId],
    latent: &[f32],
    rotated: &[f32],
) -> Vec<f32> {
    let mut out = vec![f32::NAN; shape.heads * shape.latent];
    let kernel = Attend {
        cache: cache.as_ptr(),
        blocks,
        block_size: shape.block_size,
        context: shape.context,
        latent: shape.latent,
        rope: shape.rope,
        scale: shape.scale,
        latent_queries: latent.as_ptr(),
        rotated_queries: rotated.as_ptr(),
        rotated_stride: shape.rope,
        out: out.as_mut_ptr(),
        heads: shape.heads,
    };
    // SAFETY: the cache holds all blocks; queries and output hold all heads.
    unsafe { isa.run(kernel) };
    out
}

/// Which threads compute which splits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    /// One thread all of them.
    None,
    /// Each on its own, so many merged at a time.
    Splits(usize),
}

/// Latent attention in pairs; each token has the heads' queries and a context one longer than the one before.
fn attend_paired(
    isa: Isa,
    shape: &Attention,
    cache: &[bf16],
    blocks: &[BlockId],
    (latent, rotated): (&[f32], &[f32]),
    (tokens, cut): (usize, Cut),
) -> Vec<f32> {
    let mut out = vec![f32::NAN; tokens * shape.heads * shape.latent];
    let (latent, rotated) = (narrowed(latent), narrowed(rotated));
    let key_width = shape.latent + shape.rope;
    // Whatever the last task left there must not matter.
    let mut scratch = vec![0x7fc0_7fc0; scratch_length(key_width, shape.latent)];
    let lanes: Vec<Query> = (0..tokens * shape.heads)
        .map(|lane| Query {
            first: latent[lane * shape.latent..].as_ptr(),
            second: rotated[lane * shape.rope..].as_ptr(),
            context: shape.context - (tokens - 1) + lane / shape.heads,
            out: out[lane * shape.latent..].as_mut_ptr(),
        })
        .collect();
    let queries = Queries {
        cached: Cached {
            start: cache.as_ptr().cast(),
            blocks,
            block_size: shape.block_size,
            block_stride: shape.block_size * key_width,
            key_stride: key_width,
            value_skip: 0,
            key_width,
            value_width: shape.latent,
        },
        lanes: &lanes,
        first_width: shape.latent,
        scale: shape.scale,
    };
    let scratch = scratch.as_mut_ptr();
    let Cut::Splits(together) = cut else {
        // SAFETY: the cache holds all blocks; queries and output hold all heads.
        unsafe { isa.run_paired(AttendAll { queries, scratch }) };
        return out;
    };
    let count = shape.context.div_ceil(SPLIT);
    let stride = PANEL * shape.latent;
    let mut sums = vec![f32::NAN; count * stride];
    let mut splits = vec![Running::default(); count];
    let mut running = Running::default();
    for split in (0..count).rev() {
        let kernel = AttendSplit {
            queries,
            start: split * SPLIT,
            scratch,
            sums: sums[split * stride..].as_mut_ptr(),
            running: &raw mut splits[split],
        };
        // SAFETY: as above.
        unsafe { isa.run_paired(kernel) };
    }
    for first in (0..count).step_by(together) {
        let kernel = MergeSplits {
            queries,
            count: together.min(count - first),
            sums: sums[first * stride..].as_mut_ptr(),
            splits: &raw const splits[first],
            running: &raw mut running,
            is_first: first == 0,
            is_last: first + together >= count,
        };
        // SAFETY: as above.
        unsafe { isa.run_paired(kernel) };
    }
    out
}

/// All heads' outputs in float64.
fn exact_attention(
    shape: &Attention,
    cache: &[f32],
    blocks: &[BlockId],
    latent: &[f32],
    rotated: &[f32],
) -> Vec<f64> {
    let width = shape.latent + shape.rope;
    let row = |p: usize| {
        let slot = blocks[p / shape.block_size].index() * shape.block_size + p % shape.block_size;
        &cache[slot * width..(slot + 1) * width]
    };
    let mut out = Vec::new();
    for head in 0..shape.heads {
        let query: Vec<f32> = latent[head * shape.latent..(head + 1) * shape.latent]
            .iter()
            .chain(&rotated[head * shape.rope..(head + 1) * shape.rope])
            .copied()
            .collect();
        let scores: Vec<f64> = (0..shape.context)
            .map(|p| {
                let dot: f64 = row(p)
                    .iter()
                    .zip(&query)
                    .map(|(k, q)| f64::from(*k) * f64::from(*q))
                    .sum();
                dot * f64::from(shape.scale)
            })
            .collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
        out.extend((0..shape.latent).map(|at| {
            let terms = scores.iter().enumerate();
            terms
                .map(|(p, score)| (score - highest).exp() / total * f64::from(row(p)[at]))
                .sum::<f64>()
        }));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn attention_is_a_softmax_over_the_context_whatever_the_blocks(shape in attention(), seed in 1u64..1000) {
        let width = shape.latent + shape.rope;
        let count = shape.context.div_ceil(shape.block_size);
        // Blocks in reverse order, in a cache with one to spare.
        let blocks: Vec<BlockId> = (0..count).map(|n| BlockId((count - n) as u32)).collect();
        let cache = noise(seed, (count + 1) * shape.block_size * width);
        let latent = noise(seed + 1, shape.heads * shape.latent);
        let rotated = noise(seed + 2, shape.heads * shape.rope);
        let found = attend(Isa::Portable, &shape, &cache, &blocks, &latent, &rotated);
        for isa in Isa::available() {
            prop_assert_eq!(&attend(isa, &shape, &cache, &blocks, &latent, &rotated), &found);
        }
        let exact = exact_attention(&shape, &cache, &blocks, &latent, &rotated);
        for (value, exact) in found.iter().zip(exact) {
            prop_assert!((f64::from(*value) - exact).abs() < 2e-4, "{} {}", value, exact);
        }
    }

    #[test]
    fn paired_attention_is_the_same_softmax_of_rounded_values(shape in attention(), tokens in 1usize..7, seed in 1u64..1000) {
        paired_attention(shape, tokens, seed)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn a_long_context_is_the_same_however_its_splits_are_spread(
        shape in attention(),
        context in SPLIT - 3..4 * SPLIT,
        tokens in 1usize..7,
        seed in 1u64..1000,
    ) {
        paired_attention(Attention { context, ..shape }, tokens, seed)?;
    }
}

fn paired_attention(shape: Attention, tokens: usize, seed: u64) -> Result<(), TestCaseError> {
    let tokens = tokens.min(shape.context).min(PANEL / shape.heads);
    let width = shape.latent + shape.rope;
    let count = shape.context.div_ceil(shape.block_size);
    let blocks: Vec<BlockId> = (0..count).map(|n| BlockId((count - n) as u32)).collect();
    let round =
        |values: Vec<f32>| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() };
    let widen =
        |values: &[bf16]| -> Vec<f32> { values.iter().map(|value| value.to_f32()).collect() };
    let cache = round(noise(seed, (count + 1) * shape.block_size * width));
    // Queries that are bfloat16 already, so that only the probabilities are rounded on the way.
    let latent = widen(&round(noise(seed + 1, tokens * shape.heads * shape.latent)));
    let rotated = widen(&round(noise(seed + 2, tokens * shape.heads * shape.rope)));
    let run = |isa, cut| {
        attend_paired(
            isa,
            &shape,
            &cache,
            &blocks,
            (&latent, &rotated),
            (tokens, cut),
        )
    };
    let found = run(Isa::Portable, Cut::None);
    for isa in Isa::available() {
        for cut in [Cut::None, Cut::Splits(1), Cut::Splits(3)] {
            prop_assert_eq!(&run(isa, cut), &found, "{:?} {:?}", isa, cut);
        }
    }
    for token in 0..tokens {
        let context = shape.context - (tokens - 1) + token;
        let of_token =
            |width: usize| token * shape.heads * width..(token + 1) * shape.heads * width;
        let alone = Attention {
            context,
            ..shape.clone()
        };
        let (latent, rotated) = (
            &latent[of_token(shape.latent)],
            &rotated[of_token(shape.rope)],
        );
        let exact = exact_attention(&alone, &widen(&cache), &blocks, latent, rotated);
        for (value, exact) in found[of_token(shape.latent)].iter().zip(exact) {
            // Probabilities have 2^-9 of relative error each, values are below one.
            prop_assert!(
                (f64::from(*value) - exact).abs() < 4e-3,
                "{} {}",
                value,
                exact
            );
        }
        // A token is the same alone and among others, and so is a head.
        let single = attend_paired(
            Isa::best(),
            &alone,
            &cache,
            &blocks,
            (latent, rotated),
            (1, Cut::None),
        );
        prop_assert_eq!(&single[..], &found[of_token(shape.latent)]);
        let last = shape.heads - 1;
        let alone = Attention { heads: 1, ..alone };
        let (latent, rotated) = (
            &latent[last * shape.latent..],
            &rotated[last * shape.rope..],
        );
        let head = attend_paired(
            Isa::best(),
            &alone,
            &cache,
            &blocks,
            (latent, rotated),
            (1, Cut::None),
        );
        prop_assert_eq!(&head[..], &single[last * shape.latent..]);
    }
    Ok(())
}
