//! Which experts a token uses and with what weight (DeepSeek-V3 `inference/model.py`, `Gate.forward`).
//!
//! Invariant: the lower index wins every tie, between experts and between groups, and the result is listed in
//! ascending expert order, so that every backend sums the same numbers in the same order.
//!
//! Exponentials are taken in float64 and rounded once: the float32 ones of different C libraries differ in the last
//! place, which is enough to choose another expert.
//!
//! Surprise: experts outside the chosen groups are masked with minus infinity. Implementations that mask with zero
//! choose a masked expert as soon as all biased scores of the open groups are negative.

use engine_spec::{GateScoring, GateSelection};

use crate::tensors::WeightId;

/// A layer's gate.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// `[experts, hidden]`.
    pub weight: WeightId,
    /// `[experts]`, for [`GateSelection::BiasedGroups`]: added for the choice, never in the weights.
    pub bias: Option<WeightId>,
    /// Routed experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Logits to scores.
    pub scoring: GateScoring,
    /// Scores to experts.
    pub selection: GateSelection,
    /// Groups of equal size.
    pub groups: usize,
    /// Groups a token may use.
    pub groups_per_token: usize,
    /// Divide the chosen scores by their sum.
    pub normalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// An expert of a token.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Choice {
    /// Which.
    pub expert: u32,
    /// Factor on its output.
    pub weight: f32,
}

/// Buffers of [`Gate::choose`], kept between calls.
#[derive(Clone, Debug, Default)]
pub struct GateScratch {
    ranked: Vec<f32>,
    group_scores: Vec<f32>,
    order: Vec<usize>,
    kept: Vec<bool>,
}

impl Gate {
    /// Chooses [`Gate::top_k`] experts of one token. `scores` holds the logits and ends up holding the scores; `bias`
    /// is the data of [`Gate::bias`]; `chosen` has room for `top_k` choices.
    pub fn choose(
        &self,
        scores: &mut [f32],
        bias: Option<&[f32]>,
        scratch: &mut GateScratch,
        chosen: &mut [Choice],
    ) {
        match self.scoring {
            GateScoring::Sigmoid => {
                for score in scores.iter_mut() {
                    *score = (1.0 / (1.0 + (-f64::from(*score)).exp())) as f32;
                }
            }
            GateScoring::Softmax => softmax(scores),
        }
        let GateScratch {
            ranked,
            group_scores,
            order,
            kept,
        } = scratch;
        ranked.clear();
        match bias {
            Some(bias) => ranked.extend(scores.iter().zip(bias).map(|(s, b)| s + b)),
            None => ranked.extend_from_slice(scores),
        }
        if self.selection != GateSelection::Greedy && self.groups_per_token < self.groups {
            let size = self.experts / self.groups;
            group_scores.clear();
            group_scores.extend(ranked.chunks(size).map(|group| self.group_score(group)));
            top(group_scores, self.groups_per_token, order);
            kept.clear();
            kept.resize(self.groups, false);
            for group in order.iter() {
                kept[*group] = true;
            }
            for (group, members) in ranked.chunks_mut(size).enumerate() {
                if !kept[group] {
                    members.fill(f32::NEG_INFINITY);
                }
            }
        }
        top(ranked, self.top_k, order);
        order.sort_unstable();
        let total: f32 = order.iter().map(|expert| scores[*expert]).sum();
        for (choice, expert) in chosen.iter_mut().zip(order.iter()) {
            let score = scores[*expert];
            let share = if self.normalise {
                score / (total + 1e-20)
            } else {
                score
            };
            *choice = Choice {
                expert: *expert as u32,
                weight: share * self.scale,
            };
        }
    }

    fn group_score(&self, group: &[f32]) -> f32 {
        let mut first = f32::NEG_INFINITY;
        let mut second = f32::NEG_INFINITY;
        for &score in group {
            if score > first {
                second = first;
                first = score;
            } else if score > second {
                second = score;
            }
        }
        match self.selection {
            GateSelection::BiasedGroups if group.len() > 1 => first + second,
            _ => first,
        }
    }
}

