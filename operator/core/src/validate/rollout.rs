//! How replicas are exchanged: `spec.rollout`.

use operator_api::{OnFailure, Rollout, RolloutAnalysis, RolloutStep};

use super::Rules;

/// Seconds a replica may take to finish its requests when the user names no number.
const DRAIN_TIMEOUT_SECONDS_DEFAULT: u32 = 120;
/// Seconds a replica of a new revision may take until it answers when the user names no number.
const DEADLINE_SECONDS_DEFAULT: u32 = 7200;
/// Seconds a step is watched when the user names no number.
const HOLD_SECONDS_DEFAULT: u32 = 300;
/// Failures in a row after which a replica is not started again when the user names no number.
const RESTART_BUDGET_DEFAULT: u32 = 10;

/// How replicas are exchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ValidRollout {
    /// Replicas beyond the wanted number while exchanging.
    pub surge_max: u32,
    /// Wanted replicas that may be missing.
    pub unavailable_max: u32,
    /// Seconds a replica may take to finish its requests.
    pub drain_timeout_seconds: u32,
    /// Whether the rollout stops where it is.
    pub is_paused: bool,
    /// Replicas that keep the revision before.
    pub partition: u32,
    /// Shares that run the new revision one after another.
    pub steps: Vec<Step>,
    /// Seconds a replica of a new revision may take until it answers.
    pub deadline_seconds: u32,
    /// What happens when a new revision fails.
    pub on_failure: OnFailure,
    /// How much worse a new revision may be; none when it is not compared.
    pub analysis: Option<ValidAnalysis>,
    /// Failures in a row after which a replica is not started again.
    pub restart_budget: u32,
    /// Another number tries what was given up once more.
    pub attempt: u32,
}

/// A share of the replicas that runs the new revision for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Share in percent.
    pub percent: u32,
    /// Seconds for which all of them must answer.
    pub hold_seconds: u32,
}

/// How much worse than the revision before a new one may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidAnalysis {
    /// Time to first token, in percent above.
    pub ttft_increase_percent_max: u32,
    /// Share of errors, in percentage points above.
    pub error_increase_percent_max: u32,
    /// Requests that both must have answered.
    pub requests_min: u32,
}

pub(super) fn valid_rollout(rules: &mut Rules, given: &Rollout) -> ValidRollout {
    let Rollout {
        max_surge,
        max_unavailable,
        drain_timeout_seconds,
        paused,
        partition,
        steps,
        progress_deadline_seconds,
        on_failure,
        analysis,
        restart_budget,
        attempt,
    } = given;
    let mut number = |field: &str, value: &Option<i32>, range, default| {
        rules.number(&format!("spec.rollout.{field}"), *value, range, default)
    };
    let surge_max = number("maxSurge", max_surge, (0, 10_000), 1);
    let unavailable_max = number("maxUnavailable", max_unavailable, (0, 10_000), 0);
    let drain = (1, 86_400);
    let valid = ValidRollout {
        surge_max,
        unavailable_max,
        drain_timeout_seconds: number(
            "drainTimeoutSeconds",
            drain_timeout_seconds,
            drain,
            DRAIN_TIMEOUT_SECONDS_DEFAULT,
        ),
        is_paused: paused.unwrap_or(false),
        partition: number("partition", partition, (0, 10_000), 0),
        deadline_seconds: number(
            "progressDeadlineSeconds",
            progress_deadline_seconds,
            (10, 604_800),
            DEADLINE_SECONDS_DEFAULT,
        ),
        on_failure: on_failure.unwrap_or_default(),
        restart_budget: number(
            "restartBudget",
            restart_budget,
            (1, 1000),
            RESTART_BUDGET_DEFAULT,
        ),
        attempt: number("attempt", attempt, (0, 1_000_000), 0),
        steps: valid_steps(rules, steps),
        analysis: analysis.as_ref().map(|given| valid_analysis(rules, given)),
    };
    rules.require(
        surge_max > 0 || unavailable_max > 0,
        "spec.rollout.maxSurge",
        surge_max,
        "needs spec.rollout.maxUnavailable of at least 1, or no replica could ever be exchanged",
    );
    rules.require(
        valid.partition == 0 || valid.steps.is_empty(),
        "spec.rollout.partition",
        valid.partition,
        "and spec.rollout.steps both say how many replicas may run the new revision; remove one of them",
    );
    valid
}

fn valid_steps(rules: &mut Rules, given: &[RolloutStep]) -> Vec<Step> {
    let field = "spec.rollout.steps";
    rules.require(
        given.len() <= 16,
        field,
        format_args!("{} entries", given.len()),
        "at most 16 entries",
    );
    let steps: Vec<Step> = given
        .iter()
        .enumerate()
        .map(|(index, step)| Step {
            percent: rules.number(
                &format!("{field}[{index}].percent"),
                Some(step.percent),
                (1, 100),
                1,
            ),
            hold_seconds: rules.number(
                &format!("{field}[{index}].holdSeconds"),
                step.hold_seconds,
                (0, 604_800),
                HOLD_SECONDS_DEFAULT,
            ),
        })
        .collect();
    for (index, pair) in steps.windows(2).enumerate() {
        rules.require(
            pair[0].percent < pair[1].percent,
            &format!("{field}[{}].percent", index + 1),
            pair[1].percent,
            "must be above that of the step before",
        );
    }
    steps
}

fn valid_analysis(rules: &mut Rules, given: &RolloutAnalysis) -> ValidAnalysis {
    let RolloutAnalysis {
        max_ttft_increase_percent,
        max_error_increase_percent,
        min_requests,
    } = given;
    let mut number = |field: &str, value: &Option<i32>, range, default| {
        let field = format!("spec.rollout.analysis.{field}");
        rules.number(&field, *value, range, default)
    };
    ValidAnalysis {
        ttft_increase_percent_max: number(
            "maxTtftIncreasePercent",
            max_ttft_increase_percent,
            (1, 10_000),
            100,
        ),
        error_increase_percent_max: number(
            "maxErrorIncreasePercent",
            max_error_increase_percent,
            (1, 100),
            5,
        ),
        requests_min: number("minRequests", min_requests, (1, 1_000_000), 50),
    }
}
