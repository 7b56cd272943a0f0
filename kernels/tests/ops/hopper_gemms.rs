//! Products on the tensor cores of Hopper: dense, batched, grouped.

use half::bf16;
use kernels::driver::Buffer;
use kernels::params::{Address, HopperGemmParams, TensorShape};
use kernels::plan::{self, Format, HOPPER_PARTIAL_BYTES, HOPPER_TICKET_BYTES, HopperPlan};
use kernels::reference;

use crate::experts::permute_into;
use crate::gemms::{Operands, check};
use crate::harness::{Lab, address, close, on_every_schedule};

/// A device without wgmma has nothing to test.
fn is_hopper(lab: &Lab) -> bool {
    lab.device.capability().0 == 9
}

fn formats(lab: &Lab) -> &'static [Format] {
    if is_hopper(lab) {
        &[Format::Bf16, Format::Fp8]
    } else {
        &[]
    }
}

/// Zeros before and after every launch.
struct Tickets(Buffer);

impl Tickets {
    fn new(lab: &Lab) -> Self {
        Self(lab.upload(&vec![0u8; HOPPER_TICKET_BYTES]))
    }

    fn check(&self, lab: &Lab, what: &str) {
        let left = lab.read_i32(&self.0, HOPPER_TICKET_BYTES / 4);
        assert!(left.iter().all(|ticket| *ticket == 0), "{what}: {left:?}");
    }
}

fn params(plan: &HopperPlan, m: usize, n: usize, k: usize, ldc: usize) -> HopperGemmParams {
    HopperGemmParams {
        m: m as i32,
        n: n as i32,
        k: k as i32,
        ldc: ldc as i32,
        a_scales_stride: k.div_ceil(128) as i32,
        b_scales_stride: k.div_ceil(128) as i32,
        row_tiles: plan.row_tiles as i32,
        slices: plan.slices as i32,
        slice_blocks: plan.slice_blocks as i32,
        ..HopperGemmParams::default()
    }
}

/// One product on the device, with `room` for partial sums: `[m, ldc]` values, what was not written poisoned.
#[allow(clippy::too_many_arguments)]
fn hopper(
    lab: &Lab,
    a: &Operands,
    b: &Operands,
    m: usize,
    n: usize,
    ldc: usize,
    f32_out: bool,
    room: usize,
) -> Vec<f64> {
    let (format, k) = (a.format, a.k);
    let plan = plan::hopper_gemm(format, m, n, k, 1, room).expect("a plan");
    let (d_a, d_a_scales) = a.upload(lab);
    let (d_b, d_b_scales) = b.upload(lab);
    let c = lab.poisoned(m * ldc * if f32_out { 4 } else { 2 });
    let partial = lab.poisoned(plan.partial_bytes);
    let tickets = Tickets::new(lab);
    let map = |shape| lab.device.tensor_map(&shape).expect("a map");
    let rows = TensorShape::rows(format, d_a.address(), m, k, a.stride, plan.tile_rows);
    lab.run(
        &plan.launch,
        &HopperGemmParams {
            b_map: map(TensorShape::weights(format, d_b.address(), n, k, 1)),
            a_map: map(rows),
            c: c.address(),
            a_scales: d_a_scales.address(),
            b_scales: d_b_scales.address(),
            partial: match plan.partial_bytes {
                0 => Address::NULL,
                _ => partial.address(),
            },
            tickets: tickets.0.address(),
            c_is_float32: i32::from(f32_out),
            ..params(&plan, m, n, k, ldc)
        },
    );
    tickets.check(lab, &plan.to_string());
    if f32_out {
        lab.read_f32(&c, m * ldc)
    } else {
        lab.read_bf16(&c, m * ldc)
    }
}

fn agrees(lab: &mut Lab, format: Format) {
    if !is_hopper(lab) {
        return;
    }
    // Every tile, fewer stages of k than there are and more, one slice and several, tails in every direction.
    for (case, (m, n, k)) in [
        (1, 8, 64),
        (7, 130, 1168),
        (16, 129, 80),
        (20, 576, 512),
        (33, 72, 1040),
        (64, 65, 2064),
        (129, 136, 208),
        (130, 20, 1552),
    ]
    .into_iter()
    .enumerate()
    {
        let f32_out = case % 2 == 0;
        let ldc = n + case % 3;
        let a = Operands::new(lab, format, m, k, 16 * (case % 2), 1);
        let b = Operands::new(lab, format, n, k, 0, 128);
        for room in [0, HOPPER_PARTIAL_BYTES] {
            let got = hopper(lab, &a, &b, m, n, ldc, f32_out, room);
            let what = format!("{format:?} {m} x {n} x {k}, room {room}");
            check(&what, &got, &a, &b, 0, 0, m, n, ldc, f32_out);
        }
    }
}

