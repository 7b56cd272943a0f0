//! Row operations, the gate, sampling.

use kernels::params::{
    ActivationParams, Address, CombineParams, CopyBlocksParams, EmbedParams, GateParams,
    GreedyParams, LogprobsParams, RmsNormParams, SampleAdjustParams, SampleParams,
    ShareColumnsParams,
};
use kernels::plan::{self, Activation, Format, QUANT_GROUP};

use crate::Maker;
use crate::build::{Builder, Case};
use crate::compare::Kind;
use crate::harness::Lab;

pub fn cases(small: bool) -> Vec<(String, Maker)> {
    let mut all: Vec<(String, Maker)> = Vec::new();
    let rows: &[usize] = if small { &[1, 7] } else { &[1, 64, 4096] };
    let (hidden, inner, vocabulary) = if small {
        (256, 384, 700)
    } else {
        (7168, 2048, 129_280)
    };
    for &rows in rows {
        for format in [Format::Bf16, Format::Fp8] {
            all.push((
                format!("rms_norm {format:?} {rows}x{hidden}"),
                Box::new(move |lab| norm(lab, format, rows, hidden)),
            ));
            all.push((
                format!("swiglu {format:?} {rows}x{inner}"),
                Box::new(move |lab| activation(lab, Activation::Swiglu(format), rows, inner)),
            ));
        }
        all.push((
            format!("quantise {rows}x{hidden}"),
            Box::new(move |lab| activation(lab, Activation::Quantise, rows, hidden)),
        ));
        all.push((
            format!("embed {rows}x{hidden}"),
            Box::new(move |lab| embed(lab, rows, hidden, vocabulary / 10)),
        ));
        let experts = if small { 32 } else { 256 };
        all.push((
            format!("gate {rows}x{experts}"),
            Box::new(move |lab| gate(lab, rows, experts)),
        ));
        all.push((
            format!("combine {rows}x8x{hidden}"),
            Box::new(move |lab| combine(lab, rows, 8, hidden)),
        ));
    }
    for rows in if small { [1, 3] } else { [1, 64] } {
        all.push((
            format!("greedy {rows}x{vocabulary}"),
            Box::new(move |lab| greedy(lab, rows, vocabulary)),
        ));
        all.push((
            format!("sample_adjust {rows}x{vocabulary}"),
            Box::new(move |lab| adjust(lab, rows, vocabulary)),
        ));
        for (name, top_k, top_p) in [("all", 0, 1.0), ("top 50, 0.9", 50, 0.9)] {
            all.push((
                format!("sample {name} {rows}x{vocabulary}"),
                Box::new(move |lab| sample(lab, rows, vocabulary, top_k, top_p)),
            ));
        }
        all.push((
            format!("logprobs 5 {rows}x{vocabulary}"),
            Box::new(move |lab| logprobs(lab, rows, vocabulary)),
        ));
    }
    let (pairs, layers) = if small { (2, 2) } else { (16, 61) };
    all.push((
        format!("copy_blocks {pairs}x{layers}x{}", 64 * 1152),
        Box::new(move |lab| copy(lab, pairs, layers, 64 * 1152)),
    ));
    for unpack in [false, true] {
        let rows = if small { 3 } else { 256 };
        let what = if unpack { "unpack" } else { "pack" };
        all.push((
            format!("share_columns {what} {rows}x{hidden} of 8 ranks"),
            Box::new(move |lab| share(lab, rows, hidden, unpack)),
        ));
    }
    all
}

fn norm(lab: &mut Lab, format: Format, rows: usize, width: usize) -> Case {
    let mut b = Builder::new(lab);
    let params = RmsNormParams {
        x: b.bf16s(rows * width, 1.0),
        residual: b.bf16s(rows * width, 1.0),
        weight: b.bf16s(width, 1.0),
        out: match format {
            Format::Bf16 => b.out("out", Kind::Bf16, rows * width),
            Format::Fp8 => b.out("codes", Kind::Bytes, rows * width),
        },
        scales: match format {
            Format::Bf16 => Address::NULL,
            Format::Fp8 => b.out("scales", Kind::Float, rows * width.div_ceil(QUANT_GROUP)),
        },
        rows: rows as i32,
        width: width as i32,
        x_stride: width as i32,
        out_stride: width as i32,
        eps: 1e-6,
        power_of_two_scales: 0,
    };
    b.step(plan::rms_norm(format, rows, width), params);
    let out = if format == Format::Bf16 { 2 } else { 1 };
    b.finish(rows * width * (6 + out), rows * width * 4)
}

