//! How far a rollout may go: partition, steps, pause, and what happens when the new revision fails.
//!
//! A revision that every wanted replica answered with is *stable*. While the spec asks for another
//! one, the *target*, [`steer`] says how many replicas may run it; `replicas` exchanges them. What has
//! to outlive a pass is in `status.rollout`; a pass that was lost is repeated from what is seen.
//! A target that failed stays failed until the spec makes another revision or
//! `spec.rollout.attempt` changes, so that it is not tried for ever.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use operator_api::{OnFailure, Reason, RolloutFailure, RolloutStatus};

use crate::names::Revision;
use crate::replicas::{Replica, State, failures_of};
use crate::snapshot::PodSamples;
use crate::time::seconds_between;
use crate::validate::{ValidAnalysis, ValidRollout};

/// Failures in a row of one replica by which a revision counts as failed, unless the restart budget
/// is smaller.
const CRASHES_MAX: u32 = 3;

/// Everything [`steer`] decides from.
#[derive(Clone, Copy, Debug)]
pub struct Given<'a> {
    /// The rules of the spec.
    pub rollout: &'a ValidRollout,
    /// The revision of the spec.
    pub target: &'a Revision,
    /// Replicas wanted.
    pub wanted: u32,
    /// All engine pods.
    pub replicas: &'a [Replica<'a>],
    /// What they said.
    pub samples: &'a BTreeMap<String, PodSamples>,
    /// What is remembered.
    pub before: Option<&'a RolloutStatus>,
    /// Whether replicas of the stable revision can be made; if not, limits that would need them do not
    /// count.
    pub can_return: bool,
    /// The time.
    pub now: Timestamp,
}

/// How far a rollout may go.
#[derive(Clone, Debug, PartialEq)]
pub struct Steering {
    /// Replicas that may run the target; the others run the stable revision.
    pub target_max: u32,
    /// Whether replicas are being exchanged, so that surge may be used.
    pub is_rolling: bool,
    /// Why the rollout goes no further, with words for people.
    pub held: Option<(Reason, String)>,
    /// What to remember.
    pub memory: RolloutStatus,
    /// Seconds after which more may be allowed.
    pub wake_seconds: Option<u64>,
}

/// The stable revision that a rollout starts from; none while there is no rollout.
pub fn origin(before: Option<&RolloutStatus>, target: &Revision) -> Option<String> {
    let stable = before?.stable_revision.as_ref()?;
    (stable != target.as_str()).then(|| stable.clone())
}

/// Decides how far the rollout may go.
pub fn steer(given: Given<'_>) -> Steering {
    let Some(stable) = origin(given.before, given.target) else {
        return settled(given);
    };
    let mut memory = remembered(given);
    let returns = given.rollout.on_failure == OnFailure::Rollback && given.can_return;
    if memory.failure.is_some() && !returns && is_complete(given) {
        // It was halted, not taken back, and answers everywhere after all.
        return settled(given);
    }
    if memory.failure.is_none() {
        memory.failure = failure(given, &stable);
    }
    let current = count(given, |_| true);
    if let Some(failure) = &memory.failure {
        let target = given.target;
        let way_out = format!(
            "revision {target} failed: {}. Mend the spec, or raise spec.rollout.attempt to try it again",
            failure.message
        );
        let (target_max, reason) = match () {
            () if returns => (0, Reason::RolledBack),
            () if given.can_return => (current.min(given.wanted), Reason::RolloutHalted),
            // Nothing else can be made: replicas are exchanged as far as the new ones answer.
            () => (given.wanted, Reason::RolloutHalted),
        };
        return Steering {
            target_max,
            is_rolling: true,
            held: Some((reason, way_out)),
            memory,
            wake_seconds: None,
        };
    }
    limited(given, memory, current)
}

/// Nothing to exchange; what runs everywhere and answers becomes the stable revision.
fn settled(given: Given<'_>) -> Steering {
    let stable = given
        .before
        .and_then(|before| before.stable_revision.clone());
    Steering {
        target_max: given.wanted,
        is_rolling: false,
        held: None,
        memory: RolloutStatus {
            stable_revision: if is_complete(given) {
                Some(given.target.to_string())
            } else {
                stable
            },
            target_revision: Some(given.target.to_string()),
            ..RolloutStatus::default()
        },
        wake_seconds: None,
    }
}

