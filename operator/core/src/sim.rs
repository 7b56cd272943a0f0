//! A small cluster that misbehaves on purpose, from a seed: the same seed gives the same story.
//!
//! The world is a store of real Kubernetes objects with a toy scheduler and toy kubelets; the
//! operator sees it through a view that lags, except for its own writes, as `operator-k8s` does.
//! Whatever happens, these must hold: one pod at most that may run for each replica index, no plan
//! that breaks a rule, and quiet once the faults stop.

mod world;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Node;
use operator_api::ModelDeployment;

use crate::names;
use crate::plan::{Action, Kind, Object, Plan, Settings};
use crate::replicas::{State, observe};

pub use world::{Seed, World};

/// How much goes wrong; each is a chance in a thousand for each step of the clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A write fails before it takes effect, and the rest of the plan is not carried out.
    pub lost_write: u64,
    /// A write takes effect but its answer is lost.
    pub lost_answer: u64,
    /// The view is not refreshed.
    pub stale_view: u64,
    /// The operator starts anew and forgets everything.
    pub restart: u64,
    /// Someone deletes a pod.
    pub pod_deleted: u64,
    /// A pod ends for good.
    pub pod_failed: u64,
    /// A node falls silent, or comes back.
    pub node_silent: u64,
    /// The user changes the number of replicas.
    pub rescaled: u64,
    /// The user changes something that forces new pods.
    pub revised: u64,
}

impl Faults {
    /// Everything goes wrong now and then.
    pub fn all() -> Self {
        Self {
            lost_write: 50,
            lost_answer: 50,
            stale_view: 300,
            restart: 20,
            pod_deleted: 10,
            pod_failed: 20,
            node_silent: 10,
            rescaled: 10,
            revised: 5,
        }
    }
}

/// A rule that was broken, with the story that led there.
#[derive(Clone, Debug)]
pub struct Broken {
    /// The seed that shows it again.
    pub seed: u64,
    /// Which rule.
    pub what: String,
    /// The last happenings.
    pub story: Vec<String>,
}

/// Figures of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Writes carried out.
    pub writes: usize,
    /// Seconds from the last fault to quiet.
    pub settled_seconds: i64,
}

/// Seconds of one step of the clock.
const STEP_SECONDS: i64 = 3;
/// Steps without any write after which the world counts as quiet.
const QUIET_STEPS: usize = 40;
/// Steps after the last fault within which it must be quiet.
const SETTLE_STEPS: usize = 1200;

/// Runs one story: `steps` with faults, then none until it is quiet.
///
/// # Errors
/// The first rule that is broken.
pub fn run(
    seed: u64,
    deployment: ModelDeployment,
    nodes: Vec<Node>,
    report: String,
    settings: Settings,
    faults: Faults,
    steps: usize,
) -> Result<Outcome, Box<Broken>> {
    let mut world = World::new(seed, deployment, nodes, report);
    let mut outcome = Outcome::default();
    for _ in 0..steps {
        world.clock(STEP_SECONDS);
        world.happen(&faults);
        outcome.writes += pass(&mut world, &settings, &faults)?;
    }
    let end = world.now;
    world.heal();
    let mut quiet = 0;
    for _ in 0..SETTLE_STEPS {
        world.clock(STEP_SECONDS);
        let writes = pass(&mut world, &settings, &Faults::default())?;
        outcome.writes += writes;
        quiet = if writes == 0 { quiet + 1 } else { 0 };
        if quiet >= QUIET_STEPS && settled(&world).is_ok() {
            let waited = world.now.duration_since(end) - quiet_time();
            outcome.settled_seconds = waited.as_secs();
            return Ok(outcome);
        }
    }
    let why = settled(&world)
        .err()
        .unwrap_or_else(|| "writes never end".into());
    Err(world.broken(format!("it does not settle: {why}")))
}

fn quiet_time() -> SignedDuration {
    SignedDuration::from_secs(STEP_SECONDS * i64::try_from(QUIET_STEPS).unwrap_or(0))
}

