//! What is reported: status, conditions, and an event for every transition.
//!
//! Conditions are independent axes; the phase and the message are derived from them for people.
//! An event is written when a condition's status or reason differs from what is stored, so that
//! a plan made again from the stored status is silent.

mod measured;
mod trouble;

use std::collections::BTreeSet;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use operator_api::condition::condition;
use operator_api::{
    AutoscalingStatus, ConditionStatus, ConditionType, EventReason, GpuFaultStatus,
    ModelDeploymentStatus, NodeCacheStatus, Phase, PlanSummary, RankBytes, Reason,
};

use crate::fit::{Layout, parallelism_words};
use crate::gpu_faults;
use crate::names::{self, Revision};
use crate::plan::{Event, EventKind};
use crate::replicas::{Moves, Replica, State};
use crate::rollout::Steering;
use crate::snapshot::Snapshot;

pub use measured::{load_progress, performance};
pub use trouble::{Refusal, not_understood, with_refusal};

/// Nodes named in the status.
const NODES_MAX: usize = 8;
/// Bytes of a condition's message.
const MESSAGE_BYTES_MAX: usize = 2048;
/// Bytes of an event's note: Kubernetes takes 1024.
const NOTE_BYTES_MAX: usize = 1000;

/// One judgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Status.
    pub status: ConditionStatus,
    /// Reason.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Verdict {
    /// A judgement.
    pub fn new(status: ConditionStatus, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            status,
            reason,
            message: message.into(),
        }
    }

    /// It holds.
    pub fn yes(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(ConditionStatus::True, reason, message)
    }

    /// It does not.
    pub fn no(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(ConditionStatus::False, reason, message)
    }

    /// Not known yet.
    pub fn unknown(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(ConditionStatus::Unknown, reason, message)
    }

    fn holds(&self) -> bool {
        self.status == ConditionStatus::True
    }
}

/// Everything the status is made from.
#[derive(Debug)]
pub struct Report<'a> {
    /// What was observed.
    pub snapshot: &'a Snapshot,
    /// All engine pods.
    pub replicas: &'a [Replica<'a>],
    /// Whether the spec can be served.
    pub valid: Verdict,
    /// Whether the model is known.
    pub inspected: Verdict,
    /// Whether there is a plan and a place.
    pub planned: Verdict,
    /// Whether demand steers.
    pub scaling: Verdict,
    /// Replicas wanted.
    pub wanted: u32,
    /// Wanted replicas that may be missing.
    pub unavailable_max: u32,
    /// Revision and layout, once there is a plan.
    pub layout: Option<(&'a Revision, &'a Layout)>,
    /// How far the rollout may go, once there is a plan.
    pub steering: Option<&'a Steering>,
    /// What is done about replicas.
    pub moves: &'a Moves,
    /// Digest of the model.
    pub digest: Option<String>,
    /// What autoscaling remembers.
    pub autoscaling: Option<AutoscalingStatus>,
    /// Nodes that hold the weights.
    pub node_cache: Option<NodeCacheStatus>,
}

#[derive(Debug, Default)]
struct Counts {
    live: u32,
    ready: u32,
    updated: u32,
    updated_ready: u32,
    draining: u32,
}

