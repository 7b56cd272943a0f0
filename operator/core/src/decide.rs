//! From snapshot to plan: validate → inspect → lay out → place and roll out → report → check.

mod configs;

use std::collections::BTreeSet;
use std::time::Duration;

use engine_spec::ModelFacts;
use operator_api::{ConditionStatus, ConditionType, NodeCacheStatus, Reason};

use crate::check::check;
use crate::children::Children;
use crate::fit::{self, Layout, NoLayout};
use crate::gang::{self, Asked};
use crate::gpu_faults;
use crate::inspect::{self, Facts};
use crate::names::Revision;
use crate::node_cache;
use crate::objects;
use crate::ownership;
use crate::placement::{self, Room, Wish};
use crate::plan::{Action, Plan, Settings};
use crate::replicas::{self, Given, Moves, Replica, Side, State};
use crate::resources::human_bytes;
use crate::rollout::{self, Steering};
use crate::scaling;
use crate::snapshot::Snapshot;
use crate::status::{Report, Verdict};
use crate::validate::{Scale, ValidDeployment, validate};

/// Seconds between looks while replicas fail or are drained.
const LOOK_SECONDS_BUSY: u64 = 2;
/// Seconds between looks while demand steers.
const LOOK_SECONDS_STEERED: u64 = 5;
/// Seconds between looks at replicas that start, or whose engines tell of their load: what they say wakes, and only that they
/// fall silent has to be looked for.
const LOOK_SECONDS_TOLD: u64 = 15;
/// Seconds between looks while a replica has no place; changes of nodes wake earlier.
const LOOK_SECONDS_UNPLACED: u64 = 30;

/// Decides what to do about one ModelDeployment.
///
/// The plan has passed [`check`]; one that has not is reported and does nothing.
pub fn plan(snapshot: &Snapshot, settings: &Settings) -> Plan {
    let deployment = &snapshot.deployment;
    if deployment.metadata.deletion_timestamp.is_some() {
        // Kubernetes removes the children by their owner; anything created now would be in its way.
        return Plan {
            status: deployment.status.clone().unwrap_or_default(),
            ..Plan::default()
        };
    }
    let snapshot = &*gpu_faults::marked(snapshot);
    let mut plan = decide(snapshot, settings);
    ownership::adopt(&mut plan, snapshot);
    let mut plan = checked(plan, snapshot, settings);
    let stored = deployment.status.as_ref();
    if stored.map_or(&[][..], |status| &status.gpu_faults) != plan.status.gpu_faults {
        // What is remembered is acted on once it is stored.
        let soon = Duration::from_secs(1);
        plan.wake_after = Some(plan.wake_after.map_or(soon, |after| after.min(soon)));
    }
    plan
}

/// The plan, or one that does nothing in place of one that breaks a rule.
fn checked(plan: Plan, snapshot: &Snapshot, settings: &Settings) -> Plan {
    match check(&plan, snapshot, settings).first() {
        Some(flaw) => rejected(snapshot, &flaw.to_string()),
        None => plan,
    }
}

fn decide(snapshot: &Snapshot, settings: &Settings) -> Plan {
    let replicas = replicas::observe(snapshot);
    let valid = match validate(&snapshot.deployment) {
        Ok(valid) => valid,
        Err(violations) => {
            let message = format!("{violations}. Replicas that run are left as they are");
            return blocked(
                snapshot,
                &replicas,
                Verdict::no(Reason::SpecInvalid, message),
                // Another one's place is not held up by a spec that makes no sense.
                replicas::moves_of_preempted(drain_seconds(snapshot), snapshot, &replicas),
            );
        }
    };
    let decided = Decided::new(snapshot, &replicas, &valid);
    decided.plan(settings)
}

/// The revision and layout that a plan made from `snapshot` uses; none while the spec is not valid
/// or the model's facts are not known.
pub(crate) fn chosen(
    snapshot: &Snapshot,
    settings: &Settings,
) -> Option<Result<(ValidDeployment, Revision, Layout), NoLayout>> {
    let replicas = replicas::observe(snapshot);
    let valid = validate(&snapshot.deployment).ok()?;
    let Facts::Known(facts) = inspect::inspect(&valid, snapshot, settings).facts else {
        return None;
    };
    let choice = Decided::new(snapshot, &replicas, &valid).choose(&facts, settings);
    Some(choice.map(|(revision, layout)| (valid, revision, layout)))
}