/// One pass of the operator; returns the number of writes that took effect.
fn pass(world: &mut World, settings: &Settings, faults: &Faults) -> Result<usize, Box<Broken>> {
    world.refresh(faults);
    let snapshot = world.snapshot();
    let plan = crate::plan(&snapshot, settings);
    inspect_plan(world, &plan)?;
    let mut writes = 0;
    for action in &plan.actions {
        if world.chance(faults.lost_write) {
            world.tell(format!("lost before it took effect: {action}"));
            break;
        }
        world.tell(action.to_string());
        let is_unheard = world.chance(faults.lost_answer);
        writes += usize::from(world.write(action, is_unheard));
        one_pod_per_index(world)?;
        if is_unheard {
            world.tell("its answer is lost".into());
            break;
        }
    }
    // As `operator-k8s` does: the status says what was decided also when a write failed.
    world.store_status(plan.status);
    Ok(writes)
}

fn inspect_plan(world: &World, plan: &Plan) -> Result<(), Box<Broken>> {
    let rejected = plan
        .status
        .conditions
        .iter()
        .find(|condition| condition.reason == operator_api::Reason::PlanRejected.as_str());
    if let Some(condition) = rejected {
        return Err(world.broken(condition.message.clone()));
    }
    for action in &plan.actions {
        let is_foreign = match action {
            Action::Delete { kind, .. } => !matches!(kind, Kind::Pod | Kind::ConfigMap),
            Action::Create(object) => !matches!(object, Object::Pod(_)),
            _ => false,
        };
        if is_foreign {
            return Err(world.broken(format!("an action of a form that is never used: {action}")));
        }
    }
    Ok(())
}

fn one_pod_per_index(world: &World) -> Result<(), Box<Broken>> {
    let mut seen = std::collections::BTreeMap::new();
    for pod in world.pod_views() {
        if pod.label(names::COMPONENT) != names::ENGINE || pod.is_finished() {
            continue;
        }
        let index = pod.label(names::REPLICA).to_owned();
        if let Some(other) = seen.insert(index.clone(), pod.name.clone()) {
            return Err(world.broken(format!(
                "replica {index} has two pods: {other} and {}",
                pod.name
            )));
        }
    }
    Ok(())
}

/// Whether the world is as the user wants it.
fn settled(world: &World) -> Result<(), String> {
    let snapshot = world.truth();
    let wanted = usize::try_from(snapshot.deployment.spec.replicas.unwrap_or(0)).unwrap_or(0);
    let replicas = observe(&snapshot);
    let ready = replicas
        .iter()
        .filter(|replica| replica.state == State::Ready)
        .count();
    if ready != wanted || replicas.len() != wanted {
        let states: Vec<String> = replicas
            .iter()
            .map(|replica| format!("{}: {:?}", replica.pod.name, replica.state))
            .collect();
        return Err(format!("{wanted} replicas are wanted: {states:?}"));
    }
    let revisions: std::collections::BTreeSet<_> = replicas
        .iter()
        .map(|replica| replica.revision().to_owned())
        .collect();
    if revisions.len() > 1 {
        return Err(format!("replicas of several revisions: {revisions:?}"));
    }
    // One for the facts, one for the current revision.
    if snapshot.config_maps.len() > 2 {
        return Err(format!(
            "{} config maps are left over",
            snapshot.config_maps.len()
        ));
    }
    let status = snapshot.deployment.status.clone().unwrap_or_default();
    let reason = if wanted == 0 {
        "ScaledToZero"
    } else {
        "AllReplicasReady"
    };
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Ready");
    match ready {
        Some(condition) if condition.reason == reason => Ok(()),
        other => Err(format!("condition Ready is {other:?}")),
    }
}

/// The beginning of time in a simulation.
pub(crate) fn epoch() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap_or(Timestamp::UNIX_EPOCH)
}
