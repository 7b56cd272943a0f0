//! Matrix products: few rows, many rows, Hopper's, the experts'.

use kernels::params::{Address, GemmParams, HopperGemmParams, PermuteParams, TensorShape};
use kernels::plan::{
    self, Format, HOPPER_PARTIAL_BYTES, HOPPER_TICKET_BYTES, HopperPlan, QUANT_GROUP,
};

use crate::Maker;
use crate::build::{Builder, Case};
use crate::compare::Kind;
use crate::harness::Lab;

pub fn cases(small: bool) -> Vec<(String, Maker)> {
    let mut all: Vec<(String, Maker)> = Vec::new();
    // V3: q_b, o, q_a with kv_a; V2-Lite: q, gate and up of the dense layer.
    let shapes: &[(Format, usize, usize)] = if small {
        &[(Format::Bf16, 200, 136), (Format::Fp8, 192, 272)]
    } else {
        &[
            (Format::Fp8, 24_576, 1536),
            (Format::Fp8, 7168, 16_384),
            (Format::Fp8, 2112, 7168),
            (Format::Bf16, 3072, 2048),
            (Format::Bf16, 21_888, 2048),
        ]
    };
    let rows: &[usize] = if small {
        &[1, 20, 70]
    } else {
        &[1, 16, 64, 4096]
    };
    for &(format, n, k) in shapes {
        for &m in rows {
            all.push((
                format!("gemm {format:?} {m}x{n}x{k}"),
                Box::new(move |lab| gemm(lab, format, m, n, k)),
            ));
            all.push((
                format!("hopper_gemm {format:?} {m}x{n}x{k}"),
                Box::new(move |lab| hopper(lab, format, m, n, k)),
            ));
        }
    }
    // Experts' gate and up: V3, a fourth of its experts (memory), and V2-Lite.
    let experts: &[(Format, Experts)] = if small {
        &[
            (Format::Bf16, Experts::new(8, 2, 96, 128)),
            (Format::Fp8, Experts::new(8, 2, 128, 256)),
        ]
    } else {
        &[
            (Format::Fp8, Experts::new(64, 8, 4096, 7168)),
            (Format::Bf16, Experts::new(64, 6, 2816, 2048)),
        ]
    };
    let tokens: &[usize] = if small {
        &[3, 40]
    } else {
        &[1, 16, 64, 1024, 4096]
    };
    for &(format, shape) in experts {
        for &tokens in tokens {
            let Experts {
                experts,
                top_k,
                n,
                k,
            } = shape;
            all.push((
                format!("grouped_gemm {format:?} {tokens}x{top_k} of {experts}x{n}x{k}"),
                Box::new(move |lab| grouped(lab, format, tokens, shape)),
            ));
            all.push((
                format!("hopper_grouped_gemm {format:?} {tokens}x{top_k} of {experts}x{n}x{k}"),
                Box::new(move |lab| hopper_grouped(lab, format, tokens, shape)),
            ));
        }
    }
    all
}

/// An experts' product.
#[derive(Clone, Copy)]
struct Experts {
    experts: usize,
    top_k: usize,
    n: usize,
    k: usize,
}

impl Experts {
    const fn new(experts: usize, top_k: usize, n: usize, k: usize) -> Self {
        Self {
            experts,
            top_k,
            n,
            k,
        }
    }
}

/// Rows and matrix of a product in their format: addresses of a, its scales, b, its scales.
fn operands(
    b: &mut Builder,
    format: Format,
    m: usize,
    matrices: usize,
    n: usize,
    k: usize,
) -> [Address; 4] {
    let blocks = k.div_ceil(QUANT_GROUP);
    match format {
        Format::Bf16 => [
            b.bf16s(m * k, 1.0),
            Address::NULL,
            b.bf16s(matrices * n * k, 1.0),
            Address::NULL,
        ],
        Format::Fp8 => [
            b.codes(m * k),
            b.scales(m * blocks),
            b.codes(matrices * n * k),
            b.scales(matrices * n.div_ceil(QUANT_GROUP) * blocks),
        ],
    }
}

fn bytes_of(format: Format) -> usize {
    match format {
        Format::Bf16 => 2,
        Format::Fp8 => 1,
    }
}

fn gemm(lab: &mut Lab, format: Format, m: usize, n: usize, k: usize) -> Case {
    let mut b = Builder::new(lab);
    let [a, a_scales, matrix, b_scales] = operands(&mut b, format, m, 1, n, k);
    let blocks = k.div_ceil(QUANT_GROUP) as i32;
    let params = GemmParams {
        a,
        b: matrix,
        c: b.out("c", Kind::Bf16, m * n),
        a_scales,
        b_scales,
        m: m as i32,
        n: n as i32,
        k: k as i32,
        lda: k as i32,
        ldb: k as i32,
        ldc: n as i32,
        a_scales_stride: blocks,
        b_scales_stride: blocks,
        ..GemmParams::default()
    };
    b.step(plan::gemm(format, m, n, k, 1), params);
    b.finish((m + n) * k * bytes_of(format) + 2 * m * n, 2 * m * n * k)
}

fn hopper_params(plan: &HopperPlan, n: usize, k: usize) -> HopperGemmParams {
    let blocks = k.div_ceil(QUANT_GROUP) as i32;
    HopperGemmParams {
        n: n as i32,
        k: k as i32,
        ldc: n as i32,
        a_scales_stride: blocks,
        b_scales_stride: blocks,
        row_tiles: plan.row_tiles as i32,
        slices: plan.slices as i32,
        slice_blocks: plan.slice_blocks as i32,
        ..HopperGemmParams::default()
    }
}

