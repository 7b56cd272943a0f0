//! The kernel against float64, and every instruction set against every other.

use engine_core::BlockId;
use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::kernels::{Isa, tests::noise};

#[derive(Clone, Debug)]
struct Shape {
    width: usize,
    heads: usize,
    kv_heads: usize,
    context: usize,
    block_size: usize,
    scale: f32,
}

fn shape() -> impl Strategy<Value = Shape> {
    (
        1usize..140,
        1usize..=HEADS_MAX,
        1usize..4,
        1usize..200,
        1usize..33,
        0.01f32..20.0,
    )
        .prop_map(
            |(width, heads, kv_heads, context, block_size, scale)| Shape {
                width,
                heads,
                kv_heads,
                context,
                block_size,
                scale,
            },
        )
}

/// Attention of `shape.heads` query heads with key-value head `head`.
fn attend<C: Element>(
    isa: Isa,
    shape: &Shape,
    head: usize,
    cache: &[C],
    blocks: &[BlockId],
    queries: &[f32],
) -> Vec<f32> {
    let mut out = vec![f32::NAN; shape.heads * shape.width];
    let per_head = 2 * shape.block_size * shape.width;
    let kernel = AttendGrouped {
        cache: cache[head * per_head..].as_ptr(),
        block_stride: shape.kv_heads * per_head,
        blocks,
        block_size: shape.block_size,
        context: shape.context,
        width: shape.width,
        scale: shape.scale,
        queries: queries.as_ptr(),
        out: out.as_mut_ptr(),
        heads: shape.heads,
    };
    // SAFETY: the cache holds all blocks of all key-value heads; queries and output hold all heads.
    unsafe { isa.run(kernel) };
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn grouped_attention_is_a_softmax_over_the_context_whatever_the_blocks(shape in shape(), seed in 1u64..1000) {
        let count = shape.context.div_ceil(shape.block_size);
        // Blocks in reverse order, in a cache with one to spare.
        let blocks: Vec<BlockId> = (0..count).map(|n| BlockId((count - n) as u32)).collect();
        let per_block = 2 * shape.kv_heads * shape.block_size * shape.width;
        let narrow: Vec<bf16> = noise(seed, (count + 1) * per_block).into_iter().map(bf16::from_f32).collect();
        let cache: Vec<f32> = narrow.iter().map(|value| value.to_f32()).collect();
        let queries = noise(seed + 1, shape.heads * shape.width);
        let head = shape.kv_heads - 1;
        let found = attend(Isa::Portable, &shape, head, &cache, &blocks, &queries);
        for isa in Isa::available() {
            prop_assert_eq!(&attend(isa, &shape, head, &cache, &blocks, &queries), &found);
            prop_assert_eq!(&attend(isa, &shape, head, &narrow, &blocks, &queries), &found);
            // A head alone has the bytes it has in its group.
            let alone = Shape { heads: 1, ..shape.clone() };
            let last = (shape.heads - 1) * shape.width;
            prop_assert_eq!(&attend(isa, &alone, head, &cache, &blocks, &queries[last..]), &found[last..]);
        }
        let row = |p: usize, is_value: bool| {
            let part = 2 * head + usize::from(is_value);
            let block = blocks[p / shape.block_size].index() * per_block;
            let start = block + (part * shape.block_size + p % shape.block_size) * shape.width;
            &cache[start..start + shape.width]
        };
        for (query, out) in queries.chunks(shape.width).zip(found.chunks(shape.width)) {
            let scores: Vec<f64> = (0..shape.context)
                .map(|p| {
                    let dot: f64 = row(p, false).iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum();
                    dot * f64::from(shape.scale)
                })
                .collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
            for (at, value) in out.iter().enumerate() {
                let exact: f64 = scores
                    .iter()
                    .enumerate()
                    .map(|(p, score)| (score - highest).exp() / total * f64::from(row(p, true)[at]))
                    .sum();
                prop_assert!((f64::from(*value) - exact).abs() < 2e-4, "{} {}", value, exact);
            }
        }
    }
}

#[test]
fn a_nan_in_the_cache_reaches_the_output() {
    let shape = Shape {
        width: 20,
        heads: 5,
        kv_heads: 1,
        context: 70,
        block_size: 8,
        scale: 1.0,
    };
    let blocks: Vec<BlockId> = (0..9).map(BlockId).collect();
    let mut cache = noise(7, 9 * 2 * 8 * 20);
    cache[3] = f32::NAN;
    for isa in Isa::available() {
        let queries = noise(8, 100);
        let found = attend(isa, &shape, 0, &cache, &blocks, &queries);
        assert!(found.iter().all(|value| value.is_nan()), "{isa:?}");
    }
}
