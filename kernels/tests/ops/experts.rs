//! The mixture of experts: gate, permutation, grouped products, combination.

use std::ops::Range;

use kernels::params::{Address, CombineParams, GateParams, GemmParams, PermuteParams};
use kernels::plan::{self, Format};
use kernels::reference;

use crate::gemms::Operands;
use crate::harness::{BF16, Lab, address, close, on_every_schedule};

fn gate(
    lab: &Lab,
    rule: &reference::Gate,
    logits: &[f32],
    bias: Option<&[f32]>,
    experts: usize,
) -> (Vec<i32>, Vec<f64>) {
    let rows = logits.len() / experts;
    let d_logits = lab.upload(logits);
    let d_bias = bias.map(|b| lab.upload(b));
    let (chosen, weights) = (
        lab.poisoned(rows * rule.top_k * 4),
        lab.poisoned(rows * rule.top_k * 4),
    );
    lab.run(
        &plan::gate(
            rows,
            experts,
            rule.top_k,
            rule.groups,
            rule.groups_per_token,
        )
        .expect("a plan"),
        &GateParams {
            logits: d_logits.address(),
            bias: address(d_bias.as_ref()),
            chosen: chosen.address(),
            weights: weights.address(),
            rows: rows as i32,
            experts: experts as i32,
            top_k: rule.top_k as i32,
            groups: rule.groups as i32,
            groups_per_token: rule.groups_per_token as i32,
            softmax: i32::from(rule.softmax),
            group_top_two: i32::from(rule.group_top_two),
            normalise: i32::from(rule.normalise),
            scale: rule.scale as f32,
            reserved: 0,
        },
    );
    (
        lab.read_i32(&chosen, rows * rule.top_k),
        lab.read_f32(&weights, rows * rule.top_k),
    )
}

fn check_gate(lab: &mut Lab, rule: reference::Gate, experts: usize, with_bias: bool) {
    for rows in [1, 7, 64, 129] {
        // Few different logits, so that exact ties are everywhere.
        let logits: Vec<f32> = (0..rows * experts)
            .map(|_| lab.random.below(40) as f32 * 0.11 - 2.0)
            .collect();
        // Biases so negative that every biased score is: a mask of zero instead of minus infinity would win.
        let bias: Vec<f32> = (0..experts)
            .map(|_| lab.random.below(3) as f32 * 0.125 - 1.5)
            .collect();
        let bias = with_bias.then_some(bias.as_slice());
        let (chosen, weights) = gate(lab, &rule, &logits, bias, experts);
        let wide_bias: Option<Vec<f64>> = bias.map(|b| b.iter().map(|v| f64::from(*v)).collect());
        for row in 0..rows {
            // Scores as float32 has them: ties must be the same ties.
            let row_logits: Vec<f64> = logits[row * experts..][..experts]
                .iter()
                .map(|v| f64::from(*v))
                .collect();
            let want = rule.choose(&row_logits, wide_bias.as_deref());
            let part = row * rule.top_k..(row + 1) * rule.top_k;
            let want_chosen: Vec<i32> = want.iter().map(|(expert, _)| *expert as i32).collect();
            assert_eq!(chosen[part.clone()], want_chosen, "{rule:?}, row {row}");
            let want_weights: Vec<f64> = want.iter().map(|(_, weight)| *weight).collect();
            close("weights", &weights[part], &want_weights, 1e-5, 1e-9);
        }
    }
}

