//! Matrix products.

use half::bf16;
use kernels::params::{Address, GemmParams};
use kernels::plan::{self, Format};
use kernels::reference;

use crate::harness::{BF16, Lab, close, on_every_schedule};

/// Operands of either format, padded rows, with what float64 makes of them.
pub struct Operands {
    pub format: Format,
    pub k: usize,
    pub stride: usize,
    pub bf16s: Vec<bf16>,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    scale_rows: usize,
}

impl Operands {
    /// `rows` rows of `k` values, `padding` more between them; a scale for every `scale_rows` rows and 128 columns.
    pub fn new(
        lab: &mut Lab,
        format: Format,
        rows: usize,
        k: usize,
        padding: usize,
        scale_rows: usize,
    ) -> Self {
        let stride = k + padding;
        let mut operands = Self {
            format,
            k,
            stride,
            bf16s: Vec::new(),
            codes: Vec::new(),
            scales: Vec::new(),
            scale_rows,
        };
        match format {
            Format::Bf16 => operands.bf16s = lab.random.bf16s(rows * stride, 1.0),
            Format::Fp8 => {
                operands.codes = lab.random.codes(rows * stride);
                let count = rows.div_ceil(scale_rows) * k.div_ceil(128);
                operands.scales = (0..count)
                    .map(|_| 0.001 + lab.random.float(0.0009))
                    .collect();
            }
        }
        operands
    }

    /// Matrices of one shape, one behind the other.
    pub fn stacked(matrices: &[Self]) -> Self {
        let first = &matrices[0];
        Self {
            format: first.format,
            k: first.k,
            stride: first.stride,
            bf16s: matrices.iter().flat_map(|m| m.bf16s.clone()).collect(),
            codes: matrices.iter().flat_map(|m| m.codes.clone()).collect(),
            scales: matrices.iter().flat_map(|m| m.scales.clone()).collect(),
            scale_rows: first.scale_rows,
        }
    }

    pub fn upload(&self, lab: &Lab) -> (kernels::driver::Buffer, kernels::driver::Buffer) {
        match self.format {
            Format::Bf16 => (lab.upload(&self.bf16s), lab.upload(&[0f32])),
            Format::Fp8 => (lab.upload(&self.codes), lab.upload(&self.scales)),
        }
    }

    /// A row as values, scales applied.
    pub fn row(&self, row: usize) -> Vec<f64> {
        match self.format {
            Format::Bf16 => reference::widen(&self.bf16s[row * self.stride..][..self.k]),
            Format::Fp8 => {
                let scales = &self.scales[row / self.scale_rows * self.k.div_ceil(128)..];
                let codes = &self.codes[row * self.stride..][..self.k];
                codes
                    .iter()
                    .enumerate()
                    .map(|(i, c)| reference::e4m3_value(*c) * f64::from(scales[i / 128]))
                    .collect()
            }
        }
    }
}

/// One product on the device: `[m, ldc]` values with whatever was not written left poisoned.
#[allow(clippy::too_many_arguments)]
fn gemm(
    lab: &Lab,
    a: &Operands,
    b: &Operands,
    m: usize,
    n: usize,
    batch: usize,
    ldc: usize,
    f32_out: bool,
) -> Vec<f64> {
    let (d_a, d_a_scales) = a.upload(lab);
    let (d_b, d_b_scales) = b.upload(lab);
    let count = batch * m * ldc;
    let c = lab.poisoned(count * if f32_out { 4 } else { 2 });
    let k_blocks = a.k.div_ceil(128);
    let fp8 = |address| {
        if a.format == Format::Fp8 {
            address
        } else {
            Address::NULL
        }
    };
    lab.run(
        &plan::gemm(a.format, m, n, a.k, batch).expect("a plan"),
        &GemmParams {
            a: d_a.address(),
            b: d_b.address(),
            c: c.address(),
            a_scales: fp8(d_a_scales.address()),
            b_scales: fp8(d_b_scales.address()),
            a_batch: (m * a.stride) as i64,
            b_batch: (n * b.stride) as i64,
            c_batch: (m * ldc) as i64,
            m: m as i32,
            n: n as i32,
            k: a.k as i32,
            lda: a.stride as i32,
            ldb: b.stride as i32,
            ldc: ldc as i32,
            a_scales_stride: k_blocks as i32,
            b_scales_stride: k_blocks as i32,
            c_is_float32: i32::from(f32_out),
            ..GemmParams::default()
        },
    );
    if f32_out {
        lab.read_f32(&c, count)
    } else {
        lab.read_bf16(&c, count)
    }
}