fn activation(lab: &mut Lab, what: Activation, rows: usize, width: usize) -> Case {
    let mut b = Builder::new(lab);
    let narrow = what != Activation::Swiglu(Format::Bf16);
    let read = if what == Activation::Quantise { 1 } else { 2 };
    let params = ActivationParams {
        x: b.bf16s(rows * width * read, 3.0),
        out: match narrow {
            false => b.out("out", Kind::Bf16, rows * width),
            true => b.out("codes", Kind::Bytes, rows * width),
        },
        scales: match narrow {
            false => Address::NULL,
            true => b.out("scales", Kind::Float, rows * width.div_ceil(QUANT_GROUP)),
        },
        rows: rows as i32,
        width: width as i32,
        x_stride: (read * width) as i32,
        out_stride: width as i32,
        power_of_two_scales: 0,
        scales_stride: width.div_ceil(QUANT_GROUP) as i32,
    };
    b.step(plan::activation(what, rows, width), params);
    let written = if narrow { 1 } else { 2 };
    b.finish(rows * width * (2 * read + written), rows * width * 5)
}

fn embed(lab: &mut Lab, rows: usize, width: usize, vocabulary: usize) -> Case {
    let mut b = Builder::new(lab);
    let tokens: Vec<u32> = b
        .below(rows, vocabulary)
        .iter()
        .map(|t| *t as u32)
        .collect();
    let params = EmbedParams {
        table: b.bf16s(vocabulary * width, 1.0),
        tokens: b.values(&tokens),
        out: b.out("out", Kind::Bf16, rows * width),
        rows: rows as i32,
        width: width as i32,
        vocabulary: vocabulary as i32,
        elsewhere: 0,
    };
    b.step(plan::embed(rows, width), params);
    b.finish(rows * width * 4, 0)
}

fn gate(lab: &mut Lab, rows: usize, experts: usize) -> Case {
    let mut b = Builder::new(lab);
    let (top_k, groups, kept) = (8, 8, 4);
    let params = GateParams {
        logits: b.floats(rows * experts, 3.0),
        bias: b.floats(experts, 0.5),
        chosen: b.out("chosen", Kind::Integer, rows * top_k),
        weights: b.out("weights", Kind::Float, rows * top_k),
        rows: rows as i32,
        experts: experts as i32,
        top_k: top_k as i32,
        groups: groups as i32,
        groups_per_token: kept as i32,
        softmax: 0,
        group_top_two: 1,
        normalise: 1,
        scale: 2.5,
        reserved: 0,
    };
    b.step(plan::gate(rows, experts, top_k, groups, kept), params);
    b.finish(rows * (experts * 4 + top_k * 8), rows * experts * 8)
}

fn combine(lab: &mut Lab, rows: usize, top_k: usize, width: usize) -> Case {
    let mut b = Builder::new(lab);
    let order = b.shuffled(rows * top_k);
    let params = CombineParams {
        y: b.bf16s(rows * top_k * width, 1.0),
        slot_row: b.values(&order),
        weights: b.floats(rows * top_k, 1.0),
        shared: b.bf16s(rows * width, 1.0),
        out: b.out("out", Kind::Bf16, rows * width),
        tokens: rows as i32,
        top_k: top_k as i32,
        width: width as i32,
        y_stride: width as i32,
    };
    b.step(plan::combine(rows, width), params);
    b.finish(rows * width * 2 * (top_k + 2), rows * width * 2 * top_k)
}

fn greedy(lab: &mut Lab, rows: usize, vocabulary: usize) -> Case {
    let mut b = Builder::new(lab);
    let params = GreedyParams {
        logits: b.floats(rows * vocabulary, 8.0),
        tokens: b.out("tokens", Kind::Integer, rows),
        log_probabilities: b.out("logprobs", Kind::Float, rows),
        broken: b.out("broken", Kind::Integer, rows),
        rows: rows as i32,
        vocabulary: vocabulary as i32,
        stride: vocabulary as i32,
        reserved: 0,
    };
    b.step(plan::greedy(rows, vocabulary), params);
    b.finish(rows * vocabulary * 4, rows * vocabulary * 3)
}