#[test]
fn the_gate_chooses_as_the_reference_does() {
    let v3 = reference::Gate {
        top_k: 8,
        groups: 8,
        groups_per_token: 4,
        softmax: false,
        group_top_two: true,
        normalise: true,
        scale: 2.5,
    };
    let v2 = reference::Gate {
        top_k: 6,
        groups: 8,
        groups_per_token: 3,
        softmax: true,
        group_top_two: false,
        normalise: false,
        scale: 16.0,
    };
    let lite = reference::Gate {
        groups: 1,
        groups_per_token: 1,
        scale: 1.0,
        ..v2
    };
    let k2 = reference::Gate {
        groups: 1,
        groups_per_token: 1,
        scale: 2.827,
        ..v3
    };
    on_every_schedule("gate", |lab| {
        check_gate(lab, v3, 256, true);
        check_gate(lab, v2, 160, false);
        check_gate(lab, lite, 64, false);
        check_gate(lab, k2, 384, true);
        // Groups of more experts than a warp has lanes: a lane has several of one group.
        let wide = reference::Gate {
            groups: 2,
            groups_per_token: 1,
            ..v3
        };
        check_gate(lab, wide, 256, true);
        check_gate(
            lab,
            reference::Gate {
                top_k: 2,
                groups: 4,
                groups_per_token: 2,
                ..v3
            },
            12,
            true,
        );
    });
}

/// Sorted rows of random choices.
pub struct Sorted {
    chosen: Vec<i32>,
    pub offsets: kernels::driver::Buffer,
    pub row_token: kernels::driver::Buffer,
    slot_row: kernels::driver::Buffer,
    pub tiles: kernels::driver::Buffer,
}

fn permute(lab: &mut Lab, tokens: usize, top_k: usize, experts: usize) -> Sorted {
    let tile_rows = plan::grouped_tile_rows(tokens * top_k, experts);
    permute_into(lab, tokens, top_k, experts, tile_rows)
}

/// The sort of skewed choices, for tiles of so many rows.
pub fn permute_into(
    lab: &mut Lab,
    tokens: usize,
    top_k: usize,
    experts: usize,
    tile_rows: usize,
) -> Sorted {
    permute_held(lab, tokens, top_k, experts, tile_rows, 0..experts)
}

/// The same on a rank that holds some of the experts.
fn permute_held(
    lab: &mut Lab,
    tokens: usize,
    top_k: usize,
    experts: usize,
    tile_rows: usize,
    held: Range<usize>,
) -> Sorted {
    // Skewed, so that some experts get nothing and one a lot.
    let mut chosen = Vec::new();
    for _ in 0..tokens {
        let mut order = lab.random.shuffled(experts);
        order.retain(|expert| expert % 5 != 3);
        if let Some(at) = order.iter().position(|expert| *expert == 1) {
            order.swap(0, at);
        }
        let mut mine: Vec<i32> = order[..top_k].iter().map(|expert| *expert as i32).collect();
        mine.sort_unstable();
        chosen.extend(mine);
    }
    let d_chosen = lab.upload(&chosen);
    let rows = tokens * top_k;
    let sorted = Sorted {
        offsets: lab.poisoned((experts + 1) * 4),
        row_token: lab.poisoned(rows * 4),
        slot_row: lab.poisoned(rows * 4),
        tiles: lab.poisoned((rows / tile_rows + experts) * 8),
        chosen,
    };
    lab.run(
        &plan::permute(tokens, top_k, experts).expect("a plan"),
        &PermuteParams {
            chosen: d_chosen.address(),
            offsets: sorted.offsets.address(),
            row_token: sorted.row_token.address(),
            slot_row: sorted.slot_row.address(),
            tiles: sorted.tiles.address(),
            tokens: tokens as i32,
            top_k: top_k as i32,
            experts: experts as i32,
            tile_rows: tile_rows as i32,
            first_expert: held.start as i32,
            experts_held: held.len() as i32,
        },
    );
    sorted
}

