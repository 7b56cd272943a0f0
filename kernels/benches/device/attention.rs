//! Cache writes, decode over both kinds of cache, prefill.

use kernels::params::{
    Address, CacheWriteParams, GqaCacheWriteParams, GqaDecodeParams, MlaCombineParams,
    MlaDecodeParams, MlaPrefillParams, RopeParams,
};
use kernels::plan::{self, Format, MLA_SPLIT_TOKENS, Tables};

use crate::Maker;
use crate::build::{Builder, Case, table};
use crate::compare::Kind;
use crate::harness::Lab;

const LATENT: usize = 512;
const ROTARY: usize = 64;
const BLOCK: usize = 64;

pub fn cases(small: bool) -> Vec<(String, Maker)> {
    let mut all: Vec<(String, Maker)> = Vec::new();
    for rows in if small { [1, 7] } else { [64, 4096] } {
        for form in [Format::Bf16, Format::Fp8] {
            all.push((
                format!("mla_cache_write {form:?} {rows}"),
                Box::new(move |lab| mla_write(lab, form, rows)),
            ));
        }
        all.push((
            format!("rope {rows}x128x64"),
            Box::new(move |lab| rope(lab, rows)),
        ));
        all.push((
            format!("gqa_cache_write {rows}x32/4x128"),
            Box::new(move |lab| gqa_write(lab, rows, [32, 4, 128])),
        ));
    }
    let decode: &[(usize, usize)] = if small {
        &[(2, 70)]
    } else {
        &[(1, 4096), (64, 4096)]
    };
    for &(rows, context) in decode {
        for heads in if small { [3, 16] } else { [16, 128] } {
            for form in [Format::Bf16, Format::Fp8] {
                all.push((
                    format!("mla_decode {form:?} {rows}x{context}, {heads} heads"),
                    Box::new(move |lab| mla_decode(lab, form, rows, context, heads)),
                ));
            }
            all.push((
                format!("hopper_mla_decode {rows}x{context}, {heads} heads"),
                Box::new(move |lab| hopper_mla_decode(lab, rows, context, heads, Tables::Own)),
            ));
        }
        // Qwen3-30B-A3B, Llama-3-8B, Qwen2.5-0.5B.
        for shape in [[32, 4, 128], [32, 8, 128], [14, 2, 64]] {
            let [heads, kv_heads, width] = shape;
            all.push((
                format!("gqa_decode {rows}x{context}, {heads}/{kv_heads}x{width}"),
                Box::new(move |lab| gqa(lab, rows, context, shape, Tables::Own)),
            ));
        }
    }
    // A chunk of a prompt: rows over one table, all of which see the whole context here.
    let (chunk, context) = if small { (5, 70) } else { (128, 4096) };
    for heads in if small { [3, 16] } else { [16, 128] } {
        all.push((
            format!("hopper_mla_decode chunk {chunk}x{context}, {heads} heads"),
            Box::new(move |lab| hopper_mla_decode(lab, chunk, context, heads, Tables::Shared)),
        ));
    }
    for shape in [[32, 4, 128], [32, 8, 128], [14, 2, 64]] {
        let [heads, kv_heads, width] = shape;
        all.push((
            format!("gqa_prefill chunk {chunk}x{context}, {heads}/{kv_heads}x{width}"),
            Box::new(move |lab| gqa(lab, chunk, context, shape, Tables::Shared)),
        ));
    }
    for length in if small { vec![33] } else { vec![1024, 4096] } {
        let heads = if small { 2 } else { 16 };
        all.push((
            format!("mla_prefill {length}, {heads} heads"),
            Box::new(move |lab| prefill(lab, length, heads, Generation::Any)),
        ));
        all.push((
            format!("hopper_mla_prefill {length}, {heads} heads"),
            Box::new(move |lab| prefill(lab, length, heads, Generation::Hopper)),
        ));
    }
    all
}