#[test]
fn a_bf16_product_agrees_with_float64_over_odd_shapes() {
    on_every_schedule("hopper gemm", |lab| agrees(lab, Format::Bf16));
}

#[test]
fn an_fp8_product_agrees_with_float64_over_odd_shapes() {
    on_every_schedule("hopper fp8 gemm", |lab| agrees(lab, Format::Fp8));
}

#[test]
fn a_row_is_the_same_bits_in_any_batch_and_with_any_room() {
    on_every_schedule("hopper alone", |lab| {
        for &format in formats(lab) {
            // Ten blocks of 128 and a tail in two slices, the second one shorter.
            let (n, k) = (80, 1296);
            let a = Operands::new(lab, format, 129, k, 0, 1);
            let b = Operands::new(lab, format, n, k, 0, 128);
            let all = hopper(lab, &a, &b, 129, n, n, true, 0);
            for m in [1, 7, 16, 20, 32, 64, 129] {
                for room in [0, HOPPER_PARTIAL_BYTES] {
                    let part = hopper(lab, &a, &b, m, n, n, true, room);
                    assert_eq!(part, all[..m * n], "{format:?}, {m} rows, room {room}");
                }
            }
        }
    });
}

#[test]
fn batches_are_kept_apart() {
    on_every_schedule("hopper batched", |lab| {
        if !is_hopper(lab) {
            return;
        }
        // The heads of a row lie side by side, wider than what is multiplied, as queries do.
        for (m, n, k, distance) in [(5, 64, 128, 192), (65, 40, 32, 48), (20, 72, 104, 104)] {
            let heads = 3;
            let a = Operands::new(lab, Format::Bf16, m * heads, k, distance - k, 1);
            let b = Operands::new(lab, Format::Bf16, heads * n, k, 0, 128);
            let plan = plan::hopper_gemm(Format::Bf16, m, n, k, heads, 0).expect("a plan");
            let (d_a, _) = a.upload(lab);
            let (d_b, _) = b.upload(lab);
            let c = lab.poisoned(m * heads * n * 2);
            let map = |shape| lab.device.tensor_map(&shape).expect("a map");
            let stride = heads * distance;
            let rows = TensorShape::rows(a.format, d_a.address(), m, k, stride, plan.tile_rows);
            lab.run(
                &plan.launch,
                &HopperGemmParams {
                    b_map: map(TensorShape::weights(a.format, d_b.address(), n, k, heads)),
                    a_map: map(rows.batched(heads, distance)),
                    c: c.address(),
                    c_batch: n as i64,
                    ..params(&plan, m, n, k, heads * n)
                },
            );
            let got = lab.read_bf16(&c, m * heads * n);
            for head in 0..heads {
                let weights: Vec<Vec<f64>> = (0..n).map(|j| b.row(head * n + j)).collect();
                for row in 0..m {
                    let values = a.row(row * heads + head);
                    let want: Vec<f64> =
                        weights.iter().map(|w| reference::dot(&values, w)).collect();
                    let got = &got[(row * heads + head) * n..][..n];
                    close(
                        &format!("row {row}, head {head}"),
                        got,
                        &want,
                        1.0 / 256.0,
                        1e-4,
                    );
                }
            }
        }
    });
}

/// The experts' product of one case, `[rows, n]`, and each row's token and expert.
struct Grouped {
    got: Vec<f64>,
    tokens: Vec<usize>,
    experts: Vec<usize>,
}