impl Report<'_> {
    /// The status to store and the events to write.
    pub fn finish(&self) -> (ModelDeploymentStatus, Vec<Event>) {
        let counts = self.counts();
        let degraded = self.degraded(&counts);
        let progressing = self.progressing(&counts);
        let available = self.available(&counts);
        let ready = self.ready(&counts);
        let verdicts = [
            (ConditionType::Valid, &self.valid),
            (ConditionType::ModelInspected, &self.inspected),
            (ConditionType::Planned, &self.planned),
            (ConditionType::Progressing, &progressing),
            (ConditionType::Available, &available),
            (ConditionType::Ready, &ready),
            (ConditionType::Degraded, &degraded),
            (ConditionType::ScalingActive, &self.scaling),
        ];
        let deployment = &self.snapshot.deployment;
        let before = deployment.status.clone().unwrap_or_default();
        let now = self.snapshot.now;
        let conditions = verdicts
            .iter()
            .map(|(kind, verdict)| {
                stamped(
                    *kind,
                    verdict,
                    &before.conditions,
                    deployment.metadata.generation,
                    now,
                )
            })
            .collect();
        let mut events: Vec<Event> = verdicts
            .iter()
            // All that were asked for answer: that some do is no news beside it.
            .filter(|(kind, verdict)| {
                let some_do =
                    (*kind, verdict.status) == (ConditionType::Available, ConditionStatus::True);
                !(some_do && ready.status == ConditionStatus::True)
            })
            .filter_map(|(kind, verdict)| transition(*kind, verdict, &before.conditions))
            .collect();
        events.extend(self.deeds());
        let gpu_faults = gpu_faults::remember(self.snapshot);
        events.extend(news_of_gpus(&before.gpu_faults, &gpu_faults));
        let phase = self.phase(&counts, &available, &degraded);
        let name = deployment.metadata.name.as_deref().unwrap_or_default();
        let namespace = deployment.metadata.namespace.as_deref().unwrap_or_default();
        let status = ModelDeploymentStatus {
            observed_generation: deployment.metadata.generation,
            replicas: Some(number(counts.live)),
            ready_replicas: Some(number(counts.ready)),
            updated_replicas: Some(number(counts.updated)),
            wanted_replicas: Some(number(self.wanted)),
            ready: Some(format!("{}/{}", counts.ready, self.wanted)),
            phase: Some(phase),
            message: Some(self.message(&progressing, &ready, &degraded)),
            selector: Some(names::selector(name)),
            revision: self
                .layout
                .map(|(revision, _)| revision.to_string())
                .or(before.revision),
            endpoint: Some(format!("http://{name}.{namespace}.svc")),
            digest: self.digest.clone().or(before.digest),
            plan: self.plan_summary().or(before.plan),
            load: load_progress(self.replicas, &self.snapshot.samples),
            performance: performance(
                self.replicas,
                &self.snapshot.samples,
                now,
                before.performance.as_ref(),
            ),
            autoscaling: self.autoscaling.clone(),
            node_cache: self.node_cache.clone(),
            gpu_faults,
            rollout: self
                .steering
                .map(|steering| steering.memory.clone())
                .or(before.rollout),
            conditions,
        };
        (status, events)
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for replica in self.replicas {
            let is_current = self
                .layout
                .is_some_and(|(revision, _)| replica.revision() == revision.as_str());
            if replica.is_live() {
                counts.live += 1;
                counts.updated += u32::from(is_current);
            }
            if replica.is_ready() {
                counts.ready += 1;
                counts.updated_ready += u32::from(is_current);
            }
            counts.draining += u32::from(matches!(replica.state, State::Draining { .. }));
        }
        counts
    }

    /// Whether wanted replicas have no place.
    fn lacks_place(&self) -> bool {
        self.planned.status == ConditionStatus::False
    }

    fn promised(&self) -> u32 {
        // A model that is wanted at all is available only when something answers.
        self.wanted
            .saturating_sub(self.unavailable_max)
            .max(u32::from(self.wanted > 0))
    }

    fn degraded(&self, counts: &Counts) -> Verdict {
        if let Some(refusal) = &self.snapshot.refusal {
            return refusal.verdict();
        }
        let mut failing = Vec::new();
        if let Some((reason @ (Reason::RolledBack | Reason::RolloutHalted), words)) = self.held() {
            return Verdict::yes(*reason, words.clone());
        }
        for replica in self.replicas {
            match &replica.state {
                State::Lost { node } => {
                    let message = format!(
                        "node {node} does not answer; pod {} is replaced",
                        replica.pod.name
                    );
                    return Verdict::yes(Reason::NodeLost, message);
                }
                // It is told of below.
                State::Failing { .. }
                    if gpu_faults::of_replica(replica, self.snapshot).is_some() => {}
                State::Failing { message } | State::Failed { message, .. } => {
                    failing.push((replica, message));
                }
                _ => {}
            }
        }
        if let Some(first) = self.moves.exhausted.first() {
            let words = format!(
                "{first}. It is not started again (spec.rollout.restartBudget): see its logs, mend the spec, or raise spec.rollout.attempt"
            );
            return Verdict::yes(Reason::RestartBudgetExhausted, words);
        }
        if let (Some(first), true) = (self.moves.sick.first(), failing.is_empty()) {
            return Verdict::yes(Reason::GpuFault, first.clone());
        }
        let Some((first, message)) = failing.first() else {
            return Verdict::no(Reason::AsExpected, "nothing is wrong");
        };
        // A pod with a reason of its own was evicted or refused, which says nothing about its revision.
        let is_new = first.pod.reason.is_empty()
            && self
                .layout
                .is_some_and(|(revision, _)| first.revision() == revision.as_str());
        let old_serve = counts.ready > counts.updated_ready;
        let words = format!(
            "{} of {} pods fail; {}: {message}",
            failing.len(),
            self.replicas.len(),
            first.pod.name
        );
        if is_new && old_serve && counts.updated_ready == 0 {
            let words = format!("the new revision fails and the older one keeps serving; {words}");
            return Verdict::yes(Reason::RolloutHalted, words);
        }
        Verdict::yes(Reason::ReplicasFailing, words)
    }

    /// Why the rollout goes no further.
    fn held(&self) -> Option<&(Reason, String)> {
        self.steering?.held.as_ref()
    }

    fn progressing(&self, counts: &Counts) -> Verdict {
        if let Some((reason, words)) = self.held() {
            return Verdict::no(*reason, words.clone());
        }
        let old = counts.live - counts.updated;
        let halted = self.degraded(counts).reason == Reason::RolloutHalted;
        if self.layout.is_none() {
            return Verdict::no(Reason::WaitingForFacts, "there is no plan yet");
        }
        if old > 0 && halted {
            return Verdict::no(
                Reason::RolloutHalted,
                "the new revision does not become ready; mend or revert the spec",
            );
        }
        if old > 0 {
            let words = format!(
                "{} of {} replicas run the current revision",
                counts.updated, self.wanted
            );
            return Verdict::yes(Reason::RollingOut, words);
        }
        if let Some(first) = self.moves.evacuated.first() {
            let others = match self.moves.evacuated.len() - 1 {
                0 => String::new(),
                others => format!(", and {others} more"),
            };
            return Verdict::yes(Reason::Evacuating, format!("{first}{others}"));
        }
        if counts.updated_ready < self.wanted
            && counts.updated == counts.updated_ready
            && self.lacks_place()
        {
            return Verdict::no(
                self.planned.reason,
                "the missing replicas wait for a place; see the condition Planned",
            );
        }
        if counts.updated_ready < self.wanted {
            let words = format!(
                "{} of {} replicas answer",
                counts.updated_ready, self.wanted
            );
            return Verdict::yes(Reason::ReplicasStarting, words);
        }
        if counts.draining > 0 || counts.live > self.wanted {
            let leaving = counts.draining + counts.live.saturating_sub(self.wanted);
            return Verdict::yes(
                Reason::Draining,
                format!("{leaving} replicas finish their requests"),
            );
        }
        let mut words = String::from("wanted number and revision are reached");
        if let Some(first) = self.moves.stuck.first() {
            words.push_str("; ");
            words.push_str(first);
        }
        Verdict::no(Reason::RolloutComplete, words)
    }

    fn available(&self, counts: &Counts) -> Verdict {
        let promised = self.promised();
        if self.wanted == 0 {
            Verdict::no(Reason::ScaledToZero, "zero replicas are wanted")
        } else if counts.ready >= promised {
            Verdict::yes(
                Reason::MinimumReplicasReady,
                format!(
                    "{} of at least {promised} promised replicas answer",
                    counts.ready
                ),
            )
        } else {
            let words = format!("{} replicas answer, {promised} are promised", counts.ready);
            Verdict::no(Reason::TooFewReplicasReady, words)
        }
    }

    fn ready(&self, counts: &Counts) -> Verdict {
        for blocker in [&self.valid, &self.inspected] {
            if blocker.status == ConditionStatus::False {
                return Verdict::no(blocker.reason, blocker.message.clone());
            }
        }
        if self.layout.is_none() {
            return Verdict::no(self.planned.reason, self.planned.message.clone());
        }
        if self.wanted == 0 {
            return Verdict::no(Reason::ScaledToZero, "zero replicas are wanted");
        }
        if let Some((reason, words)) = self.held() {
            return Verdict::no(*reason, words.clone());
        }
        if counts.updated_ready >= self.wanted && counts.live == counts.updated {
            let words = format!("{0} of {0} replicas answer", self.wanted);
            return Verdict::yes(Reason::AllReplicasReady, words);
        }
        let words = format!(
            "{} of {} replicas answer with the current revision",
            counts.updated_ready, self.wanted
        );
        if self.lacks_place() {
            Verdict::no(
                self.planned.reason,
                format!("{words}; the others wait for a place"),
            )
        } else if counts.live > counts.updated {
            Verdict::no(Reason::RollingOut, words)
        } else {
            Verdict::no(Reason::ReplicasStarting, words)
        }
    }

    fn phase(&self, counts: &Counts, available: &Verdict, degraded: &Verdict) -> Phase {
        let is_blocked = [&self.valid, &self.inspected]
            .iter()
            .any(|verdict| verdict.status == ConditionStatus::False);
        let starting = self
            .replicas
            .iter()
            .any(|replica| replica.state == State::Starting);
        match () {
            () if is_blocked && counts.ready > 0 => Phase::Degraded,
            () if is_blocked => Phase::Failed,
            () if self.wanted == 0 => Phase::ScaledToZero,
            () if available.holds() && degraded.holds() => Phase::Degraded,
            () if available.holds() => Phase::Running,
            () if self.inspected.status == ConditionStatus::Unknown => Phase::Inspecting,
            () if counts.ready > 0 && (degraded.holds() || self.lacks_place()) => Phase::Degraded,
            () if starting => Phase::Loading,
            () if degraded.holds() => Phase::Failed,
            () if matches!(
                self.planned.reason,
                Reason::MemoryDoesNotFit | Reason::NotServedYet
            ) =>
            {
                Phase::Failed
            }
            () if self.planned.status == ConditionStatus::False => Phase::Pending,
            () if counts.live > 0 => Phase::Pending,
            () => Phase::Planning,
        }
    }

    fn message(&self, progressing: &Verdict, ready: &Verdict, degraded: &Verdict) -> String {
        let bad = [&self.valid, &self.inspected, &self.planned]
            .into_iter()
            .find(|verdict| verdict.status == ConditionStatus::False);
        let chosen = match bad {
            Some(verdict) => verdict,
            None if degraded.holds() => degraded,
            None if self.inspected.status == ConditionStatus::Unknown => &self.inspected,
            None if progressing.holds() => progressing,
            None => ready,
        };
        cut(&chosen.message, MESSAGE_BYTES_MAX)
    }

    fn plan_summary(&self) -> Option<PlanSummary> {
        let (_, layout) = self.layout?;
        let bytes = layout.memory.per_rank;
        let wide = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        Some(PlanSummary {
            gpus: i64::from(layout.gpus()) * i64::from(self.wanted),
            gpus_per_replica: number(layout.gpus()),
            product: layout.kind.product().map(str::to_owned),
            parallelism: parallelism_words(layout),
            rank_bytes: RankBytes {
                weights: wide(bytes.weights_bytes),
                kv_cache: wide(bytes.kv_bytes),
                workspace: wide(bytes.workspace_bytes),
                runtime: wide(bytes.runtime_bytes),
                total: wide(layout.memory.total_bytes()),
            },
            kv_tokens: wide(layout.memory.kv_tokens),
            max_tokens: i64::from(layout.memory.max_model_len),
            max_concurrent_sequences: number(layout.engine.max_num_seqs),
            nodes: self.nodes(),
        })
    }

    /// Nodes that replicas are on or planned for. Nothing about other nodes: a status that changed
    /// with every pod of the cluster would be written without end.
    fn nodes(&self) -> Vec<String> {
        let live = self.replicas.iter().filter(|replica| replica.is_live());
        let pods = live.flat_map(Replica::pods);
        let present = pods.filter_map(|pod| pod.place().map(str::to_owned));
        let nodes: BTreeSet<String> = present.chain(self.moves.nodes.iter().cloned()).collect();
        nodes.into_iter().take(NODES_MAX).collect()
    }

    /// Events on what is done, one for each kind of deed.
    fn deeds(&self) -> Vec<Event> {
        let Moves {
            created,
            drained,
            removed,
            ..
        } = self.moves;
        let mut events = Vec::new();
        if !created.is_empty() {
            events.push(event(
                EventKind::Normal,
                EventReason::ReplicasCreated.as_str(),
                &listed("created", created),
            ));
        }
        if !drained.is_empty() {
            let words = listed(
                "taken out of the Service to finish their requests:",
                drained,
            );
            events.push(event(
                EventKind::Normal,
                EventReason::ReplicasDraining.as_str(),
                &words,
            ));
        }
        if !removed.is_empty() {
            let with_why: Vec<String> = removed
                .iter()
                .map(|(name, why)| format!("{name} ({why})"))
                .collect();
            events.push(event(
                EventKind::Normal,
                EventReason::ReplicasRemoved.as_str(),
                &listed("removed", &with_why),
            ));
        }
        events
    }
}