fn mla_write(lab: &mut Lab, form: Format, rows: usize) -> Case {
    let mut b = Builder::new(lab);
    let (width, row_bytes) = (LATENT + ROTARY, plan::mla_row_bytes(form, LATENT, ROTARY));
    let slots: Vec<i64> = b.shuffled(rows).iter().map(|s| i64::from(*s)).collect();
    let positions = b.below(rows, 100);
    let params = CacheWriteParams {
        kv: b.bf16s(rows * width, 2.0),
        weight: b.bf16s(LATENT, 1.0),
        positions: b.values(&positions),
        slots: b.values(&slots),
        table: b.values(&table(100, ROTARY)),
        cache: match form {
            Format::Bf16 => b.out("cache", Kind::Bf16, rows * width),
            Format::Fp8 => b.out("cache", Kind::Bytes, rows * row_bytes),
        },
        slots_count: rows as i64,
        rows: rows as i32,
        kv_stride: width as i32,
        latent: LATENT as i32,
        rotary: ROTARY as i32,
        positions_max: 100,
        eps: 1e-6,
    };
    b.step(plan::mla_cache_write(form, rows, LATENT, ROTARY), params);
    b.finish(
        rows * (width * 2 + row_bytes),
        rows * (4 * LATENT + 3 * ROTARY),
    )
}

fn rope(lab: &mut Lab, rows: usize) -> Case {
    let mut b = Builder::new(lab);
    let (heads, width) = (128, 192);
    let positions = b.below(rows, 100);
    let params = RopeParams {
        x: b.bf16s(rows * heads * width, 2.0),
        positions: b.values(&positions),
        table: b.values(&table(100, ROTARY)),
        rows: rows as i32,
        heads: heads as i32,
        row_stride: (heads * width) as i32,
        head_stride: width as i32,
        offset: 128,
        rotary: ROTARY as i32,
        positions_max: 100,
        half_split: 0,
    };
    b.step(plan::rope(rows, heads, ROTARY), params);
    b.finish(rows * heads * ROTARY * 4, rows * heads * ROTARY * 3)
}

fn gqa_write(lab: &mut Lab, rows: usize, [heads, kv_heads, width]: [usize; 3]) -> Case {
    let mut b = Builder::new(lab);
    let blocks = rows.div_ceil(BLOCK);
    let slots: Vec<i64> = (0..rows as i64).collect();
    let positions = b.below(rows, 100);
    let params = GqaCacheWriteParams {
        q: b.bf16s(rows * heads * width, 2.0),
        k: b.bf16s(rows * kv_heads * width, 2.0),
        v: b.bf16s(rows * kv_heads * width, 2.0),
        q_bias: Address::NULL,
        k_bias: Address::NULL,
        v_bias: Address::NULL,
        q_norm: b.bf16s(width, 1.0),
        k_norm: b.bf16s(width, 1.0),
        positions: b.values(&positions),
        slots: b.values(&slots),
        table: b.values(&table(100, width)),
        cache: b.out("cache", Kind::Bf16, blocks * BLOCK * kv_heads * 2 * width),
        slots_count: (blocks * BLOCK) as i64,
        rows: rows as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        width: width as i32,
        block_size: BLOCK as i32,
        q_stride: (heads * width) as i32,
        kv_stride: (kv_heads * width) as i32,
        positions_max: 100,
        q_eps: 1e-6,
        k_eps: 1e-6,
    };
    b.step(plan::gqa_cache_write(rows, heads, kv_heads, width), params);
    let values = rows * (heads + 2 * kv_heads) * width;
    b.finish(values * 4, values * 7)
}

/// Where the rows' blocks lie: scattered, `context` tokens each.
fn tables(b: &mut Builder, rows: usize, context: usize) -> (usize, Address, Address) {
    let per_row = context.div_ceil(BLOCK);
    let order = b.shuffled(rows * per_row);
    let (blocks, lengths) = (b.values(&order), b.values(&vec![context as i32; rows]));
    (per_row, blocks, lengths)
}

struct Parts {
    rows: usize,
    heads: usize,
    width: usize,
    splits: usize,
    partial: Address,
    lse: Address,
    lengths: Address,
}

