//! Operations on rows: embedding, norm, activation, quantisation.

use half::bf16;
use kernels::params::{
    ActivationParams, Address, CopyBlocksParams, EmbedParams, GreedyParams, RmsNormParams,
};
use kernels::plan::{self, Activation, Format};
use kernels::reference;

use crate::harness::{BF16, address, close, on_every_schedule};

const ROWS: [usize; 4] = [1, 7, 64, 129];

#[test]
fn embedding_copies_rows_and_shows_unknown_tokens() {
    on_every_schedule("embed", |lab| {
        for (rows, width) in ROWS.into_iter().zip([2048, 128, 1032, 8]) {
            let vocabulary = 50;
            let table = lab.random.bf16s(vocabulary * width, 1.0);
            let mut tokens: Vec<u32> = (0..rows)
                .map(|_| lab.random.below(vocabulary) as u32)
                .collect();
            tokens[rows / 2] = vocabulary as u32 + 3;
            tokens[rows - 1] = vocabulary as u32 - 1;
            let (d_table, d_tokens) = (lab.upload(&table), lab.upload(&tokens));
            for elsewhere in [0, 1] {
                let out = lab.poisoned(rows * width * 2);
                lab.run(
                    &plan::embed(rows, width).expect("a plan"),
                    &EmbedParams {
                        table: d_table.address(),
                        tokens: d_tokens.address(),
                        out: out.address(),
                        rows: rows as i32,
                        width: width as i32,
                        vocabulary: vocabulary as i32,
                        elsewhere,
                    },
                );
                let got = lab.read_bf16(&out, rows * width);
                // Another rank may have the token: its row is added to this one's.
                let absent = if elsewhere == 1 { 0.0 } else { f64::NAN };
                let want = reference::embed(&reference::widen(&table), width, &tokens, absent);
                for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same, "value {index} is {got}, but should be {want}");
                }
            }
        }
    });
}

