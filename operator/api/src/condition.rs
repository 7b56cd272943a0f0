//! Conditions and their reasons as closed sets.
//!
//! On the wire a condition is Kubernetes' own `metav1.Condition`, so that `kubectl wait` works and
//! an older operator can read an object that a newer one wrote; what *we* may write is limited to
//! these enums.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

macro_rules! closed {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$doc])* $variant),+ }

        impl $name {
            /// Every value, in order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The PascalCase word on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant)),+ }
            }

            /// Reads the PascalCase word; `None` for a word of another version.
            pub fn parse(word: &str) -> Option<Self> {
                const WORDS: &[&str] = &[$(stringify!($variant)),+];
                let index = WORDS.iter().position(|known| *known == word)?;
                Self::ALL.get(index).copied()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

closed! {
    /// The independent axes a ModelDeployment is judged on.
    ConditionType {
        /// The spec contradicts neither itself nor what this version serves.
        Valid,
        /// The model's facts (config, size, digest) are known.
        ModelInspected,
        /// A memory plan and a place were found for every replica that is wanted.
        Planned,
        /// The operator is moving replicas towards the wanted number and revision.
        Progressing,
        /// Enough replicas answer to serve requests (wanted minus `rollout.maxUnavailable`).
        Available,
        /// Every wanted replica answers, and runs the current revision.
        Ready,
        /// Something is wrong that a person may want to look at.
        Degraded,
        /// The autoscaler can measure and move the number of replicas.
        ScalingActive,
    }
}

closed! {
    /// Status of a condition.
    ConditionStatus {
        /// It holds.
        True,
        /// It does not.
        False,
        /// Not known yet.
        Unknown,
    }
}

closed! {
    /// Why a condition has its status.
    Reason {
        // Valid
        /// The spec can be served.
        SpecValid,
        /// The spec breaks a rule; the message names field, value and way out.
        SpecInvalid,
        /// The object cannot be read: a field has a form that this version does not know; the message names it.
        SpecNotUnderstood,

        // ModelInspected
        /// The model's facts are known.
        FactsKnown,
        /// An inspection pod is reading the model's config and headers.
        Inspecting,
        /// The source names nothing that exists.
        ModelNotFound,
        /// `config.json` is missing, malformed or contradicts itself.
        ModelConfigInvalid,
        /// A family this engine does not serve.
        UnsupportedArchitecture,
        /// A tensor or a shard that the config calls for is absent.
        WeightsMissing,
        /// A shard is shorter than its header says.
        WeightsTruncated,
        /// A tensor has another shape or dtype than the config calls for.
        WeightsMismatch,
        /// The hub or object store did not answer.
        SourceUnreachable,
        /// The hub or object store refused the credentials.
        AccessDenied,
        /// The local disk cannot hold the model.
        DiskFull,
        /// `spec.model.digest` is not the digest of what the source holds.
        DigestMismatch,
        /// `spec.model.configMapRef` names a config map that is absent or lacks `config.json`.
        ConfigMapNotFound,
        /// The inspection pod ended without a report.
        InspectionFailed,

        // Planned
        /// Every wanted replica has a plan and a place.
        FitFound,
        /// Planning waits for the model's facts.
        WaitingForFacts,
        /// The memory plan fits no device of this kind, however many are combined.
        MemoryDoesNotFit,
        /// No node can take another replica now; the message says why for each group of nodes.
        NoNodeFits,
        /// Replicas wait until others of lower priority have left their place.
        Preempting,
        /// Replicas gave way to others of higher priority and have no place since.
        Preempted,
        /// A ResourceQuota of the namespace allows no further GPUs.
        GpuQuotaExceeded,
        /// The plan needs something this version does not serve yet.
        NotServedYet,
        /// An object that the deployment needs exists already and belongs to someone else.
        NameTaken,
        /// The operator made a plan that breaks its own rules; nothing was done.
        PlanRejected,

        // Progressing, Available, Ready
        /// Wanted number and revision are reached.
        RolloutComplete,
        /// Replicas are starting or loading weights.
        ReplicasStarting,
        /// Replicas of an older revision are being replaced.
        RollingOut,
        /// Replicas move off nodes that are cordoned or about to be removed.
        Evacuating,
        /// Replicas finish their requests before they leave.
        Draining,
        /// The new revision fails; the older one keeps serving.
        RolloutHalted,
        /// The new revision failed; the replicas run the one before.
        RolledBack,
        /// `rollout.paused` stops the rollout where it is.
        RolloutPaused,
        /// `rollout.partition` keeps replicas on the revision before.
        PartitionReached,
        /// A step of the rollout is being watched.
        StepHolding,
        /// Enough replicas answer.
        MinimumReplicasReady,
        /// Fewer replicas answer than promised.
        TooFewReplicasReady,
        /// Every wanted replica answers.
        AllReplicasReady,
        /// Zero replicas are wanted.
        ScaledToZero,

        // Degraded
        /// Nothing is wrong.
        AsExpected,
        /// The API server refuses a call of the operator: a right is missing, or a rule of the cluster is in the way.
        CallRefused,
        /// The API server does not accept an object that the operator wants to write.
        ObjectRefused,
        /// Replicas fail and are retried with growing pauses.
        ReplicasFailing,
        /// Replicas failed as often as `rollout.restartBudget` allows and are not started again.
        RestartBudgetExhausted,
        /// A node with replicas does not answer.
        NodeLost,
        /// The GPUs of a node with replicas are reported at fault.
        GpuFault,

        // ScalingActive
        /// `spec.replicas` fixes the number.
        FixedReplicas,
        /// Demand is near the targets.
        TargetsMet,
        /// Demand is above the targets.
        ScalingUp,
        /// Demand has been below the targets for the whole stabilisation window.
        ScalingDown,
        /// Demand asks for another number, but not for long enough yet.
        Stabilizing,
        /// Demand asks for more than `autoscaling.maxReplicas`.
        LimitedByMax,
        /// Demand asks for fewer than `autoscaling.minReplicas`.
        LimitedByMin,
        /// No replica could be measured.
        NoSamples,
    }
}

closed! {
    /// What an event tells that is no condition's reason.
    EventReason {
        /// Pods of replicas were created.
        ReplicasCreated,
        /// Replicas finish their requests before they leave.
        ReplicasDraining,
        /// Pods of replicas were removed.
        ReplicasRemoved,
        /// Children that nothing controlled any more were taken over.
        ChildrenAdopted,
        /// An engine reported its GPU at fault; the node is avoided.
        GpuFaultRemembered,
        /// The GPU was repaired or replaced, or a day is over; the node is used again.
        GpuFaultForgotten,
        /// Somebody else wrote the object first.
        WriteConflict,
        /// An object, or its namespace, is gone.
        ObjectGone,
        /// The API server failed, did not answer in time, or asked to slow down.
        ApiServerTrouble,
        /// An answer of the API server makes no sense.
        AnswerNotUnderstood,
        /// Another operator leads.
        LeaseLost,
    }
}

/// A condition as it is written; `last_transition_time` moves only when the status changes.
pub fn condition(
    kind: ConditionType,
    status: ConditionStatus,
    reason: Reason,
    message: String,
    observed_generation: Option<i64>,
    last_transition_time: Time,
) -> Condition {
    Condition {
        type_: kind.as_str().to_owned(),
        status: status.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        message,
        observed_generation,
        last_transition_time,
    }
}