fn stamped(
    kind: ConditionType,
    verdict: &Verdict,
    before: &[Condition],
    generation: Option<i64>,
    now: Timestamp,
) -> Condition {
    let since = before
        .iter()
        .find(|old| old.type_ == kind.as_str() && old.status == verdict.status.as_str())
        .map_or(Time(now), |old| old.last_transition_time.clone());
    let message = cut(&verdict.message, MESSAGE_BYTES_MAX);
    condition(
        kind,
        verdict.status,
        verdict.reason,
        message,
        generation,
        since,
    )
}

/// The event of a condition whose status or reason changed; most first verdicts are no news.
fn transition(kind: ConditionType, verdict: &Verdict, before: &[Condition]) -> Option<Event> {
    let old = before.iter().find(|old| old.type_ == kind.as_str());
    if old.is_some_and(|old| {
        old.status == verdict.status.as_str() && old.reason == verdict.reason.as_str()
    }) {
        return None;
    }
    let was_true = old.is_some_and(|old| old.status == "True");
    let news = match (kind, verdict.status) {
        (ConditionType::Valid, ConditionStatus::False) => EventKind::Warning,
        (ConditionType::Valid, _) => return None,
        (ConditionType::ModelInspected | ConditionType::Planned, ConditionStatus::False) => {
            EventKind::Warning
        }
        // Nothing was inspected: the facts were given.
        (ConditionType::ModelInspected, ConditionStatus::True) if old.is_none() => return None,
        (ConditionType::Planned, ConditionStatus::Unknown) => return None,
        (ConditionType::Available, ConditionStatus::False) if !was_true => return None,
        (ConditionType::Available, ConditionStatus::False)
            if verdict.reason == Reason::ScaledToZero =>
        {
            EventKind::Normal
        }
        (ConditionType::Available, ConditionStatus::False) => EventKind::Warning,
        (ConditionType::Degraded, ConditionStatus::True) => EventKind::Warning,
        (ConditionType::Degraded, _) if !was_true => return None,
        (ConditionType::Ready, ConditionStatus::True) => EventKind::Normal,
        (ConditionType::Ready, _) => return None,
        (ConditionType::Progressing, _)
            if matches!(verdict.reason, Reason::RolloutHalted | Reason::RolledBack) =>
        {
            EventKind::Warning
        }
        // The replicas of a first revision are told of as they are created.
        (ConditionType::Progressing, ConditionStatus::True) if old.is_none() => return None,
        (ConditionType::Progressing, ConditionStatus::True) => EventKind::Normal,
        (ConditionType::Progressing, _) => return None,
        (ConditionType::ScalingActive, _) => match verdict.reason {
            Reason::ScalingUp | Reason::ScalingDown => EventKind::Normal,
            Reason::LimitedByMax => EventKind::Warning,
            _ => return None,
        },
        _ => EventKind::Normal,
    };
    Some(event(news, verdict.reason.as_str(), &verdict.message))
}