/// The indices of the `count` highest values, the lower index first among equals. A NaN ranks below everything.
fn top(values: &[f32], count: usize, order: &mut Vec<usize>) {
    order.clear();
    order.extend(0..values.len());
    let key = |index: usize| {
        let value = values[index];
        if value.is_nan() {
            f32::NEG_INFINITY
        } else {
            value
        }
    };
    let by_rank = |a: &usize, b: &usize| key(*b).total_cmp(&key(*a)).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, by_rank);
        order.truncate(count);
    }
}

fn softmax(scores: &mut [f32]) {
    let highest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for score in scores.iter_mut() {
        let power = f64::from(*score - highest).exp();
        *score = power as f32;
        total += power;
    }
    for score in scores.iter_mut() {
        *score = (f64::from(*score) / total) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn gate(selection: GateSelection, groups: usize, groups_per_token: usize) -> Gate {
        Gate {
            weight: WeightId(0),
            bias: None,
            experts: 8,
            top_k: 2,
            scoring: match selection {
                GateSelection::BiasedGroups => GateScoring::Sigmoid,
                _ => GateScoring::Softmax,
            },
            selection,
            groups,
            groups_per_token,
            normalise: selection == GateSelection::BiasedGroups,
            scale: 2.5,
        }
    }

    fn experts(gate: &Gate, logits: [f32; 8], bias: Option<[f32; 8]>) -> Vec<Choice> {
        let mut scores = logits;
        let mut chosen = vec![Choice::default(); gate.top_k];
        let mut scratch = GateScratch::default();
        gate.choose(
            &mut scores,
            bias.as_ref().map(|b| &b[..]),
            &mut scratch,
            &mut chosen,
        );
        chosen
    }

    fn indices(choices: &[Choice]) -> Vec<u32> {
        choices.iter().map(|choice| choice.expert).collect()
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let gate = gate(GateSelection::BiasedGroups, 1, 1);
        let mut bias = [0.0; 8];
        bias[6] = 5.0;
        let chosen = experts(&gate, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], Some(bias));
        assert_eq!(indices(&chosen), [1, 6]);
        let [one, half] = [1.0f32 / (1.0 + (-1.0f32).exp()), 0.5f32];
        assert!((chosen[0].weight - 2.5 * one / (one + half)).abs() < 1e-6);
        assert!((chosen[1].weight - 2.5 * half / (one + half)).abs() < 1e-6);
    }

    #[test]
    fn negative_biased_scores_stay_inside_the_chosen_groups() {
        // Two groups of four; all biased scores are negative, the second group's less so.
        let gate = gate(GateSelection::BiasedGroups, 2, 1);
        let bias = [-9.0, -9.0, -9.0, -9.0, -3.0, -3.5, -4.0, -4.5];
        let chosen = experts(&gate, [0.0; 8], Some(bias));
        assert_eq!(indices(&chosen), [4, 5]);
    }

    #[test]
    fn the_lowest_index_wins_every_tie() {
        for (groups, kept) in [(1, 1), (4, 2)] {
            for selection in [
                GateSelection::BiasedGroups,
                GateSelection::GroupLimitedGreedy,
            ] {
                let chosen = experts(&gate(selection, groups, kept), [0.25; 8], None);
                assert_eq!(indices(&chosen), [0, 1]);
            }
        }
    }

    #[test]
    fn v2_groups_rank_by_their_best_and_v3_groups_by_their_best_two() {
        let logits = [3.0, -9.0, 2.0, 2.0, -9.0, -9.0, -9.0, -9.0];
        let v2 = experts(&gate(GateSelection::GroupLimitedGreedy, 4, 1), logits, None);
        assert_eq!(indices(&v2), [0, 1]);
        let v3 = experts(&gate(GateSelection::BiasedGroups, 4, 1), logits, None);
        assert_eq!(indices(&v3), [2, 3]);
    }

    proptest! {
        #[test]
        fn top_is_a_stable_descending_sort_cut_short(
            values in prop::collection::vec(prop::sample::select(vec![-2.0f32, -0.5, 0.0, 0.5, 1.0]), 1..40),
            count in 1usize..40,
        ) {
            let count = count.min(values.len());
            let mut found = Vec::new();
            top(&values, count, &mut found);
            found.sort_unstable();
            let mut expected: Vec<usize> = (0..values.len()).collect();
            expected.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
            expected.truncate(count);
            expected.sort_unstable();
            prop_assert_eq!(found, expected);
        }
    }
}