/// The drain timeout of a spec that is not valid.
fn drain_seconds(snapshot: &Snapshot) -> u32 {
    let given = snapshot.deployment.spec.rollout.drain_timeout_seconds;
    given
        .and_then(|seconds| u32::try_from(seconds).ok())
        .unwrap_or(0)
}

/// The plan when nothing may be decided: status, events, and what others are owed.
fn blocked(snapshot: &Snapshot, replicas: &[Replica<'_>], verdict: Verdict, moves: Moves) -> Plan {
    let stored = snapshot.deployment.status.as_ref();
    let wanted = stored
        .and_then(|status| status.wanted_replicas)
        .or(snapshot.deployment.spec.replicas);
    let report = Report {
        snapshot,
        replicas,
        valid: verdict.clone(),
        inspected: Verdict::unknown(verdict.reason, "the spec is not valid"),
        planned: Verdict::no(verdict.reason, verdict.message),
        scaling: Verdict::no(Reason::SpecInvalid, "the spec is not valid"),
        wanted: wanted
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or(0),
        unavailable_max: 0,
        layout: None,
        steering: None,
        moves: &moves,
        digest: None,
        autoscaling: stored.and_then(|status| status.autoscaling.clone()),
        node_cache: stored.and_then(|status| status.node_cache.clone()),
    };
    let (status, events) = report.finish();
    Plan {
        status,
        events,
        wake_after: moves.wake_after,
        actions: moves.actions,
    }
}

/// The plan in place of one that breaks its own rules: a bug, told of instead of acted on.
fn rejected(snapshot: &Snapshot, flaw: &str) -> Plan {
    let replicas = replicas::observe(snapshot);
    let message = format!(
        "the plan breaks a rule and is not carried out: {flaw}. This is a bug of the operator; please report it with this message"
    );
    let mut plan = blocked(
        snapshot,
        &replicas,
        Verdict::unknown(Reason::PlanRejected, message),
        Moves::default(),
    );
    plan.wake_after = Some(Duration::from_secs(LOOK_SECONDS_UNPLACED));
    plan
}

struct Decided<'a> {
    snapshot: &'a Snapshot,
    replicas: &'a [Replica<'a>],
    valid: &'a ValidDeployment,
    wanted: u32,
    scaling: Verdict,
    autoscaling: Option<operator_api::AutoscalingStatus>,
}