/// Compares `[m, ldc]` values with float64, and the padding with NaN.
#[allow(clippy::too_many_arguments)]
pub fn check(
    what: &str,
    got: &[f64],
    a: &Operands,
    b: &Operands,
    a_from: usize,
    b_from: usize,
    m: usize,
    n: usize,
    ldc: usize,
    f32_out: bool,
) {
    let b_rows: Vec<Vec<f64>> = (0..n).map(|j| b.row(b_from + j)).collect();
    for i in 0..m {
        let a_row = a.row(a_from + i);
        for (j, b_row) in b_rows.iter().enumerate() {
            let (mut want, mut size) = (0.0, 0.0);
            for (x, y) in a_row.iter().zip(b_row) {
                want += x * y;
                size += (x * y).abs();
            }
            let relative = if f32_out { 0.0 } else { BF16 };
            close(
                &format!("{what} [{i}, {j}]"),
                &[got[i * ldc + j]],
                &[want],
                relative,
                size * 1e-6,
            );
        }
        assert!(
            got[i * ldc + n..(i + 1) * ldc].iter().all(|v| v.is_nan()),
            "{what}: padding of row {i} was written"
        );
    }
}

#[test]
fn gemm_agrees_with_float64_over_odd_shapes() {
    on_every_schedule("gemm", |lab| {
        for format in [Format::Bf16, Format::Fp8] {
            for (case, (m, n, k)) in [
                (1, 576, 512),
                (7, 40, 80),
                (16, 17, 1040),
                (17, 200, 336),
                (32, 64, 128),
                (33, 72, 1168),
                (64, 65, 272),
                (129, 136, 208),
                (7, 576, 2064),
            ]
            .into_iter()
            .enumerate()
            {
                let padding = if case % 2 == 0 { 0 } else { 16 };
                let f32_out = case % 3 == 0;
                let ldc = n + case % 4;
                let a = Operands::new(lab, format, m, k, padding, 1);
                let b = Operands::new(lab, format, n, k, padding, 128);
                let got = gemm(lab, &a, &b, m, n, 1, ldc, f32_out);
                check(
                    &format!("{format:?} {m} x {n} x {k}"),
                    &got,
                    &a,
                    &b,
                    0,
                    0,
                    m,
                    n,
                    ldc,
                    f32_out,
                );
            }
        }
    });
}

#[test]
fn batched_gemm_keeps_batches_apart() {
    on_every_schedule("batched", |lab| {
        for (m, n, k) in [(5, 64, 128), (33, 40, 96)] {
            let batch = 3;
            let a = Operands::new(lab, Format::Bf16, batch * m, k, 8, 1);
            let b = Operands::new(lab, Format::Bf16, batch * n, k, 0, 128);
            let got = gemm(lab, &a, &b, m, n, batch, n, false);
            for z in 0..batch {
                check(
                    &format!("batch {z}"),
                    &got[z * m * n..(z + 1) * m * n],
                    &a,
                    &b,
                    z * m,
                    z * n,
                    m,
                    n,
                    n,
                    false,
                );
            }
        }
    });
}

#[test]
fn a_gemm_row_is_the_same_bits_in_any_batch() {
    on_every_schedule("gemm alone", |lab| {
        for format in [Format::Bf16, Format::Fp8] {
            let (n, k) = (80, 2320); // ten blocks of 128 and a tail: two per slice, so the last slices are empty
            let a = Operands::new(lab, format, 129, k, 0, 1);
            let b = Operands::new(lab, format, n, k, 0, 128);
            let all = gemm(lab, &a, &b, 129, n, 1, n, true);
            for m in [1, 7, 16, 20, 32, 64] {
                let part = gemm(lab, &a, &b, m, n, 1, n, true);
                assert_eq!(part, all[..m * n], "{format:?}, {m} rows");
            }
        }
    });
}