/// Events on GPUs that are avoided from now on, or not any more.
fn news_of_gpus(before: &[GpuFaultStatus], after: &[GpuFaultStatus]) -> Vec<Event> {
    let (new, forgotten) = gpu_faults::changes(before, after);
    let new = new.into_iter().map(|fault| {
        let words = format!("node {}, {}", fault.node, gpu_faults::words(fault));
        event(
            EventKind::Warning,
            EventReason::GpuFaultRemembered.as_str(),
            &words,
        )
    });
    let forgotten = forgotten.into_iter().map(|fault| {
        let words = format!("{} of node {} is used again", fault.uuid, fault.node);
        event(
            EventKind::Normal,
            EventReason::GpuFaultForgotten.as_str(),
            &words,
        )
    });
    new.chain(forgotten).collect()
}

pub(crate) fn event(kind: EventKind, reason: &'static str, note: &str) -> Event {
    Event {
        kind,
        reason,
        note: cut(note, NOTE_BYTES_MAX),
    }
}

/// "created a, b and 3 more".
pub(crate) fn listed(verb: &str, names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => format!("{verb} {shown}"),
        more => format!("{verb} {shown} and {more} more"),
    }
}

/// At most `bytes_max` bytes, cut between characters.
fn cut(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let mut end = bytes_max - '…'.len_utf8();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}

fn number(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}
