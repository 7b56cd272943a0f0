//! Sampling: bias, penalties and mask; the next token; log-probabilities.

use kernels::params::{Address, LogprobsParams, SAMPLE_NUMBERS, SampleAdjustParams, SampleParams};
use kernels::plan;
use kernels::reference::{self, Adjustment, Sampling, uniform};

use crate::harness::{Lab, on_every_schedule};

/// Off the warp, the block and the mask's word; few and many.
const VOCABULARIES: [usize; 4] = [1, 33, 700, 2051];
/// Of small vocabularies, how many rows.
const ROWS: [(usize, usize); 3] = [(35, 1), (35, 64), (33, 129)];

/// Some rows' histories, biases and masks.
struct Adjust {
    vocabulary: usize,
    stride: usize,
    logits: Vec<f32>,
    numbers: Vec<[f32; SAMPLE_NUMBERS]>,
    histories: Vec<(Vec<i32>, Vec<i32>)>,
    biases: Vec<Vec<(i32, f32)>>,
    masks: Vec<u32>,
}

impl Adjust {
    fn new(lab: &mut Lab, vocabulary: usize, rows: usize) -> Self {
        let stride = vocabulary + 3;
        let any = |lab: &mut Lab, count: usize| -> Vec<i32> {
            // Some are outside of the vocabulary, and many are twice there.
            (0..count)
                .map(|_| lab.random.below(vocabulary + 2) as i32 - 1)
                .collect()
        };
        Self {
            vocabulary,
            stride,
            logits: lab.random.floats(rows * stride, 8.0),
            numbers: (0..rows)
                .map(|row| match row % 3 {
                    0 => [1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
                    1 => [1.0, 1.0, 0.0, 0.7, -0.3, 1.3],
                    _ => [1.0, 1.0, 0.0, 0.0, 1.5, 0.8],
                })
                .collect(),
            histories: (0..rows)
                .map(|row| (any(lab, 40 * (row % 7)), any(lab, 700 / (row + 1))))
                .collect(),
            biases: (0..rows)
                .map(|row| {
                    let order = lab.random.shuffled(vocabulary);
                    let mut biased: Vec<_> = order[..vocabulary.min(row * 3)]
                        .iter()
                        .map(|token| (*token as i32, lab.random.float(50.0)))
                        .collect();
                    biased.push((vocabulary as i32 + 3, 1.0)); // unknown, and the next row's first
                    biased
                })
                .collect(),
            masks: (0..rows * plan::mask_words(vocabulary))
                .map(|_| lab.random.next() as u32)
                .collect(),
        }
    }

    fn want(&self, row: usize, biased: bool, masked: bool) -> Vec<f32> {
        let [.., presence, frequency, repetition] = self.numbers[row];
        let (prompt, output) = &self.histories[row];
        let words = plan::mask_words(self.vocabulary);
        let adjustment = Adjustment {
            presence,
            frequency,
            repetition,
            prompt,
            output,
            bias: if biased { &self.biases[row] } else { &[] },
            mask: masked.then(|| &self.masks[row * words..][..words]),
        };
        adjustment.apply(&self.logits[row * self.stride..][..self.vocabulary])
    }

    fn run(&self, lab: &Lab, biased: bool, masked: bool) -> Vec<f32> {
        let rows = self.numbers.len();
        let mut offsets = vec![0i32];
        let mut tokens = Vec::new();
        let (mut bias_tokens, mut bias, mut bias_offsets) = (Vec::new(), Vec::new(), vec![0i32]);
        for row in 0..rows {
            for part in [&self.histories[row].0, &self.histories[row].1] {
                tokens.extend(part);
                offsets.push(tokens.len() as i32);
            }
            for (token, value) in &self.biases[row] {
                bias_tokens.push(*token);
                bias.push(*value);
            }
            bias_offsets.push(bias.len() as i32);
        }
        tokens.push(0); // an empty buffer has no address
        let d_logits = lab.upload(&self.logits);
        let d_numbers = lab.upload(&self.numbers.concat());
        let (d_tokens, d_offsets) = (lab.upload(&tokens), lab.upload(&offsets));
        let (d_bias_tokens, d_bias) = (lab.upload(&bias_tokens), lab.upload(&bias));
        let d_bias_offsets = lab.upload(&bias_offsets);
        let d_mask = lab.upload(&self.masks);
        let count = rows * self.stride;
        let (out, counts) = (lab.poisoned(count * 4), lab.poisoned(count * 4));
        let given = |there: bool, address: Address| if there { address } else { Address::NULL };
        lab.run(
            &plan::sample_adjust(rows, self.vocabulary).expect("a plan"),
            &SampleAdjustParams {
                logits: d_logits.address(),
                out: out.address(),
                counts: counts.address(),
                numbers: d_numbers.address(),
                tokens: d_tokens.address(),
                offsets: d_offsets.address(),
                bias_tokens: d_bias_tokens.address(),
                bias: d_bias.address(),
                bias_offsets: given(biased, d_bias_offsets.address()),
                mask: given(masked, d_mask.address()),
                rows: rows as i32,
                vocabulary: self.vocabulary as i32,
                stride: self.stride as i32,
                mask_stride: plan::mask_words(self.vocabulary) as i32,
            },
        );
        let counted = lab.read::<u32>(&counts, count);
        let got = lab.read::<f32>(&out, count);
        for row in 0..rows {
            let padding = row * self.stride + self.vocabulary..(row + 1) * self.stride;
            assert!(got[padding.clone()].iter().all(|v| v.is_nan()), "row {row}");
            assert!(counted[padding].iter().all(|v| *v == u32::MAX), "row {row}");
        }
        got
    }
}

#[test]
fn adjusted_logits_have_bias_penalties_and_mask() {
    on_every_schedule("sample adjust", |lab| {
        for (vocabulary, rows) in VOCABULARIES.map(|v| (v, 7)).into_iter().chain(ROWS) {
            let adjust = Adjust::new(lab, vocabulary, rows);
            for (biased, masked) in [(false, false), (true, true)] {
                let got = adjust.run(lab, biased, masked);
                for row in 0..rows {
                    assert_eq!(
                        got[row * adjust.stride..][..vocabulary],
                        adjust.want(row, biased, masked),
                        "row {row} of {vocabulary}"
                    );
                }
            }
        }
    });
}

/// `(settings, logits, seed, choice, position)` of a row.
struct Row(Sampling, Vec<f32>, [i64; 3]);

fn sample(lab: &Lab, rows: &[Row], vocabulary: usize) -> Vec<i32> {
    let stride = vocabulary + 5;
    // What lies between rows would always be chosen.
    let mut logits = vec![f32::MAX; rows.len() * stride];
    let (mut numbers, mut top_k) = (Vec::new(), Vec::new());
    let mut draws: Vec<i64> = Vec::new();
    for (index, Row(sampling, row, draw)) in rows.iter().enumerate() {
        logits[index * stride..][..vocabulary].copy_from_slice(row);
        let Sampling {
            temperature,
            top_p,
            min_p,
            top_k: k,
        } = *sampling;
        numbers.extend([temperature, top_p, min_p, 0.0, 0.0, 1.0]);
        top_k.push(k as i32);
        draws.extend(draw);
    }
    let d_logits = lab.upload(&logits);
    let (d_numbers, d_top_k, d_draws) =
        (lab.upload(&numbers), lab.upload(&top_k), lab.upload(&draws));
    let chosen = lab.poisoned(rows.len() * 4);
    lab.run(
        &plan::sample(rows.len(), vocabulary).expect("a plan"),
        &SampleParams {
            logits: d_logits.address(),
            numbers: d_numbers.address(),
            top_k: d_top_k.address(),
            draws: d_draws.address(),
            chosen: chosen.address(),
            rows: rows.len() as i32,
            vocabulary: vocabulary as i32,
            stride: stride as i32,
            reserved: 0,
        },
    );
    lab.read(&chosen, rows.len())
}

#[test]
fn sampling_chooses_the_token_of_the_sorted_reference() {
    on_every_schedule("sample", |lab| {
        let settings = [
            (0.0, 1.0, 0.0, 0),
            (1.0, 1.0, 0.0, 0),
            (2.0, 1.0, 0.0, 0),
            (0.7, 1.0, 0.0, 5),
            (1.5, 1.0, 0.0, 40),
            (1.0, 0.9, 0.0, 0),
            (2.0, 0.3, 0.0, 50),
            (1.3, 1.0, 0.05, 0),
            (1.0, 0.95, 0.02, 20),
            (1e-4, 0.5, 0.0, 0),
        ];
        for (vocabulary, count) in VOCABULARIES.map(|v| (v, 11)).into_iter().chain(ROWS) {
            let mut rows = Vec::new();
            for index in 0..count - 1 {
                let (temperature, top_p, min_p, top_k) = settings[index % settings.len()];
                let sampling = Sampling {
                    temperature,
                    top_p,
                    min_p,
                    top_k,
                };
                let mut logits = lab.random.floats(vocabulary, 6.0);
                match index % 3 {
                    // Ties, exact and many.
                    0 => logits.iter_mut().for_each(|l| *l = l.round()),
                    // Tokens that a mask forbids.
                    1 => logits
                        .iter_mut()
                        .skip(1)
                        .step_by(2)
                        .for_each(|l| *l = f32::NEG_INFINITY),
                    _ => {}
                }
                let draw = [lab.random.next() as i64, index as i64, 1 << 33 | 77];
                rows.push(Row(sampling, logits, draw));
            }
            // The last row's last token: nothing lies behind it.
            let mut logits = vec![-20.0; vocabulary];
            logits[vocabulary - 1] = 20.0;
            let sampling = Sampling {
                temperature: 1.0,
                top_p: 1.0,
                min_p: 0.0,
                top_k: 0,
            };
            rows.push(Row(sampling, logits, [9, 9, 9]));
            let got = sample(lab, &rows, vocabulary);
            for (Row(sampling, logits, draw), got) in rows.iter().zip(&got) {
                let want = sampling.choose(logits, uniform(*draw));
                assert_eq!(Some(*got as usize), want, "{sampling:?} of {vocabulary}");
            }
            // Alone as in company.
            let one = count / 2..count / 2 + 1;
            assert_eq!(sample(lab, &rows[one.clone()], vocabulary), got[one]);
        }
    });
}

#[test]
fn a_row_that_allows_nothing_gives_no_token() {
    on_every_schedule("sample nothing", |lab| {
        let sampling = Sampling {
            temperature: 1.0,
            top_p: 0.5,
            min_p: 0.0,
            top_k: 3,
        };
        let rows = [f32::NEG_INFINITY, 0.25].map(|logit| Row(sampling, vec![logit; 40], [1, 0, 0]));
        let got = sample(lab, &rows, 40);
        assert_eq!(got[0], -1);
        assert!((0..3).contains(&got[1]), "{got:?}"); // the lower ones among equals
    });
}

#[test]
fn logprobs_are_of_the_whole_row_best_first() {
    on_every_schedule("logprobs", |lab| {
        for (vocabulary, rows) in VOCABULARIES.map(|v| (v, 7)).into_iter().chain(ROWS) {
            let (top, stride) = (5, vocabulary + 1);
            let mut logits = lab.random.floats(rows * stride, 9.0);
            let sick = vocabulary / 2;
            if rows > 3 {
                logits[2 * stride..3 * stride].fill(1.0); // all equal
                logits[3 * stride + sick] = f32::INFINITY;
            }
            let tokens: Vec<i32> = (0..rows)
                .map(|row| match row {
                    6 => vocabulary as i32, // unknown
                    _ => lab.random.below(vocabulary) as i32,
                })
                .collect();
            let (d_logits, d_tokens) = (lab.upload(&logits), lab.upload(&tokens));
            let (chosen, broken) = (lab.poisoned(rows * 4), lab.poisoned(rows * 4));
            let (top_tokens, top_values) =
                (lab.poisoned(rows * top * 4), lab.poisoned(rows * top * 4));
            lab.run(
                &plan::logprobs(rows, vocabulary, top).expect("a plan"),
                &LogprobsParams {
                    logits: d_logits.address(),
                    tokens: d_tokens.address(),
                    chosen: chosen.address(),
                    top_tokens: top_tokens.address(),
                    top_values: top_values.address(),
                    broken: broken.address(),
                    rows: rows as i32,
                    vocabulary: vocabulary as i32,
                    stride: stride as i32,
                    top: top as i32,
                },
            );
            let (chosen, broken) = (lab.read_f32(&chosen, rows), lab.read_i32(&broken, rows));
            let top_tokens = lab.read_i32(&top_tokens, rows * top);
            let top_values = lab.read::<f32>(&top_values, rows * top);
            for row in 0..rows {
                let values = &logits[row * stride..][..vocabulary];
                let (all, order) = match reference::logprobs(values, top) {
                    Ok(want) => want,
                    Err(first) => {
                        assert_eq!((row, first), (3, sick));
                        assert_eq!(broken[row], sick as i32);
                        continue;
                    }
                };
                assert_eq!(broken[row], -1, "row {row}");
                if row == 6 {
                    assert!(chosen[row].is_nan());
                } else {
                    let want = all[tokens[row] as usize];
                    assert!((chosen[row] - want).abs() <= 1e-6 * want.abs().max(1.0));
                }
                for n in 0..top {
                    let (token, value) = (top_tokens[row * top + n], top_values[row * top + n]);
                    let Some(want) = order.get(n) else {
                        assert_eq!((token, value), (-1, f32::NEG_INFINITY));
                        continue;
                    };
                    assert_eq!(token, *want as i32, "row {row} of {vocabulary}, place {n}");
                    let error = (f64::from(value) - all[*want]).abs();
                    assert!(error <= 1e-6 * all[*want].abs().max(1.0));
                }
            }
        }
    });
}