impl<'a> Decided<'a> {
    fn new(
        snapshot: &'a Snapshot,
        replicas: &'a [Replica<'a>],
        valid: &'a ValidDeployment,
    ) -> Self {
        let (wanted, scaling, autoscaling) = match &valid.scale {
            Scale::Fixed(number) => {
                let words = format!("spec.replicas = {number}");
                (*number, Verdict::no(Reason::FixedReplicas, words), None)
            }
            Scale::Range(range) => {
                let ready = replicas
                    .iter()
                    .filter(|replica| replica.is_ready())
                    .map(|replica| snapshot.samples.get(&replica.pod.name));
                let load = scaling::collect(ready, snapshot.demand, snapshot.now);
                let status = snapshot.deployment.status.as_ref();
                let before = status.and_then(|status| status.autoscaling.as_ref());
                let live = replicas.iter().filter(|replica| replica.is_live()).count();
                let live = u32::try_from(live).unwrap_or(u32::MAX);
                let decision =
                    scaling::decide(range, before, live, &load, valid.max_num_seqs, snapshot.now);
                let active = if decision.is_active {
                    ConditionStatus::True
                } else {
                    ConditionStatus::Unknown
                };
                let verdict = Verdict::new(active, decision.reason, decision.message.clone());
                (decision.wanted(), verdict, Some(decision.status))
            }
        };
        Self {
            snapshot,
            replicas,
            valid,
            wanted,
            scaling,
            autoscaling,
        }
    }

    fn plan(self, settings: &Settings) -> Plan {
        let inspection = inspect::inspect(self.valid, self.snapshot, settings);
        let mut actions = inspection.actions;
        let front = self.children().front_door();
        let (facts, inspected) = match inspection.facts {
            Facts::Known(facts) => {
                let words = facts_words(&facts);
                (Some(facts), Verdict::yes(Reason::FactsKnown, words))
            }
            Facts::Inspecting { message } => (None, Verdict::unknown(Reason::Inspecting, message)),
            Facts::Failed { reason, message } => (None, Verdict::no(reason, message)),
        };
        let mut chosen: Option<Side> = None;
        let mut course = None;
        let status = self.snapshot.deployment.status.as_ref();
        let mut node_cache = status.and_then(|status| status.node_cache.clone());
        let mut old_configs = Vec::new();
        // The address exists before anything answers there, so that clients can be pointed at it.
        actions.extend(front.iter().flatten().cloned());
        let mut moves =
            replicas::moves_without_plan(self.valid, self.wanted, self.snapshot, self.replicas);
        let planned = match (&front, &facts) {
            (Err(taken), _) => Verdict::no(Reason::NameTaken, taken.clone()),
            (Ok(_), None) => Verdict::unknown(
                Reason::WaitingForFacts,
                "planning waits for the model's facts",
            ),
            (Ok(_), Some(facts)) => match self.chosen_with_ranks(facts, settings) {
                Err(NoLayout { reason, message }) => Verdict::no(reason, message),
                Ok((revision, layout, shared)) => {
                    actions.extend(shared);
                    let spec = &self.snapshot.deployment.spec;
                    let record = || objects::record(spec, &layout, settings, facts);
                    actions.extend(self.engine_config(&layout, &revision, record));
                    actions.extend(self.claim_template(&layout, &revision));
                    node_cache = node_cache::remember(
                        self.valid,
                        settings,
                        revision.as_str(),
                        self.replicas,
                        self.snapshot,
                    );
                    let (steering, sides) =
                        self.steer(revision, layout, settings, node_cache.as_ref());
                    // One that stands may have lost its template.
                    for side in sides.iter().skip(1) {
                        actions.extend(self.claim_template(&side.layout, &side.revision));
                    }
                    moves = replicas::moves(
                        Given {
                            valid: self.valid,
                            sides: &sides,
                            wanted: self.wanted,
                            is_rolling: steering.is_rolling,
                            snapshot: self.snapshot,
                        },
                        self.replicas,
                    );
                    if let Some(seconds) = steering.wake_seconds {
                        moves.wake(seconds);
                    }
                    old_configs = self.old_configs(&steering.memory);
                    let verdict = self.placed(&sides[0].layout, &moves);
                    chosen = sides.into_iter().next();
                    course = Some(steering);
                    verdict
                }
            },
        };
        actions.append(&mut moves.actions);
        actions.extend(old_configs);
        let wake_after = self.wake_after(inspection.wake_after, &moves, chosen.is_some());
        let report = Report {
            snapshot: self.snapshot,
            replicas: self.replicas,
            valid: Verdict::yes(Reason::SpecValid, "the spec can be served"),
            inspected,
            planned,
            scaling: self.scaling,
            wanted: self.wanted,
            unavailable_max: self.valid.rollout.unavailable_max,
            layout: chosen.as_ref().map(|side| (&side.revision, &side.layout)),
            steering: course.as_ref(),
            moves: &moves,
            digest: facts.map(|facts| facts.digest),
            autoscaling: self.autoscaling,
            node_cache,
        };
        let (status, events) = report.finish();
        Plan {
            actions,
            status,
            events,
            wake_after,
        }
    }

    fn children(&self) -> Children<'_> {
        Children {
            valid: self.valid,
            snapshot: self.snapshot,
            replicas: self.replicas,
            wanted: self.wanted,
        }
    }

    /// The layout to use, and what its groups need.
    fn chosen_with_ranks(
        &self,
        facts: &ModelFacts,
        settings: &Settings,
    ) -> Result<(Revision, Layout, Vec<Action>), NoLayout> {
        let (revision, layout) = self.choose(facts, settings)?;
        match self.children().of_groups(layout.pods > 1, settings) {
            Ok(actions) => Ok((revision, layout, actions)),
            Err(message) => Err(NoLayout {
                reason: Reason::NameTaken,
                message,
            }),
        }
    }

    /// The layout to use: the one that replicas run already, else the first with room, else the
    /// best. Nodes that come and go must not change the revision of what runs.
    fn choose(
        &self,
        facts: &ModelFacts,
        settings: &Settings,
    ) -> Result<(Revision, Layout), NoLayout> {
        let mut layouts = fit::layouts(self.valid, facts, &self.snapshot.cluster)?;
        let revision = |layout: &Layout| objects::revision(self.valid, layout, settings);
        let staying = self.replicas.iter();
        let staying = staying.filter(|replica| replica.state != State::Leaving);
        let in_use: BTreeSet<&str> = staying.map(Replica::revision).collect();
        // One that was tried and given up has no replicas; another kind of device must not stand in.
        let status = self.snapshot.deployment.status.as_ref();
        let tried = status.and_then(|status| status.rollout.as_ref()?.target_revision.as_deref());
        // A revision takes longer to make than all else here: none is where there is nothing to hold it against, and none
        // beyond the one that runs.
        let mut known = None;
        if !in_use.is_empty() || tried.is_some() {
            for (index, layout) in layouts.iter().enumerate() {
                let made = revision(layout);
                let is_used = in_use.contains(made.as_str());
                if is_used || tried == Some(made.as_str()) {
                    known = Some((index, made));
                }
                if is_used || (known.is_some() && in_use.is_empty()) {
                    break;
                }
            }
        }
        if let Some((index, revision)) = known {
            return Ok((revision, layouts.swap_remove(index)));
        }
        // Several nodes only where no one node would do.
        let has_single = layouts.iter().any(|layout| layout.pods == 1);
        let has_room = |layout: &Layout| {
            let wish = Wish {
                layout,
                requests: objects::engine_requests(self.valid, layout),
                placement: &self.valid.placement,
                own: Default::default(),
                avoid: Vec::new(),
                holders: Default::default(),
            };
            let room = Room::new(&self.snapshot.cluster);
            if layout.pods > 1 {
                let asked = Asked {
                    ranks: layout.pods,
                    ..Asked::default()
                };
                return !has_single && gang::place(&wish, &room, &asked).is_ok();
            }
            placement::offer(&wish, &room).is_ok()
        };
        let index = layouts.iter().position(has_room).unwrap_or(0);
        let layout = layouts.swap_remove(index);
        Ok((revision(&layout), layout))
    }

    /// How far the rollout may go, and what replicas are to run: the revision of the spec, and while
    /// not all may run it the one before. The first side is the one that most is moving to.
    fn steer(
        &self,
        revision: Revision,
        layout: Layout,
        settings: &Settings,
        node_cache: Option<&NodeCacheStatus>,
    ) -> (Steering, Vec<Side>) {
        let status = self.snapshot.deployment.status.as_ref();
        let before = status.and_then(|status| status.rollout.as_ref());
        let stable = rollout::origin(before, &revision)
            .and_then(|stable| objects::recorded(self.snapshot, self.valid, settings, &stable));
        let steering = rollout::steer(rollout::Given {
            rollout: &self.valid.rollout,
            target: &revision,
            wanted: self.wanted,
            replicas: self.replicas,
            samples: &self.snapshot.samples,
            before,
            can_return: stable.is_some(),
            now: self.snapshot.now,
        });
        let wanted = steering.target_max.min(self.wanted);
        let target = Side {
            valid: self.valid.clone(),
            layout,
            revision,
            settings: settings.clone(),
            wanted,
            holders: node_cache::holders(node_cache, self.valid, settings),
        };
        let sides = match stable {
            Some(mut stable) if wanted < self.wanted => {
                stable.wanted = self.wanted - wanted;
                stable.holders = node_cache::holders(node_cache, &stable.valid, &stable.settings);
                if wanted == 0 && steering.memory.failure.is_some() {
                    vec![stable]
                } else {
                    vec![target, stable]
                }
            }
            _ => vec![target],
        };
        (steering, sides)
    }

    fn placed(&self, layout: &Layout, moves: &Moves) -> Verdict {
        let words = fit::layout_words(layout);
        if let Some(first) = moves.preempted.first() {
            return Verdict::no(
                Reason::Preempted,
                format!(
                    "{} of {} replicas leave their place. {first}. They come back where there is room",
                    moves.preempted.len(),
                    self.wanted
                ),
            );
        }
        if let (0, Some(first)) = (moves.unplaced, moves.waiting.first()) {
            return Verdict::no(
                Reason::Preempting,
                format!(
                    "{} of {} replicas have no place yet. {first}. The plan is {words}",
                    moves.waiting.len(),
                    self.wanted
                ),
            );
        }
        if moves.unplaced == 0 {
            return Verdict::yes(Reason::FitFound, words);
        }
        if let Some(quota) = &moves.over_quota {
            return Verdict::no(
                Reason::GpuQuotaExceeded,
                format!(
                    "{} of {} replicas may not be made. {quota}. The plan is {words}",
                    moves.unplaced, self.wanted
                ),
            );
        }
        let why_not = placement::grouped(moves.why_not.iter().cloned());
        let is_rolling = self.replicas.iter().any(|replica| {
            replica.is_live()
                && self
                    .replicas
                    .iter()
                    .any(|other| other.is_live() && other.revision() != replica.revision())
        });
        let hint = if is_rolling {
            ". A rollout needs room for one more replica, or spec.rollout.maxUnavailable of at least 1"
        } else {
            ""
        };
        let (reason, cause) = if self.was_preempted() {
            let cause = ": others of higher priority took it";
            (Reason::Preempted, cause)
        } else {
            (Reason::NoNodeFits, "")
        };
        Verdict::no(
            reason,
            format!(
                "{} of {} replicas have no place{cause}. {why_not}{hint}. The plan is {words}",
                moves.unplaced, self.wanted
            ),
        )
    }

    /// Whether replicas gave way and have not all found a place since.
    fn was_preempted(&self) -> bool {
        let status = self.snapshot.deployment.status.iter();
        let mut conditions = status.flat_map(|status| &status.conditions);
        conditions.any(|condition| {
            condition.type_ == ConditionType::Planned.as_str()
                && condition.reason == Reason::Preempted.as_str()
        })
    }

    fn wake_after(
        &self,
        inspection: Option<Duration>,
        moves: &Moves,
        is_planned: bool,
    ) -> Option<Duration> {
        let moving = self.replicas.iter().any(|replica| {
            matches!(
                replica.state,
                State::Failing { .. } | State::Draining { .. }
            )
        });
        let starting = self
            .replicas
            .iter()
            .any(|replica| replica.state == State::Starting);
        let serving = self.replicas.iter().any(Replica::is_ready);
        let steered = self.autoscaling.is_some();
        let looks = [
            (moving, LOOK_SECONDS_BUSY),
            (steered && serving, LOOK_SECONDS_STEERED),
            (
                starting || !self.snapshot.samples.is_empty(),
                LOOK_SECONDS_TOLD,
            ),
            (
                moves.unplaced > 0 || !moves.waiting.is_empty() || !is_planned,
                LOOK_SECONDS_UNPLACED,
            ),
        ];
        looks
            .into_iter()
            .filter(|(applies, _)| *applies)
            .map(|(_, seconds)| Duration::from_secs(seconds))
            .chain(inspection)
            .chain(moves.wake_after)
            .min()
    }
}

