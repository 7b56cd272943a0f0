//! Sampling against exact probabilities, and what each parameter does.

use super::*;
use proptest::prelude::*;

fn context(tokens: &[TokenId], prompt_len: usize) -> SampleContext<'_> {
    SampleContext {
        tokens,
        prompt_len,
        choice: 0,
    }
}

fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

/// How often each token is drawn over many positions.
fn histogram(row: &[f32], parameters: &SamplingParameters, draws: usize) -> Vec<usize> {
    let mut sampler = Sampler::default();
    let mut counts = vec![0; row.len()];
    let history = vec![TokenId(0); draws];
    for position in 0..draws {
        let context = context(&history[..position], position);
        let sampled = sampler.sample(row, parameters, context).unwrap();
        counts[sampled.token.index()] += 1;
    }
    counts
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let row = [1.0, 3.0, 3.0, -1.0];
    let sampled = Sampler::default()
        .sample(&row, &SamplingParameters::greedy(), context(&[], 0))
        .unwrap();
    assert_eq!(sampled.token, TokenId(1));
}

#[test]
fn plain_sampling_follows_the_softmax() {
    let row = [0.0, (2.0f32).ln(), (5.0f32).ln()];
    let counts = histogram(&row, &SamplingParameters::default(), 8000);
    for (count, expected) in counts.iter().zip([1000.0, 2000.0, 5000.0]) {
        assert!((*count as f64 - expected).abs() < 150.0, "{counts:?}");
    }
}

#[test]
fn top_k_top_p_and_min_p_cut_the_tail() {
    let row = [0.0, (2.0f32).ln(), (5.0f32).ln(), f32::MIN / 4.0];
    let cut = |parameters: SamplingParameters| -> Vec<bool> {
        histogram(&row, &parameters, 2000)
            .iter()
            .map(|c| *c > 0)
            .collect()
    };
    let base = SamplingParameters::default();
    assert_eq!(
        cut(SamplingParameters {
            top_k: 2,
            ..base.clone()
        }),
        [false, true, true, false]
    );
    assert_eq!(
        cut(SamplingParameters {
            top_p: 0.6,
            ..base.clone()
        }),
        [false, false, true, false]
    );
    assert_eq!(
        cut(SamplingParameters {
            top_p: 0.8,
            ..base.clone()
        }),
        [false, true, true, false]
    );
    assert_eq!(
        cut(SamplingParameters {
            min_p: 0.3,
            ..base.clone()
        }),
        [false, true, true, false]
    );
    assert_eq!(
        cut(SamplingParameters { top_k: 1, ..base }),
        [false, false, true, false]
    );
}

#[test]
fn penalties_and_bias_move_the_choice() {
    let row = [1.0, 0.9, 0.0];
    let history = tokens(&[2, 0, 0]);
    let greedy = |change: fn(&mut SamplingParameters)| {
        let mut parameters = SamplingParameters::greedy();
        change(&mut parameters);
        Sampler::default()
            .sample(&row, &parameters, context(&history, 1))
            .unwrap()
            .token
    };
    assert_eq!(greedy(|_| ()), TokenId(0));
    assert_eq!(greedy(|p| p.presence_penalty = 0.2), TokenId(1));
    assert_eq!(greedy(|p| p.frequency_penalty = 0.04), TokenId(0));
    assert_eq!(greedy(|p| p.frequency_penalty = 0.06), TokenId(1));
    assert_eq!(greedy(|p| p.repetition_penalty = 1.5), TokenId(1));
    assert_eq!(
        greedy(|p| {
            p.logit_bias.insert(TokenId(2), 50.0);
        }),
        TokenId(2)
    );
}

#[test]
fn logprobs_are_those_of_the_model_and_sum_to_one() {
    let row = [0.0, (2.0f32).ln(), (5.0f32).ln()];
    let parameters = SamplingParameters {
        logprobs: Some(3),
        ..SamplingParameters::greedy()
    };
    let sampled = Sampler::default()
        .sample(&row, &parameters, context(&[], 0))
        .unwrap();
    let logprobs = sampled.logprobs.unwrap();
    assert!((logprobs.chosen.exp() - 5.0 / 8.0).abs() < 1e-6);
    assert_eq!(
        logprobs.top.iter().map(|t| t.0.0).collect::<Vec<_>>(),
        [2, 1, 0]
    );
    assert!((logprobs.top.iter().map(|t| t.1.exp()).sum::<f32>() - 1.0).abs() < 1e-6);
}

#[test]
fn a_logit_that_is_not_finite_is_refused() {
    let error = Sampler::default()
        .sample(
            &[0.0, f32::NAN],
            &SamplingParameters::greedy(),
            context(&[], 0),
        )
        .unwrap_err();
    assert_eq!(error, NonFiniteLogit { token: TokenId(1) });
}

#[test]
fn a_parameter_out_of_range_is_named() {
    let parameters = SamplingParameters {
        temperature: f32::NAN,
        ..Default::default()
    };
    assert_eq!(
        parameters.validate().unwrap_err().to_string(),
        "temperature is NaN, but must be between 0 and 2"
    );
    let parameters = SamplingParameters {
        top_p: 0.0,
        ..Default::default()
    };
    assert_eq!(parameters.validate().unwrap_err().field, "top_p");
}

proptest! {
    /// Truncation with a growing partial sort equals truncation with a whole sort.
    #[test]
    fn nucleus_equals_its_definition(
        row in proptest::collection::vec(-4.0f32..4.0, 1..400),
        top_p in 0.05f32..1.0,
        top_k in 0u32..200,
        draw in 0.0f64..1.0,
    ) {
        let parameters = SamplingParameters { top_p, top_k, ..Default::default() };
        let token = Sampler::default().draw(&row, &parameters, draw);
        let mut all: Vec<(f32, u32)> = row.iter().enumerate().map(|(i, &l)| (l, i as u32)).collect();
        all.sort_by(better);
        let keep = if top_k == 0 { all.len() } else { all.len().min(top_k as usize) };
        let rank = all.iter().position(|c| c.1 == token.0).unwrap();
        prop_assert!(rank < keep);
        let best = f64::from(all[0].0);
        let weight = |l: f32| (f64::from(l) - best).exp();
        let total: f64 = all[..keep].iter().map(|c| weight(c.0)).sum();
        let before: f64 = all[..rank].iter().map(|c| weight(c.0)).sum();
        prop_assert!(before <= total * f64::from(top_p) + 1e-6);
    }
}