/// Whether every wanted replica runs the target and answers, and no other one lives.
fn is_complete(given: Given<'_>) -> bool {
    let ready = count(given, |replica| replica.is_ready());
    let live = given.replicas.iter().filter(|replica| replica.is_live());
    given.wanted > 0
        && ready >= given.wanted
        && live.count() == usize::try_from(ready).unwrap_or(usize::MAX)
}

/// What is remembered about this target; another one starts anew.
fn remembered(given: Given<'_>) -> RolloutStatus {
    let before = given.before.cloned().unwrap_or_default();
    let is_same = before.target_revision.as_deref() == Some(given.target.as_str());
    let fresh = RolloutStatus {
        stable_revision: before.stable_revision.clone(),
        target_revision: Some(given.target.to_string()),
        ..RolloutStatus::default()
    };
    if !is_same {
        return fresh;
    }
    let is_tried_again = before
        .failure
        .as_ref()
        .is_some_and(|failure| i64::from(failure.attempt) != i64::from(given.rollout.attempt));
    if is_tried_again { fresh } else { before }
}

/// The limit that pause, partition and steps set; all wanted replicas when none does.
fn limited(given: Given<'_>, mut memory: RolloutStatus, current: u32) -> Steering {
    let ready = count(given, |replica| replica.is_ready());
    let (step_max, step_words, wake_seconds) = step(given, &mut memory, ready);
    let parted = given.wanted.saturating_sub(given.rollout.partition);
    let mut target_max = given.wanted.min(parted).min(step_max);
    let mut held = None;
    if !given.can_return {
        target_max = given.wanted;
    } else if given.rollout.is_paused {
        target_max = current.min(given.wanted);
        let words = format!("spec.rollout.paused holds the rollout at {target_max} replicas");
        held = Some((Reason::RolloutPaused, words));
    } else if target_max < given.wanted && ready >= target_max {
        held = Some(match step_words {
            Some(words) => (Reason::StepHolding, words),
            None => (
                Reason::PartitionReached,
                format!(
                    "{target_max} replicas run the new revision; spec.rollout.partition = {} keeps the others on the one before",
                    given.rollout.partition
                ),
            ),
        });
    }
    if target_max >= given.wanted && is_complete(given) {
        memory.stable_revision = Some(given.target.to_string());
    }
    Steering {
        target_max,
        is_rolling: true,
        held,
        memory,
        wake_seconds,
    }
}

/// The limit of the step under way, its words, and the seconds until the next; moves to the next
/// step when all replicas of this one answered for long enough.
fn step(
    given: Given<'_>,
    memory: &mut RolloutStatus,
    ready: u32,
) -> (u32, Option<String>, Option<u64>) {
    let steps = &given.rollout.steps;
    let mut index = usize::try_from(memory.step.unwrap_or(0)).unwrap_or(0);
    while let Some(step) = steps.get(index) {
        let share = u64::from(given.wanted) * u64::from(step.percent);
        let limit = u32::try_from(share.div_ceil(100)).unwrap_or(u32::MAX);
        memory.step = Some(i32::try_from(index).unwrap_or(i32::MAX));
        if ready < limit {
            memory.step_since = None;
            return (limit, None, None);
        }
        let since = memory.step_since.get_or_insert(Time(given.now)).0;
        let held = seconds_between(since, given.now);
        let hold = u64::from(step.hold_seconds);
        if held < hold {
            let words = format!(
                "step {} of {}: {limit} of {} replicas run the new revision; the next step follows when they have answered for {hold} s",
                index + 1,
                steps.len(),
                given.wanted
            );
            return (limit, Some(words), Some(hold - held));
        }
        memory.step_since = None;
        index += 1;
    }
    if !steps.is_empty() {
        memory.step = Some(i32::try_from(index).unwrap_or(i32::MAX));
    }
    (given.wanted, None, None)
}