fn hopper(lab: &mut Lab, format: Format, m: usize, n: usize, k: usize) -> Case {
    let plan = plan::hopper_gemm(format, m, n, k, 1, HOPPER_PARTIAL_BYTES)
        .expect("a shape that the kernels take");
    let mut b = Builder::new(lab);
    let [a, a_scales, matrix, b_scales] = operands(&mut b, format, m, 1, n, k);
    let params = HopperGemmParams {
        b_map: b.map(&TensorShape::weights(format, matrix, n, k, 1)),
        a_map: b.map(&TensorShape::rows(format, a, m, k, k, plan.tile_rows)),
        c: b.out("c", Kind::Bf16, m * n),
        a_scales,
        b_scales,
        partial: match plan.partial_bytes {
            0 => Address::NULL,
            bytes => b.room(bytes),
        },
        tickets: b.values(&vec![0u8; HOPPER_TICKET_BYTES]),
        m: m as i32,
        ..hopper_params(&plan, n, k)
    };
    b.step(Ok(plan.launch), params);
    b.finish((m + n) * k * bytes_of(format) + 2 * m * n, 2 * m * n * k)
}

/// Choices of experts, sorted once for tiles of so many rows, and how many experts are used.
fn sorted(
    b: &mut Builder,
    tokens: usize,
    shape: Experts,
    tile_rows: usize,
) -> (PermuteParams, usize) {
    let Experts { experts, top_k, .. } = shape;
    let rows = tokens * top_k;
    // Different experts for each token, as a gate chooses.
    let chosen: Vec<i32> = (0..tokens)
        .flat_map(|_| {
            let mut kept = b.shuffled(experts)[..top_k].to_vec();
            kept.sort_unstable();
            kept
        })
        .collect();
    let mut used = chosen.clone();
    used.sort_unstable();
    used.dedup();
    let permute = PermuteParams {
        chosen: b.values(&chosen),
        offsets: b.out("offsets", Kind::Integer, experts + 1),
        row_token: b.out("row_token", Kind::Integer, rows),
        slot_row: b.out("slot_row", Kind::Integer, rows),
        tiles: b.room((rows / tile_rows + experts) * 8),
        tokens: tokens as i32,
        top_k: top_k as i32,
        experts: experts as i32,
        tile_rows: tile_rows as i32,
        first_expert: 0,
        experts_held: experts as i32,
    };
    let sort = plan::permute(tokens, top_k, experts).expect("a shape that the kernels take");
    b.before(sort, &permute);
    (permute, used.len())
}

fn bytes_moved(format: Format, rows: usize, used: usize, shape: Experts) -> usize {
    let Experts { n, k, .. } = shape;
    (used * n + rows) * k * bytes_of(format) + 2 * rows * n
}

/// The product alone, of rows that lie sorted.
fn hopper_grouped(lab: &mut Lab, format: Format, tokens: usize, shape: Experts) -> Case {
    let Experts {
        experts,
        top_k,
        n,
        k,
    } = shape;
    let rows = tokens * top_k;
    let plan = plan::hopper_grouped_gemm(format, rows, n, k, experts)
        .expect("a shape that the kernels take");
    let mut b = Builder::new(lab);
    let (permute, used) = sorted(&mut b, tokens, shape, plan.tile_rows);
    let [a, a_scales, matrices, b_scales] = operands(&mut b, format, rows, experts, n, k);
    let params = HopperGemmParams {
        b_map: b.map(&TensorShape::weights(format, matrices, n, k, experts)),
        a_map: b.map(&TensorShape::rows(format, a, rows, k, k, plan.tile_rows)),
        c: b.out("c", Kind::Bf16, rows * n),
        a_scales,
        b_scales,
        tiles: permute.tiles,
        offsets: permute.offsets,
        b_scales_batch: (n.div_ceil(QUANT_GROUP) * k.div_ceil(QUANT_GROUP)) as i64,
        m: rows as i32,
        ..hopper_params(&plan, n, k)
    };
    b.step(Ok(plan.launch), params);
    b.finish(bytes_moved(format, rows, used, shape), 2 * rows * n * k)
}

/// The product alone; the sort runs once before.
fn grouped(lab: &mut Lab, format: Format, tokens: usize, shape: Experts) -> Case {
    let Experts {
        experts,
        top_k,
        n,
        k,
    } = shape;
    let rows = tokens * top_k;
    let mut b = Builder::new(lab);
    let tile_rows = plan::grouped_tile_rows(rows, experts);
    let (permute, used) = sorted(&mut b, tokens, shape, tile_rows);
    let [a, a_scales, matrices, b_scales] = operands(&mut b, format, tokens, experts, n, k);
    let blocks = k.div_ceil(QUANT_GROUP);
    let params = GemmParams {
        a,
        b: matrices,
        c: b.out("c", Kind::Bf16, rows * n),
        a_scales,
        b_scales,
        a_rows: permute.row_token,
        tiles: permute.tiles,
        offsets: permute.offsets,
        b_batch: (n * k) as i64,
        b_scales_batch: (n.div_ceil(QUANT_GROUP) * blocks) as i64,
        m: rows as i32,
        n: n as i32,
        k: k as i32,
        lda: k as i32,
        ldb: k as i32,
        ldc: n as i32,
        a_scales_stride: blocks as i32,
        b_scales_stride: blocks as i32,
        ..GemmParams::default()
    };
    b.step(plan::grouped_gemm(format, rows, n, k, experts), params);
    b.finish(bytes_moved(format, rows, used, shape), 2 * rows * n * k)
}