#[test]
fn permutation_is_a_stable_sort_with_a_tile_for_every_row() {
    on_every_schedule("permute", |lab| {
        for (tokens, top_k, experts) in [
            (1, 8, 256),
            (7, 2, 12),
            (64, 6, 64),
            (129, 8, 16),
            (300, 2, 8),
        ] {
            let sorted = permute(lab, tokens, top_k, experts);
            let rows = tokens * top_k;
            let (slots, first_rows) = reference::permute(&sorted.chosen, experts);
            let row_token = lab.read_i32(&sorted.row_token, rows);
            let slot_row = lab.read_i32(&sorted.slot_row, rows);
            for (row, slot) in slots.iter().enumerate() {
                assert_eq!(row_token[row], (slot / top_k) as i32);
                assert_eq!(slot_row[*slot], row as i32);
            }
            let offsets = lab.read_i32(&sorted.offsets, experts + 1);
            let first_rows: Vec<i32> = first_rows.iter().map(|row| *row as i32).collect();
            assert_eq!(offsets, first_rows);
            let tile_rows = plan::grouped_tile_rows(rows, experts);
            let tiles = lab.read_i32(&sorted.tiles, plan::grouped_tiles(rows, experts) * 2);
            let mut covered = vec![0; rows];
            for tile in tiles.chunks(2).filter(|tile| tile[0] >= 0) {
                let (expert, first) = (tile[0] as usize, tile[1] as usize);
                let end = (offsets[expert + 1] as usize).min(first + tile_rows);
                covered[first..end].iter_mut().for_each(|count| *count += 1);
            }
            // The last slot of the list may be past the last expert's tiles: it must then say so.
            assert!(
                covered.iter().all(|count| *count == 1),
                "{tokens} tokens, {experts} experts: {covered:?}"
            );
        }
    });
}

#[test]
fn tiles_are_of_the_experts_held_and_rows_of_all() {
    on_every_schedule("permute held", |lab| {
        let (tokens, top_k, experts) = (129, 4, 16);
        let (rows, tile_rows) = (tokens * top_k, 16);
        for held in [0..16, 0..4, 4..12, 12..16] {
            let sorted = permute_held(lab, tokens, top_k, experts, tile_rows, held.clone());
            let (slots, _) = reference::permute(&sorted.chosen, experts);
            let expert_of = |row: usize| sorted.chosen[slots[row]] as usize;
            let slot_row = lab.read_i32(&sorted.slot_row, rows);
            for (row, slot) in slots.iter().enumerate() {
                assert_eq!(slot_row[*slot], row as i32);
            }
            let offsets = lab.read_i32(&sorted.offsets, experts + 1);
            let tiles = lab.read_i32(&sorted.tiles, (rows / tile_rows + experts) * 2);
            let mut covered = vec![0; rows];
            for tile in tiles.chunks(2).filter(|tile| tile[0] >= 0) {
                let (expert, first) = (held.start + tile[0] as usize, tile[1] as usize);
                assert!(held.contains(&expert), "{expert}");
                assert_eq!(expert_of(first), expert);
                let end = (offsets[expert + 1] as usize).min(first + tile_rows);
                covered[first..end].iter_mut().for_each(|count| *count += 1);
            }
            for (row, covered) in covered.into_iter().enumerate() {
                let wanted = usize::from(held.contains(&expert_of(row)));
                assert_eq!(covered, wanted, "{held:?}: row {row}");
            }
        }
    });
}