/// Why the target has failed; none while it may still do well.
fn failure(given: Given<'_>, stable: &str) -> Option<RolloutFailure> {
    let crashes_max = CRASHES_MAX.min(given.rollout.restart_budget);
    let deadline = u64::from(given.rollout.deadline_seconds);
    let mut late = None;
    let mut crashed = None;
    for replica in of_revision(given.replicas, given.target.as_str()) {
        let pod = replica.pod;
        match &replica.state {
            // What Kubernetes ended, by eviction or refusal, has a reason; that is not the revision's fault.
            State::Failed { at, message } if pod.reason.is_empty() => {
                let failures = failures_of(pod, *at);
                if failures >= crashes_max {
                    let name = &pod.name;
                    crashed = Some(format!(
                        "{failures} failures in a row, at last of pod {name}: {message}"
                    ));
                }
            }
            State::Failing { message } if pod.container.restarts >= crashes_max => {
                crashed = Some(format!("pod {}: {message}", pod.name));
            }
            State::Starting | State::Failing { .. } if pod.node.is_some() => {
                let since = pod.created.max(pod.ready_changed);
                let since = since.unwrap_or(given.now);
                if seconds_between(since, given.now) >= deadline {
                    late = Some(format!(
                        "pod {} does not answer after {deadline} s (spec.rollout.progressDeadlineSeconds)",
                        pod.name
                    ));
                }
            }
            _ => {}
        }
    }
    let regressed = || {
        let analysis = given.rollout.analysis?;
        regression(given, stable, analysis)
    };
    let message = crashed.or(late).or_else(regressed)?;
    Some(RolloutFailure {
        at: Time(given.now),
        attempt: i32::try_from(given.rollout.attempt).unwrap_or(i32::MAX),
        message,
    })
}

/// What replicas of one revision answered in the window that samples span.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tally {
    requests: u64,
    errors: u64,
    first_tokens: u64,
    first_token_seconds: f64,
}

impl Tally {
    fn of(given: Given<'_>, revision: &str) -> Self {
        let mut tally = Self::default();
        for replica in of_revision(given.replicas, revision).filter(|replica| replica.is_ready()) {
            let window = given
                .samples
                .get(&replica.pod.name)
                .and_then(PodSamples::window);
            if let Some((old, new)) = window {
                tally.requests += new.requests.saturating_sub(old.requests);
                tally.errors += new.request_errors.saturating_sub(old.request_errors);
                tally.first_tokens += new.first_tokens.saturating_sub(old.first_tokens);
                tally.first_token_seconds +=
                    (new.first_token_seconds - old.first_token_seconds).max(0.0);
            }
        }
        tally
    }

    fn errors_percent(self) -> f64 {
        self.errors as f64 * 100.0 / self.requests.max(1) as f64
    }

    fn ttft_seconds(self) -> f64 {
        self.first_token_seconds / self.first_tokens.max(1) as f64
    }
}

/// In what the target does worse than the stable revision by more than is allowed.
fn regression(given: Given<'_>, stable: &str, analysis: ValidAnalysis) -> Option<String> {
    let (old, new) = (
        Tally::of(given, stable),
        Tally::of(given, given.target.as_str()),
    );
    let least = u64::from(analysis.requests_min);
    if old.requests >= least && new.requests >= least {
        let (was, is) = (old.errors_percent(), new.errors_percent());
        if is > was + f64::from(analysis.error_increase_percent_max) {
            return Some(format!(
                "{is:.1} % of {} requests ended with an error of the server, {was:.1} % with the revision before",
                new.requests
            ));
        }
    }
    if old.first_tokens >= least && new.first_tokens >= least {
        let (was, is) = (old.ttft_seconds(), new.ttft_seconds());
        if is > was * (1.0 + f64::from(analysis.ttft_increase_percent_max) / 100.0) {
            return Some(format!(
                "the mean time to first token is {is:.3} s over {} answers, {was:.3} s with the revision before",
                new.first_tokens
            ));
        }
    }
    None
}

fn of_revision<'a>(
    replicas: &'a [Replica<'a>],
    revision: &'a str,
) -> impl Iterator<Item = &'a Replica<'a>> {
    replicas
        .iter()
        .filter(move |replica| replica.revision() == revision)
}

/// Live replicas of the target.
fn count(given: Given<'_>, test: impl Fn(&Replica<'_>) -> bool) -> u32 {
    let replicas = of_revision(given.replicas, given.target.as_str());
    let counted = replicas.filter(|replica| replica.is_live() && test(replica));
    u32::try_from(counted.count()).unwrap_or(u32::MAX)
}