impl Parts {
    fn new(
        b: &mut Builder,
        rows: usize,
        heads: usize,
        width: usize,
        context: usize,
        lengths: Address,
    ) -> Self {
        let splits = plan::mla_splits(context);
        Self {
            rows,
            heads,
            width,
            splits,
            partial: b.room(rows * heads * splits * width * 4),
            lse: b.out("lse", Kind::Float, rows * heads * splits),
            lengths,
        }
    }

    fn merge(&self, b: &mut Builder) {
        let (rows, heads, width) = (self.rows, self.heads, self.width);
        let params = MlaCombineParams {
            partial: self.partial,
            lse: self.lse,
            lengths: self.lengths,
            out: b.out("out", Kind::Bf16, rows * heads * width),
            rows: rows as i32,
            heads: heads as i32,
            splits: self.splits as i32,
            split_tokens: MLA_SPLIT_TOKENS as i32,
            latent: width as i32,
            out_row: (heads * width) as i32,
            out_head: width as i32,
            reserved: 0,
        };
        b.step(plan::mla_combine(rows, heads), params);
    }
}

fn mla_decode(lab: &mut Lab, form: Format, rows: usize, context: usize, heads: usize) -> Case {
    let mut b = Builder::new(lab);
    let (per_row, blocks, lengths) = tables(&mut b, rows, context);
    let slots = rows * per_row * BLOCK;
    let cache = match form {
        Format::Bf16 => b.bf16s(slots * (LATENT + ROTARY), 1.0),
        Format::Fp8 => {
            let row = fp8_row(&mut b);
            b.values(&row.repeat(slots))
        }
    };
    let parts = Parts::new(&mut b, rows, heads, LATENT, context, lengths);
    let launch = plan::mla_decode(form, rows, heads, LATENT, ROTARY, parts.splits);
    let params = mla_params(&mut b, &parts, [cache, blocks], per_row);
    b.step(launch, params);
    parts.merge(&mut b);
    let bytes = rows * context * plan::mla_row_bytes(form, LATENT, ROTARY);
    b.finish(bytes, mla_flops(rows, context, heads))
}

fn hopper_mla_decode(
    lab: &mut Lab,
    rows: usize,
    context: usize,
    heads: usize,
    shared: Tables,
) -> Case {
    let mut b = Builder::new(lab);
    let contexts = match shared {
        Tables::Own => rows,
        Tables::Shared => 1,
    };
    let (per_row, blocks, _) = tables(&mut b, contexts, context);
    let lengths = b.values(&vec![context as i32; rows]);
    let cache = b.bf16s(contexts * per_row * BLOCK * (LATENT + ROTARY), 1.0);
    let parts = Parts::new(&mut b, rows, heads, LATENT, context, lengths);
    let launch = plan::hopper_mla_decode(rows, heads, LATENT, ROTARY, parts.splits, shared);
    let stride = match shared {
        Tables::Own => per_row,
        Tables::Shared => 0,
    };
    let params = mla_params(&mut b, &parts, [cache, blocks], stride);
    b.step(launch, params);
    parts.merge(&mut b);
    let bytes = contexts * context * plan::mla_row_bytes(Format::Bf16, LATENT, ROTARY);
    b.finish(bytes, mla_flops(rows, context, heads))
}

fn mla_flops(rows: usize, context: usize, heads: usize) -> usize {
    rows * context * heads * 2 * (LATENT + ROTARY + LATENT)
}

/// Decode of rows with random queries over blocks of a cache.
fn mla_params(
    b: &mut Builder,
    parts: &Parts,
    [cache, blocks]: [Address; 2],
    blocks_stride: usize,
) -> MlaDecodeParams {
    let (rows, heads, width) = (parts.rows, parts.heads, LATENT + ROTARY);
    let queries = b.bf16s(rows * heads * width, 1.0);
    MlaDecodeParams {
        q_latent: queries,
        q_rope: queries.offset(LATENT as u64 * 2),
        cache,
        blocks,
        lengths: parts.lengths,
        partial: parts.partial,
        lse: parts.lse,
        rows: rows as i32,
        heads: heads as i32,
        ql_row: (heads * width) as i32,
        ql_head: width as i32,
        qr_row: (heads * width) as i32,
        qr_head: width as i32,
        block_size: BLOCK as i32,
        blocks_stride: blocks_stride as i32,
        splits: parts.splits as i32,
        split_tokens: MLA_SPLIT_TOKENS as i32,
        scale: 0.07,
        reserved: 0,
    }
}

