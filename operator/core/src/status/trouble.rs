//! What a stored status tells without a plan: a call of the operator that was refused, a spec that is not understood.
//!
//! Only one condition is set, since nothing else was found out. A refusal is also given to the plans that follow, until
//! a pass succeeds: a plan that did not know of it would take the condition back each time.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use operator_api::{ConditionType, ModelDeploymentStatus, Reason};

use super::{Verdict, stamped};

/// A call of the operator that the API server refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Reason of the condition Degraded.
    pub reason: Reason,
    /// The call, the answer and the way out.
    pub message: String,
}

impl Refusal {
    /// The condition Degraded.
    pub(super) fn verdict(&self) -> Verdict {
        Verdict::yes(self.reason, self.message.clone())
    }
}

/// The stored status with a refusal; the same when it tells of it already.
pub fn with_refusal(
    stored: &ModelDeploymentStatus,
    refusal: &Refusal,
    generation: Option<i64>,
    now: Timestamp,
) -> ModelDeploymentStatus {
    let told = Told { generation, now };
    ModelDeploymentStatus {
        conditions: told.with(
            &stored.conditions,
            ConditionType::Degraded,
            &refusal.verdict(),
        ),
        ..stored.clone()
    }
}

/// The stored conditions of an object that cannot be read; the same when they tell so already. `message` says why.
pub fn not_understood(
    stored: &[Condition],
    message: &str,
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let verdict = Verdict::no(Reason::SpecNotUnderstood, message);
    Told { generation, now }.with(stored, ConditionType::Valid, &verdict)
}

/// Of which generation, and when.
struct Told {
    generation: Option<i64>,
    now: Timestamp,
}

impl Told {
    fn with(&self, stored: &[Condition], kind: ConditionType, verdict: &Verdict) -> Vec<Condition> {
        let condition = stamped(kind, verdict, stored, self.generation, self.now);
        let mut all = stored.to_vec();
        match all.iter_mut().find(|old| old.type_ == kind.as_str()) {
            Some(old) => *old = condition,
            None => all.push(condition),
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal() -> Refusal {
        Refusal {
            reason: Reason::CallRefused,
            message: "no".into(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    #[test]
    fn a_refusal_that_is_told_again_changes_nothing() {
        let none = ModelDeploymentStatus::default();
        let once = with_refusal(&none, &refusal(), Some(1), at(10));
        assert_eq!(once.conditions.len(), 1);
        assert_eq!(with_refusal(&once, &refusal(), Some(1), at(20)), once);
        let mut other = refusal();
        other.message = "still no".into();
        let twice = with_refusal(&once, &other, Some(1), at(20));
        assert_ne!(twice, once);
        let since = |status: &ModelDeploymentStatus| status.conditions[0].last_transition_time.0;
        assert_eq!((since(&once), since(&twice)), (at(10), at(10)));
    }

    #[test]
    fn a_spec_that_is_not_understood_is_told_once_beside_what_was_known() {
        let known = with_refusal(&Default::default(), &refusal(), None, at(10)).conditions;
        let told = not_understood(&known, "spec.replicas: a word", Some(2), at(20));
        assert_eq!(told.len(), 2);
        assert_eq!(told[0], known[0]);
        assert_eq!(told[1].reason, "SpecNotUnderstood");
        assert_eq!(
            not_understood(&told, "spec.replicas: a word", Some(2), at(30)),
            told
        );
        assert_ne!(
            not_understood(&told, "spec.model: a word", Some(2), at(30)),
            told
        );
    }
}