fn adjust(lab: &mut Lab, rows: usize, vocabulary: usize) -> Case {
    let mut b = Builder::new(lab);
    let history = 1000;
    let tokens = b.below(rows * history, vocabulary);
    let offsets: Vec<i32> = (0..=2 * rows).map(|i| (i * history / 2) as i32).collect();
    let numbers = [1.0f32, 1.0, 0.0, 0.5, 0.25, 1.1].repeat(rows);
    let words = plan::mask_words(vocabulary);
    let params = SampleAdjustParams {
        logits: b.floats(rows * vocabulary, 8.0),
        out: b.out("logits", Kind::Float, rows * vocabulary),
        counts: b.room(rows * vocabulary * 4),
        numbers: b.values(&numbers),
        tokens: b.values(&tokens),
        offsets: b.values(&offsets),
        bias_tokens: Address::NULL,
        bias: Address::NULL,
        bias_offsets: Address::NULL,
        mask: b.values(&vec![0xAAAA_AAAAu32; rows * words]),
        rows: rows as i32,
        vocabulary: vocabulary as i32,
        stride: vocabulary as i32,
        mask_stride: words as i32,
    };
    b.step(plan::sample_adjust(rows, vocabulary), params);
    b.finish(rows * vocabulary * 12, rows * vocabulary * 2)
}

fn sample(lab: &mut Lab, rows: usize, vocabulary: usize, top_k: i32, top_p: f32) -> Case {
    let mut b = Builder::new(lab);
    let draws: Vec<i64> = (0..rows as i64)
        .flat_map(|row| [row * 77 + 1, 0, 100])
        .collect();
    let params = SampleParams {
        logits: b.floats(rows * vocabulary, 8.0),
        numbers: b.values(&[0.8f32, top_p, 0.0, 0.0, 0.0, 1.0].repeat(rows)),
        top_k: b.values(&vec![top_k; rows]),
        draws: b.values(&draws),
        chosen: b.out("chosen", Kind::Integer, rows),
        rows: rows as i32,
        vocabulary: vocabulary as i32,
        stride: vocabulary as i32,
        reserved: 0,
    };
    b.step(plan::sample(rows, vocabulary), params);
    b.finish(rows * vocabulary * 4, rows * vocabulary * 3)
}

fn logprobs(lab: &mut Lab, rows: usize, vocabulary: usize) -> Case {
    let mut b = Builder::new(lab);
    let tokens = b.below(rows, vocabulary);
    let params = LogprobsParams {
        logits: b.floats(rows * vocabulary, 8.0),
        tokens: b.values(&tokens),
        chosen: b.out("chosen", Kind::Float, rows),
        top_tokens: b.out("top tokens", Kind::Integer, rows * 5),
        top_values: b.out("top values", Kind::Float, rows * 5),
        broken: b.out("broken", Kind::Integer, rows),
        rows: rows as i32,
        vocabulary: vocabulary as i32,
        stride: vocabulary as i32,
        top: 5,
    };
    b.step(plan::logprobs(rows, vocabulary, 5), params);
    b.finish(rows * vocabulary * 4, rows * vocabulary * 3)
}

fn copy(lab: &mut Lab, pairs: usize, layers: usize, block_bytes: usize) -> Case {
    let mut b = Builder::new(lab);
    let blocks = 2 * pairs;
    let order = b.shuffled(blocks);
    // Bytes that no float reads.
    let codes = b.codes(layers * blocks * block_bytes);
    let params = CopyBlocksParams {
        cache: codes,
        pairs: b.values(&order),
        layer_bytes: (blocks * block_bytes) as i64,
        block_bytes: block_bytes as i32,
        blocks: blocks as i32,
        layers: layers as i32,
        reserved: 0,
    };
    b.step(plan::copy_blocks(pairs, layers, block_bytes), params);
    b.finish(2 * pairs * layers * block_bytes, 0)
}

/// Columns of a residual stream that eight ranks share, in blocks of 128.
fn share(lab: &mut Lab, rows: usize, width: usize, unpack: bool) -> Case {
    const RANKS: usize = 8;
    let mut b = Builder::new(lab);
    let (units, unit_bytes) = (width / 128, 256);
    // Rank 0 packs, into the first slot; a rank beyond the last one unpacks, and so all columns: whatever is compared is written.
    let slot = rows * units.div_ceil(RANKS) * unit_bytes;
    let (whole, packed, rank, moved) = match unpack {
        false => {
            let (rows_at, slots) = (
                b.bf16s(rows * width, 1.0),
                b.out("slot", Kind::Bf16, slot / 2),
            );
            (rows_at, slots, 0, slot)
        }
        true => {
            let rows_at = b.out("rows", Kind::Bf16, rows * width);
            (
                rows_at,
                b.bf16s(RANKS * slot / 2, 1.0),
                RANKS,
                rows * width * 2,
            )
        }
    };
    let params = ShareColumnsParams {
        rows: whole,
        slots: packed,
        count: rows as i32,
        units: units as i32,
        unit_bytes: unit_bytes as i32,
        ranks: RANKS as i32,
        rank: rank as i32,
        unpack: i32::from(unpack),
    };
    b.step(
        plan::share_columns(rows, units, unit_bytes, RANKS, unpack),
        params,
    );
    b.finish(2 * moved, 0)
}
