//! A small cluster that misbehaves on purpose, from a seed: the same seed gives the same story.
//!
//! The world is a store of real Kubernetes objects with a toy scheduler and toy kubelets, and any
//! number of ModelDeployments that compete for its nodes. The operator sees it through a view that
//! lags, except for its own writes, and looks at a ModelDeployment when something happened to it or
//! when its last plan said so, as `operator-k8s` does. Whatever happens, the rules of [`rules`] must
//! hold, and there must be quiet once the faults stop.

mod faults;
mod happening;
mod nature;
mod quotas;
mod rules;
mod store;
mod view;
mod world;

use jiff::Timestamp;
use operator_api::ModelDeploymentStatus;

use crate::inventory::Inventory;
use crate::plan::{Action, Object, Plan, Settings};
use crate::time::seconds_between;

pub use faults::Faults;
pub use happening::{Happening, Planned, replay};
pub use nature::Pace;
pub use world::{Key, Seed, World};

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
    /// Plans made.
    pub plans: usize,
    /// Writes carried out.
    pub writes: usize,
    /// Seconds from the last fault to the last write.
    pub settled_seconds: u64,
}

/// A story to be: what is there at the start, and what goes wrong.
#[derive(Clone, Debug)]
pub struct Story {
    /// Everything that chance decides follows from it.
    pub seed: u64,
    /// Nodes, and the wishes that compete for them.
    pub inventory: Inventory,
    /// What inspections find.
    pub report: String,
    /// The operator's configuration.
    pub settings: Settings,
    /// What goes wrong.
    pub faults: Faults,
    /// Steps of the clock with faults.
    pub steps: usize,
}

/// Seconds after which a create that got no answer cannot take effect any more: API servers give up after a minute.
const HOLD_SECONDS: u64 = 70;
/// Seconds of one step of the clock.
const STEP_SECONDS: u64 = 3;
/// Seconds after a failed pass until the next.
const RETRY_SECONDS: u64 = 3;
/// Seconds after which a ModelDeployment is looked at although nothing happened.
const RESYNC_SECONDS: u64 = 600;
/// Seconds without any write after which the world counts as quiet: longer than every pause.
const QUIET_SECONDS: u64 = 700;
/// Seconds after the last fault within which it must be quiet.
const SETTLE_SECONDS: u64 = 3 * 3600;

/// Runs one story: `steps` with faults, then none until it is quiet.
///
/// # Errors
/// The first rule that is broken.
pub fn run(story: Story) -> Result<Outcome, Box<Broken>> {
    let Story {
        seed,
        inventory,
        report,
        settings,
        faults,
        steps,
    } = story;
    let mut world = World::new(seed, inventory, report, Pace::default());
    let mut outcome = Outcome::default();
    for _ in 0..steps {
        world.clock(STEP_SECONDS);
        world.happen(&faults);
        world.refresh(&faults);
        turn(&mut world, &settings, &faults, &mut outcome)?;
    }
    let end = world.now;
    world.heal();
    let mut repeats = rules::Repeats::default();
    let mut last_write = end;
    while seconds_between(end, world.now) < SETTLE_SECONDS {
        let idle = world
            .next_event()
            .map_or(QUIET_SECONDS, |at| seconds_between(world.now, at));
        world.clock(idle.clamp(STEP_SECONDS, QUIET_SECONDS));
        world.see_everything();
        let before = outcome.writes;
        for action in turn(&mut world, &settings, &Faults::default(), &mut outcome)? {
            repeats.count(&world, &action)?;
        }
        if outcome.writes > before {
            last_write = world.now;
        }
        if seconds_between(last_write, world.now) >= QUIET_SECONDS {
            rules::settled(&world, &settings).map_err(|why| world.broken(why))?;
            outcome.settled_seconds = seconds_between(end, last_write);
            return Ok(outcome);
        }
    }
    Err(world.broken("writes never end".into()))
}

/// One turn of the operator over every ModelDeployment that is due; returns what it wrote.
fn turn(
    world: &mut World,
    settings: &Settings,
    faults: &Faults,
    outcome: &mut Outcome,
) -> Result<Vec<String>, Box<Broken>> {
    let mut written = Vec::new();
    for key in world.due() {
        // As `operator-k8s` does: no plan before the outcome of every write is known.
        if !world.settle(&key) {
            world.failed(&key);
            continue;
        }
        let Some(snapshot) = world.snapshot(&key) else {
            continue;
        };
        let plan = crate::plan(&snapshot, settings);
        outcome.plans += 1;
        let writes = pass(world, &key, plan, faults)?;
        outcome.writes += writes.len();
        written.extend(writes);
    }
    Ok(written)
}