fn grouped(
    lab: &mut Lab,
    matrices: &[Operands],
    a: &Operands,
    (tokens, top_k, n): (usize, usize, usize),
) -> Grouped {
    let (format, k, experts) = (a.format, a.k, matrices.len());
    let rows = tokens * top_k;
    let plan = plan::hopper_grouped_gemm(format, rows, n, k, experts).expect("a plan");
    assert_eq!(
        plan.tile_rows,
        plan::hopper_grouped_tile_rows(rows, experts)
    );
    let sorted = permute_into(lab, tokens, top_k, experts, plan.tile_rows);
    let row_token: Vec<usize> = lab
        .read_i32(&sorted.row_token, rows)
        .into_iter()
        .map(|token| token as usize)
        .collect();
    // Rows in the order of their experts; scales stay with the tokens.
    let pick = |row: &usize| row * a.stride..row * a.stride + k;
    let d_a = match format {
        Format::Bf16 => {
            let of_row = |row| a.bf16s[pick(row)].to_vec();
            lab.upload(&row_token.iter().flat_map(of_row).collect::<Vec<bf16>>())
        }
        Format::Fp8 => {
            let of_row = |row| a.codes[pick(row)].to_vec();
            lab.upload(&row_token.iter().flat_map(of_row).collect::<Vec<u8>>())
        }
    };
    let (_, d_a_scales) = a.upload(lab);
    let (d_b, d_b_scales) = Operands::stacked(matrices).upload(lab);
    let c = lab.poisoned(rows * n * 4);
    let map = |shape| lab.device.tensor_map(&shape).expect("a map");
    lab.run(
        &plan.launch,
        &HopperGemmParams {
            b_map: map(TensorShape::weights(format, d_b.address(), n, k, experts)),
            a_map: map(TensorShape::rows(
                format,
                d_a.address(),
                rows,
                k,
                k,
                plan.tile_rows,
            )),
            c: c.address(),
            a_scales: d_a_scales.address(),
            b_scales: d_b_scales.address(),
            a_rows: address(Some(&sorted.row_token)),
            tiles: sorted.tiles.address(),
            offsets: sorted.offsets.address(),
            b_scales_batch: (n.div_ceil(128) * k.div_ceil(128)) as i64,
            c_is_float32: 1,
            ..params(&plan, rows, n, k, n)
        },
    );
    let offsets = lab.read_i32(&sorted.offsets, experts + 1);
    let expert_of = |row: usize| (0..experts).find(|e| (row as i32) < offsets[e + 1]);
    Grouped {
        got: lab.read_f32(&c, rows * n),
        experts: (0..rows)
            .map(|row| expert_of(row).expect("an expert"))
            .collect(),
        tokens: row_token,
    }
}

#[test]
fn a_grouped_product_gives_every_row_its_experts_matrix() {
    on_every_schedule("hopper grouped", |lab| {
        for &format in formats(lab) {
            // Tiles of 16, 32, 64 and 128 rows; some experts have none, one has many.
            for (tokens, top_k, experts, n, k) in [
                (1, 2, 8, 40, 80),
                (7, 3, 16, 136, 144),
                (60, 2, 6, 72, 272),
                (129, 1, 5, 72, 80),
                (140, 4, 6, 24, 400),
                (64, 1, 3, 576, 144),
            ] {
                let a = Operands::new(lab, format, tokens, k, 0, 1);
                let matrices: Vec<Operands> = (0..experts)
                    .map(|_| Operands::new(lab, format, n, k, 0, 128))
                    .collect();
                let Grouped {
                    got,
                    tokens,
                    experts,
                } = grouped(lab, &matrices, &a, (tokens, top_k, n));
                let wide: Vec<Vec<Vec<f64>>> = matrices
                    .iter()
                    .map(|matrix| (0..n).map(|j| matrix.row(j)).collect())
                    .collect();
                for (row, (token, expert)) in tokens.iter().zip(experts).enumerate() {
                    let values = a.row(*token);
                    for j in 0..n {
                        let weights = &wide[expert][j];
                        let want = reference::dot(&values, weights);
                        let terms = values.iter().zip(weights);
                        let size: f64 = terms.map(|(x, y)| (x * y).abs()).sum();
                        let got = &got[row * n + j..=row * n + j];
                        close(
                            &format!("{format:?} [{row}, {j}]"),
                            got,
                            &[want],
                            0.0,
                            size * 1e-6,
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn an_experts_row_is_the_same_bits_beside_any_others() {
    on_every_schedule("hopper grouped alone", |lab| {
        for &format in formats(lab) {
            // All choose the one expert, so that the tile grows with the tokens.
            let (n, k) = (72, 656);
            let a = Operands::new(lab, format, 140, k, 0, 1);
            let matrices = [Operands::new(lab, format, n, k, 0, 128)];
            let all = grouped(lab, &matrices, &a, (140, 1, n)).got;
            for tokens in [1, 20, 50] {
                let some = grouped(lab, &matrices, &a, (tokens, 1, n)).got;
                assert_eq!(some, all[..tokens * n], "{format:?}, {tokens} tokens");
            }
        }
    });
}