#[test]
fn grouped_gemm_gives_every_row_its_experts_matrix() {
    on_every_schedule("grouped", |lab| {
        for format in [Format::Bf16, Format::Fp8] {
            // Rows come through the sort, or, for the second matrix of an expert, lie sorted already.
            for (tokens, top_k, experts, n, k, gathered) in [
                (1, 2, 8, 40, 80, true),
                (7, 3, 16, 136, 144, true),
                (129, 2, 6, 72, 272, true),
                (7, 3, 16, 40, 144, false),
                (129, 1, 5, 72, 80, false),
                (64, 1, 3, 576, 144, true),
                (64, 1, 6, 576, 80, false),
                (64, 2, 4, 17, 208, true),
            ] {
                let sorted = permute(lab, tokens, top_k, experts);
                let rows = tokens * top_k;
                let a_count = if gathered { tokens } else { rows };
                let a = Operands::new(lab, format, a_count, k, 0, 1);
                let matrices: Vec<Operands> = (0..experts)
                    .map(|_| Operands::new(lab, format, n, k, 0, 128))
                    .collect();
                let (d_a, d_a_scales) = a.upload(lab);
                let (d_b, d_b_scales) = Operands::stacked(&matrices).upload(lab);
                let c = lab.poisoned(rows * n * 4);
                let k_blocks = k.div_ceil(128);
                lab.run(
                    &plan::grouped_gemm(format, rows, n, k, experts).expect("a plan"),
                    &GemmParams {
                        a: d_a.address(),
                        b: d_b.address(),
                        c: c.address(),
                        a_scales: d_a_scales.address(),
                        b_scales: d_b_scales.address(),
                        a_rows: address(gathered.then_some(&sorted.row_token)),
                        tiles: sorted.tiles.address(),
                        offsets: sorted.offsets.address(),
                        b_batch: (n * k) as i64,
                        b_scales_batch: (n.div_ceil(128) * k_blocks) as i64,
                        m: rows as i32,
                        n: n as i32,
                        k: k as i32,
                        lda: k as i32,
                        ldb: k as i32,
                        ldc: n as i32,
                        a_scales_stride: k_blocks as i32,
                        b_scales_stride: k_blocks as i32,
                        c_is_float32: 1,
                        ..GemmParams::default()
                    },
                );
                let got = lab.read_f32(&c, rows * n);
                let row_token = lab.read_i32(&sorted.row_token, rows);
                let offsets = lab.read_i32(&sorted.offsets, experts + 1);
                let wide: Vec<Vec<Vec<f64>>> = matrices
                    .iter()
                    .map(|matrix| (0..n).map(|j| matrix.row(j)).collect())
                    .collect();
                for row in 0..rows {
                    let expert = (0..experts)
                        .find(|e| (row as i32) < offsets[e + 1])
                        .expect("an expert");
                    let from = if gathered {
                        row_token[row] as usize
                    } else {
                        row
                    };
                    let token = a.row(from);
                    for j in 0..n {
                        let weights = &wide[expert][j];
                        let want = reference::dot(&token, weights);
                        let size: f64 = token.iter().zip(weights).map(|(x, y)| (x * y).abs()).sum();
                        close(
                            &format!("{format:?} [{row}, {j}]"),
                            &[got[row * n + j]],
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
fn combination_sums_each_tokens_experts_and_the_shared_one() {
    on_every_schedule("combine", |lab| {
        for (tokens, top_k, width) in [(1, 8, 7168), (7, 6, 1032), (64, 2, 8), (129, 1, 264)] {
            let rows = tokens * top_k;
            let y = lab.random.bf16s(rows * width, 1.0);
            let slot_row: Vec<i32> = lab
                .random
                .shuffled(rows)
                .into_iter()
                .map(|row| row as i32)
                .collect();
            let weights = lab.random.floats(rows, 1.0);
            let shared = lab.random.bf16s(tokens * width, 1.0);
            let (d_y, d_rows, d_weights, d_shared) = (
                lab.upload(&y),
                lab.upload(&slot_row),
                lab.upload(&weights),
                lab.upload(&shared),
            );
            let wide_weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
            let wide_shared = reference::widen(&shared);
            for with_shared in [true, false] {
                let out = lab.poisoned(tokens * width * 2);
                lab.run(
                    &plan::combine(tokens, width).expect("a plan"),
                    &CombineParams {
                        y: d_y.address(),
                        slot_row: d_rows.address(),
                        weights: d_weights.address(),
                        shared: if with_shared {
                            d_shared.address()
                        } else {
                            Address::NULL
                        },
                        out: out.address(),
                        tokens: tokens as i32,
                        top_k: top_k as i32,
                        width: width as i32,
                        y_stride: width as i32,
                    },
                );
                let want = reference::combine(
                    &reference::widen(&y),
                    width,
                    top_k,
                    &slot_row,
                    &wide_weights,
                    with_shared.then_some(&wide_shared),
                );
                close(
                    "combine",
                    &lab.read_bf16(&out, tokens * width),
                    &want,
                    BF16,
                    1e-5,
                );
            }
        }
    });
}