/// A token's row of the fp8 form.
fn fp8_row(b: &mut Builder) -> Vec<u8> {
    let mut row: Vec<u8> = b
        .below(LATENT, 0x70)
        .iter()
        .map(|code| *code as u8)
        .collect();
    for scale in [1.0f32, 0.5, 0.25, 0.125] {
        row.extend((scale / 448.0).to_le_bytes());
    }
    // bf16 near a half: exponent bits set, the rest any.
    row.extend(
        b.below(ROTARY, 256)
            .iter()
            .flat_map(|low| [*low as u8, 0x3E]),
    );
    row
}

/// Rows over contexts of their own, or a chunk over one.
fn gqa(
    lab: &mut Lab,
    rows: usize,
    context: usize,
    [heads, kv_heads, width]: [usize; 3],
    shared: Tables,
) -> Case {
    let mut b = Builder::new(lab);
    let (contexts, plan): (_, fn(_, _, _, _, _) -> _) = match shared {
        Tables::Own => (rows, plan::gqa_decode),
        Tables::Shared => (1, plan::gqa_prefill),
    };
    let (per_row, blocks, _) = tables(&mut b, contexts, context);
    let lengths = b.values(&vec![context as i32; rows]);
    let cache = b.bf16s(contexts * per_row * BLOCK * kv_heads * 2 * width, 1.0);
    let parts = Parts::new(&mut b, rows, heads, width, context, lengths);
    let params = GqaDecodeParams {
        q: b.bf16s(rows * heads * width, 1.0),
        cache,
        blocks,
        lengths,
        partial: parts.partial,
        lse: parts.lse,
        rows: rows as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        q_row: (heads * width) as i32,
        block_size: BLOCK as i32,
        blocks_stride: match shared {
            Tables::Own => per_row as i32,
            Tables::Shared => 0,
        },
        splits: parts.splits as i32,
        split_tokens: MLA_SPLIT_TOKENS as i32,
        scale: (width as f32).powf(-0.5),
        reserved: 0,
    };
    b.step(plan(rows, heads, kv_heads, width, parts.splits), params);
    parts.merge(&mut b);
    let bytes = contexts * context * kv_heads * width * 4;
    b.finish(bytes, rows * context * heads * width * 4)
}

/// Which devices a kernel is for.
#[derive(Clone, Copy)]
enum Generation {
    Any,
    Hopper,
}

fn prefill(lab: &mut Lab, length: usize, heads: usize, generation: Generation) -> Case {
    let mut b = Builder::new(lab);
    let (nope, rotary, value) = (128, 64, 128);
    let offsets = b.values(&[0, length as i32]);
    let params = MlaPrefillParams {
        q: b.bf16s(length * heads * (nope + rotary), 1.0),
        kv: b.bf16s(length * heads * (nope + value), 1.0),
        k_rope: b.bf16s(length * rotary, 1.0),
        out: b.out("out", Kind::Bf16, length * heads * value),
        lse: b.out("lse", Kind::Float, length * heads),
        q_offsets: offsets,
        k_offsets: offsets,
        sequences: 1,
        heads: heads as i32,
        q_row: (heads * (nope + rotary)) as i32,
        q_head: (nope + rotary) as i32,
        kv_row: (heads * (nope + value)) as i32,
        kv_head: (nope + value) as i32,
        rope_row: rotary as i32,
        out_row: (heads * value) as i32,
        out_head: value as i32,
        scale: 0.07,
        reserved: [0; 2],
    };
    let plan = match generation {
        Generation::Any => plan::mla_prefill,
        Generation::Hopper => plan::hopper_mla_prefill,
    };
    b.step(plan(1, length, heads, nope, rotary, value), params);
    let bytes = length * heads * 2 * (nope + rotary + nope + 2 * value);
    b.finish(
        bytes,
        length * length / 2 * heads * 2 * (nope + rotary + value),
    )
}