/// Carries out one plan as far as faults let it; returns the writes that took effect.
fn pass(
    world: &mut World,
    key: &Key,
    plan: Plan,
    faults: &Faults,
) -> Result<Vec<String>, Box<Broken>> {
    rules::plan(world, &plan)?;
    let Plan {
        actions,
        status,
        wake_after,
        ..
    } = plan;
    let wanted = wanted(&status);
    let wake_seconds = wake_after.map_or(RESYNC_SECONDS, |after| after.as_secs());
    world.looked(
        key,
        wake_seconds.min(RESYNC_SECONDS),
        waits_for_room(&status),
    );
    let mut writes = Vec::new();
    for action in &actions {
        if !world.answers() || world.chance(faults.lost_write) {
            world.tell(format!("refused, without effect: {action}"));
            world.failed(key);
            break;
        }
        if world.is_refuted(action) {
            world.failed(key);
            break;
        }
        if let Some(until) = world.held_until(key, action) {
            world.tell(format!(
                "waits, because a create may still take effect: {action}"
            ));
            world.due_at(key, until);
            break;
        }
        if let Action::Create(Object::Pod(pod)) = action {
            if world.is_over_quota(&key.0, pod) {
                world.tell(format!("refused by a quota: {action}"));
                world.failed(key);
                break;
            }
            if world.chance(faults.late_create) {
                let seconds = world.chance.below(faults::LATE_SECONDS_MAX);
                world.tell(format!(
                    "no answer, and no effect before {seconds} s: {action}"
                ));
                world.delay(key, pod, seconds);
                world.failed(key);
                break;
            }
        }
        let is_unheard = world.chance(faults.lost_answer);
        let words = format!("{}: {action}", key.1);
        world.tell(if is_unheard {
            format!("{words}, and the answer is lost")
        } else {
            words.clone()
        });
        let before = rules::serving(world, key, action);
        if world.write(key, action, is_unheard) {
            writes.push(words);
        }
        rules::write(world, key, action, wanted, before)?;
        if is_unheard {
            world.failed(key);
            break;
        }
        if world.chance(faults.killed) {
            // Not even the status is stored.
            world.restart();
            return Ok(writes);
        }
    }
    // As `operator-k8s` does: the status says what was decided also when a write failed.
    if world.answers() {
        rules::status(world, key, &status)?;
        world.store_status(key, status);
    }
    Ok(writes)
}

fn wanted(status: &ModelDeploymentStatus) -> u32 {
    status
        .wanted_replicas
        .and_then(|number| u32::try_from(number).ok())
        .unwrap_or(0)
}

/// As the operator's controller decides whom room wakes.
fn waits_for_room(status: &ModelDeploymentStatus) -> bool {
    status.conditions.iter().any(|condition| {
        condition.type_ == "Planned"
            && condition.status == "False"
            && matches!(
                condition.reason.as_str(),
                "NoNodeFits" | "MemoryDoesNotFit" | "GpuQuotaExceeded" | "Preempting" | "Preempted"
            )
    })
}

impl World {
    /// A pass over a wish begins.
    fn looked(&mut self, key: &Key, wake_seconds: u64, is_hungry: bool) {
        let due = nature::later(self.now, wake_seconds.max(1));
        if let Some(wish) = self.wishes.get_mut(key) {
            wish.is_woken = false;
            wish.due = Some(due);
            wish.is_hungry = is_hungry;
        }
    }

    /// A wish is looked at no later than `at`.
    fn due_at(&mut self, key: &Key, at: jiff::Timestamp) {
        if let Some(wish) = self.wishes.get_mut(key) {
            wish.due = Some(wish.due.map_or(at, |due| due.min(at)));
        }
    }

    /// A pass over a wish failed and is repeated.
    fn failed(&mut self, key: &Key) {
        let due = nature::later(self.now, RETRY_SECONDS);
        if let Some(wish) = self.wishes.get_mut(key) {
            wish.due = Some(due);
        }
    }
}

/// The beginning of time in a simulation.
pub(crate) fn epoch() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap_or(Timestamp::UNIX_EPOCH)
}