/// What the norm kernels leave behind.
struct Normed {
    residual: Vec<f64>,
    out: Vec<f64>,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

fn norm(
    lab: &crate::harness::Lab,
    format: Format,
    x: &[bf16],
    residual: Option<&[bf16]>,
    weight: &[bf16],
    power_of_two: bool,
) -> Normed {
    let width = weight.len();
    let rows = x.len() / width;
    let (d_x, d_weight) = (lab.upload(x), lab.upload(weight));
    let d_residual = residual.map(|r| lab.upload(r));
    let bytes = match format {
        Format::Bf16 => 2,
        Format::Fp8 => 1,
    };
    let groups = width.div_ceil(128);
    let out = lab.poisoned(rows * width * bytes);
    let scales = lab.poisoned(rows * groups * 4);
    lab.run(
        &plan::rms_norm(format, rows, width).expect("a plan"),
        &RmsNormParams {
            x: d_x.address(),
            residual: address(d_residual.as_ref()),
            weight: d_weight.address(),
            out: out.address(),
            scales: if format == Format::Fp8 {
                scales.address()
            } else {
                Address::NULL
            },
            rows: rows as i32,
            width: width as i32,
            x_stride: width as i32,
            out_stride: width as i32,
            eps: 1e-6,
            power_of_two_scales: i32::from(power_of_two),
        },
    );
    Normed {
        residual: d_residual.map_or_else(Vec::new, |r| lab.read_bf16(&r, rows * width)),
        out: if format == Format::Bf16 {
            lab.read_bf16(&out, rows * width)
        } else {
            Vec::new()
        },
        codes: if format == Format::Fp8 {
            lab.read(&out, rows * width)
        } else {
            Vec::new()
        },
        scales: if format == Format::Fp8 {
            lab.read(&scales, rows * groups)
        } else {
            Vec::new()
        },
    }
}

/// What is normalised: the sum as it is stored.
fn residual_stream(x: &[bf16], residual: Option<&[bf16]>) -> Vec<f64> {
    let Some(residual) = residual else {
        return reference::widen(x);
    };
    let sums = x.iter().zip(residual);
    let stored = sums.map(|(x, r)| bf16::from_f32(x.to_f32() + r.to_f32()));
    reference::widen(&stored.collect::<Vec<_>>())
}

#[test]
fn norm_adds_the_residual_and_normalises_what_it_stored() {
    on_every_schedule("norm", |lab| {
        for (rows, width) in ROWS.into_iter().zip([7168, 2048, 136, 8]) {
            let x = lab.random.bf16s(rows * width, 3.0);
            let weight = lab.random.bf16s(width, 2.0);
            let residual = lab.random.bf16s(rows * width, 3.0);
            for residual in [Some(residual.as_slice()), None] {
                let got = norm(lab, Format::Bf16, &x, residual, &weight, false);
                let stream = residual_stream(&x, residual);
                if residual.is_some() {
                    assert_eq!(got.residual, stream);
                }
                for row in 0..rows {
                    let part = row * width..(row + 1) * width;
                    let want = reference::rms_norm(
                        &stream[part.clone()],
                        &reference::widen(&weight),
                        1e-6,
                    );
                    close(&format!("row {row}"), &got.out[part], &want, BF16, 1e-6);
                }
            }
        }
    });
}

#[test]
fn a_norm_row_does_not_depend_on_the_batch() {
    on_every_schedule("norm alone", |lab| {
        let width = 1536;
        let x = lab.random.bf16s(9 * width, 3.0);
        let weight = lab.random.bf16s(width, 2.0);
        let all = norm(lab, Format::Bf16, &x, None, &weight, false);
        let alone = norm(
            lab,
            Format::Bf16,
            &x[4 * width..5 * width],
            None,
            &weight,
            false,
        );
        assert_eq!(all.out[4 * width..5 * width], alone.out);
    });
}

/// Codes times scales must be near the values, and the codes those of the scale that was written.
fn check_quantised(what: &str, codes: &[u8], scales: &[f32], want: &[f64], power_of_two: bool) {
    for (group, part) in want.chunks(128).enumerate() {
        let amax = part
            .iter()
            .fold(1e-4, |best: f64, value| best.max(value.abs()));
        let scale = f64::from(scales[group]);
        let ideal = amax / 448.0;
        if power_of_two {
            assert_eq!(scale.log2().fract(), 0.0, "{what}: scale {scale}");
            assert!(
                scale >= ideal * 0.999 && scale <= ideal * 2.001,
                "{what}: scale {scale}, values up to {amax}"
            );
        } else {
            assert!(
                (scale / ideal - 1.0).abs() < 1e-5,
                "{what}: scale {scale}, values up to {amax}"
            );
        }
        for (index, value) in part.iter().enumerate() {
            let got = reference::e4m3_value(codes[group * 128 + index]) * scale;
            // Half a step of 3 bits, or of the smallest subnormal.
            let room = value.abs() / 16.0 * 1.001 + scale * 2f64.powi(-10) * 1.001;
            assert!(
                (got - value).abs() <= room,
                "{what}: value {index} of group {group} is {got}, should be {value}"
            );
        }
    }
}

#[test]
fn norm_quantises_in_groups_of_128() {
    on_every_schedule("norm fp8", |lab| {
        for (rows, width) in ROWS.into_iter().zip([7168, 2048, 136, 576]) {
            let residual = lab.random.bf16s(rows * width, 3.0);
            for (power_of_two, residual) in [
                (false, None),
                (true, None),
                (false, Some(residual.as_slice())),
                (true, Some(residual.as_slice())),
            ] {
                let x = lab.random.bf16s(rows * width, 3.0);
                let weight = lab.random.bf16s(width, 2.0);
                let got = norm(lab, Format::Fp8, &x, residual, &weight, power_of_two);
                let stream = residual_stream(&x, residual);
                if residual.is_some() {
                    assert_eq!(got.residual, stream);
                }
                let groups = width.div_ceil(128);
                for row in 0..rows {
                    let part = row * width..(row + 1) * width;
                    let want = reference::rms_norm(
                        &stream[part.clone()],
                        &reference::widen(&weight),
                        1e-6,
                    );
                    check_quantised(
                        &format!("row {row}"),
                        &got.codes[part],
                        &got.scales[row * groups..][..groups],
                        &want,
                        power_of_two,
                    );
                }
            }
        }
    });
}

#[test]
fn quantisation_gives_the_very_codes_of_the_reference() {
    on_every_schedule("quantise", |lab| {
        for (rows, width, stride) in [
            (1usize, 128usize, 128usize),
            (7, 576, 2112),
            (3, 2056, 2056),
            (64, 136, 144),
            (129, 24, 24),
        ] {
            for power_of_two in [false, true] {
                let mut x = lab.random.bf16s(rows * stride, 20.0);
                for value in x.iter_mut().step_by(7) {
                    *value = bf16::from_f32(value.to_f32() * 1e-5); // subnormal codes
                }
                x[..128].fill(bf16::ZERO); // the smallest scale
                let d_x = lab.upload(&x);
                let groups = width.div_ceil(128);
                let (out, scales) = (lab.poisoned(rows * width), lab.poisoned(rows * groups * 4));
                lab.run(
                    &plan::activation(Activation::Quantise, rows, width).expect("a plan"),
                    &ActivationParams {
                        x: d_x.address(),
                        out: out.address(),
                        scales: scales.address(),
                        rows: rows as i32,
                        width: width as i32,
                        x_stride: stride as i32,
                        out_stride: width as i32,
                        power_of_two_scales: i32::from(power_of_two),
                        scales_stride: groups as i32,
                    },
                );
                let (codes, scales) = (
                    lab.read::<u8>(&out, rows * width),
                    lab.read::<f32>(&scales, rows * groups),
                );
                for row in 0..rows {
                    let values: Vec<f32> = x[row * stride..][..width]
                        .iter()
                        .map(|v| v.to_f32())
                        .collect();
                    let (want_codes, want_scales) = reference::quantise(&values, power_of_two);
                    assert_eq!(scales[row * groups..][..groups], want_scales);
                    assert_eq!(codes[row * width..][..width], want_codes);
                }
            }
        }
    });
}

#[test]
fn a_nan_stays_visible_through_quantisation() {
    on_every_schedule("quantise nan", |lab| {
        let mut x = lab.random.bf16s(256, 1.0);
        x[200] = bf16::NAN;
        let d_x = lab.upload(&x);
        let (out, scales) = (lab.poisoned(256), lab.poisoned(8));
        lab.run(
            &plan::activation(Activation::Quantise, 1, 256).expect("a plan"),
            &ActivationParams {
                x: d_x.address(),
                out: out.address(),
                scales: scales.address(),
                rows: 1,
                width: 256,
                x_stride: 256,
                out_stride: 256,
                power_of_two_scales: 0,
                scales_stride: 2,
            },
        );
        let scales = lab.read::<f32>(&scales, 2);
        assert!(scales[0].is_finite() && scales[1].is_nan(), "{scales:?}");
    });
}

#[test]
fn swiglu_multiplies_the_silu_of_the_gate() {
    on_every_schedule("swiglu", |lab| {
        for (rows, width) in ROWS.into_iter().zip([2048, 1408, 136, 8]) {
            for (format, power_of_two) in [
                (Format::Bf16, false),
                (Format::Fp8, false),
                (Format::Fp8, true),
            ] {
                let stride = 2 * width + 8;
                let x = lab.random.bf16s(rows * stride, 4.0);
                let d_x = lab.upload(&x);
                let groups = width.div_ceil(128);
                let (out, scales) = (
                    lab.poisoned(rows * width * 2),
                    lab.poisoned(rows * groups * 4),
                );
                lab.run(
                    &plan::activation(Activation::Swiglu(format), rows, width).expect("a plan"),
                    &ActivationParams {
                        x: d_x.address(),
                        out: out.address(),
                        scales: scales.address(),
                        rows: rows as i32,
                        width: width as i32,
                        x_stride: stride as i32,
                        out_stride: width as i32,
                        power_of_two_scales: i32::from(power_of_two),
                        scales_stride: groups as i32,
                    },
                );
                for row in 0..rows {
                    let want =
                        reference::swiglu(&reference::widen(&x[row * stride..][..2 * width]));
                    let what = format!("{format:?} row {row}");
                    if format == Format::Bf16 {
                        let got = lab.read_bf16(&out, rows * width);
                        close(&what, &got[row * width..][..width], &want, BF16, 1e-6);
                    } else {
                        let codes = lab.read::<u8>(&out, rows * width);
                        let scales = lab.read::<f32>(&scales, rows * groups);
                        check_quantised(
                            &what,
                            &codes[row * width..][..width],
                            &scales[row * groups..][..groups],
                            &want,
                            power_of_two,
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn greedy_takes_the_best_token_and_finds_broken_rows() {
    on_every_schedule("greedy", |lab| {
        for (rows, vocabulary, padding) in
            [(1, 129_280, 0), (7, 1000, 3), (64, 1, 0), (129, 513, 1)]
        {
            let stride = vocabulary + padding;
            // Few different values, so that ties are everywhere.
            let mut logits: Vec<f32> = (0..rows * stride)
                .map(|_| lab.random.below(90) as f32 * 0.25)
                .collect();
            // What lies between rows would win if it were read.
            for row in logits.chunks_mut(stride) {
                row[vocabulary..].fill(1e9);
            }
            let broken_row = rows - 1;
            if rows > 1 && vocabulary > 700 {
                logits[broken_row * stride + 699] = f32::INFINITY;
                logits[broken_row * stride + 5] = f32::NAN;
            }
            let d_logits = lab.upload(&logits);
            let (tokens, probabilities, broken) = (
                lab.poisoned(rows * 4),
                lab.poisoned(rows * 4),
                lab.poisoned(rows * 4),
            );
            lab.run(
                &plan::greedy(rows, vocabulary).expect("a plan"),
                &GreedyParams {
                    logits: d_logits.address(),
                    tokens: tokens.address(),
                    log_probabilities: probabilities.address(),
                    broken: broken.address(),
                    rows: rows as i32,
                    vocabulary: vocabulary as i32,
                    stride: stride as i32,
                    reserved: 0,
                },
            );
            let (tokens, broken) = (lab.read_i32(&tokens, rows), lab.read_i32(&broken, rows));
            let probabilities = lab.read_f32(&probabilities, rows);
            for row in 0..rows {
                let (token, probability) =
                    match reference::greedy(&logits[row * stride..][..vocabulary]) {
                        Ok(want) => want,
                        Err(first) => {
                            assert_eq!(broken[row], first as i32, "row {row}");
                            continue;
                        }
                    };
                assert_eq!(broken[row], -1, "row {row}");
                assert_eq!(tokens[row], token as i32, "row {row}");
                let got = [probabilities[row]];
                close("log-probability", &got, &[probability], 1e-5, 1e-5);
            }
        }
    });
}

#[test]
fn copying_blocks_touches_only_their_destinations() {
    on_every_schedule("copy blocks", |lab| {
        for (pairs, layers, block_bytes, blocks) in
            [(1, 1, 16, 2), (7, 3, 16 * 1152, 20), (3, 27, 4624, 9)]
        {
            let layer_bytes = blocks * block_bytes + 32;
            let mut want: Vec<u8> = (0..layers * layer_bytes)
                .map(|_| lab.random.next() as u8)
                .collect();
            let d_cache = lab.upload(&want);
            let order = lab.random.shuffled(blocks);
            let mut list: Vec<i32> = order[..2 * pairs]
                .iter()
                .map(|block| *block as i32)
                .collect();
            // Blocks that do not exist, one past the end and one before the beginning.
            list.extend([blocks as i32, 0, 0, blocks as i32, -1, 0, 0, -1]);
            reference::copy_blocks(&mut want, layer_bytes, block_bytes, blocks, &list);
            let d_pairs = lab.upload(&list);
            lab.run(
                &plan::copy_blocks(list.len() / 2, layers, block_bytes).expect("a plan"),
                &CopyBlocksParams {
                    cache: d_cache.address(),
                    pairs: d_pairs.address(),
                    layer_bytes: layer_bytes as i64,
                    block_bytes: block_bytes as i32,
                    blocks: blocks as i32,
                    layers: layers as i32,
                    reserved: 0,
                },
            );
            assert!(
                lab.read::<u8>(&d_cache, want.len()) == want,
                "{pairs} pairs of {block_bytes} bytes"
            );
        }
    });
}