fn facts_words(facts: &ModelFacts) -> String {
    let (scaled, word) = match facts.parameters {
        0..1_000_000_000 => (facts.parameters as f64 / 1e6, "million"),
        _ => (facts.parameters as f64 / 1e9, "billion"),
    };
    format!(
        "{}, {scaled:.1} {word} parameters, {} of weights, {}",
        facts.config.architecture,
        human_bytes(facts.weight_bytes),
        facts.digest
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::Inventory;
    use serde_json::json;

    /// The planner makes no such plan, so that no snapshot shows what becomes of one.
    #[test]
    fn a_plan_that_breaks_a_rule_is_told_of_and_not_carried_out() {
        let deployment = serde_json::from_value(json!({
            "apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment",
            "metadata": {"name": "m", "namespace": "default", "uid": "u"},
            "spec": {"model": {"source": "file:///models/small"}, "accelerator": {"type": "cpu"}, "replicas": 1},
        }));
        let inventory = Inventory::default();
        let snapshot = inventory.snapshot(
            deployment.expect("a ModelDeployment"),
            inventory.cluster().into(),
            jiff::Timestamp::UNIX_EPOCH,
        );
        let settings = Settings {
            engine_image: "engine:1".into(),
            image_pull_policy: "IfNotPresent".into(),
            node_cache: None,
            network_policies: true,
        };
        let good = plan(&snapshot, &settings);
        assert!(!good.actions.is_empty());
        assert_eq!(checked(good.clone(), &snapshot, &settings), good);
        let mut bad = good;
        bad.actions.extend(bad.actions.clone());
        let told = checked(bad, &snapshot, &settings);
        assert_eq!(told.actions, []);
        let mut conditions = told.status.conditions.iter();
        let planned = conditions.find(|condition| condition.type_ == "Planned");
        assert_eq!(planned.map(|it| it.reason.as_str()), Some("PlanRejected"));
    }
}
