//! What a device's kernels give and how fast: the part of `make gpu-check` that launches them.
//!
//!     device outputs FILE    small shapes; writes every output, to be compared with another driver's; failures as JSON
//!     device compare A B     differences between two such files, as JSON
//!     device once            small shapes in one context, a launch each, for tools that watch launches; as JSON
//!     device speed           true shapes; times by events over graph replays, as JSON
//!     device speed --small   the same over small shapes, to try the program itself
//!     device names           of the cases that are timed at true shapes, as JSON
//!     device driver          builds the emulated driver where it is missing; its path
//!
//! `KERNELS_DRIVER` names the driver; without it the emulated one is built, whose times mean nothing and are marked.
//! Invariant: a case's inputs depend on its name alone, so two devices compute the same thing. A case that fails, or does
//! not end, is a line and does not stop the others.

#![allow(missing_docs)]

mod attention;
mod build;
mod compare;
#[allow(dead_code)] // what the tests need besides
#[path = "../../tests/ops/harness.rs"]
mod harness;
mod products;
mod rows;

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use build::Case;
use harness::{Lab, Random, driver};
use kernels::driver::{Device, Driver, DriverError, Stream};
use kernels::emulation::Emulation;
use kernels::image::{FATBINS, fatbin_of};
use serde_json::{Value, json};

/// Bytes that the copies of a case's operands should exceed, so that no cache holds them: over twice an H200's second cache.
const COLD_BYTES: f64 = 128e6;
const COPIES_MAX: usize = 48;
/// Launches in a graph, and graphs timed.
const LAUNCHES: usize = 48;
const REPLAYS: usize = 11;
/// Of a graph: longer ones gain nothing, and the time on a device is short.
const GRAPH_MILLISECONDS: f64 = 40.0;
/// Longest that a case's launches may take before its kernel is taken for one that does not end; a tool that watches launches
/// may slow them a thousandfold.
const LIMIT: Duration = Duration::from_secs(20);
const SMALL_LIMIT: Duration = Duration::from_secs(5);

/// How much is repeated.
#[derive(Clone, Copy)]
struct Effort {
    limit: Duration,
    copies_max: usize,
    launches: usize,
    replays: usize,
}

impl Effort {
    /// Small shapes are for trying the program on the emulated driver.
    fn of(small: bool) -> Self {
        if small {
            return Self {
                limit: SMALL_LIMIT,
                copies_max: 2,
                launches: 2,
                replays: 1,
            };
        }
        Self {
            limit: LIMIT,
            copies_max: COPIES_MAX,
            launches: LAUNCHES,
            replays: REPLAYS,
        }
    }
}

/// Makes one copy of a case.
type Maker = Box<dyn Fn(&mut Lab) -> Case>;

fn cases(small: bool) -> Vec<(String, Maker)> {
    let mut all = rows::cases(small);
    all.extend(products::cases(small));
    all.extend(attention::cases(small));
    all
}

fn lab(device: Arc<Device>, name: &str) -> Result<Lab, DriverError> {
    Ok(Lab {
        stream: device.stream()?,
        device,
        schedule: 0,
        random: Random::new(1, name, 0),
    })
}

/// Names of Hopper's cases start like this, and only it has what they need.
fn is_for(name: &str, device: &Device) -> bool {
    !name.starts_with("hopper") || device.capability().0 == 9
}

fn settle(stream: &Stream, limit: Duration) -> Result<(), DriverError> {
    stream.settle_within("a case", limit)
}

/// Answers and is gone. A kernel that does not end would hold a process that ends as others do; one that becomes another
/// program frees the device at once.
fn leave(answer: &Value) -> ! {
    println!("{answer:#}");
    let error = Command::new("true").exec();
    eprintln!("device: true: {error}");
    std::process::abort()
}

/// Kinds of cases, the first words of their names, of which one did not end: the others are not tried, for each would cost the
/// whole limit.
#[derive(Default)]
struct Hung(BTreeSet<String>);

impl Hung {
    /// The answer, where no kernel holds this process.
    fn over(&self, answer: Value) -> Value {
        if !self.0.is_empty() {
            leave(&answer);
        }
        answer
    }

    /// What was made of a case; its failure in words, also where it panicked, as making one does where the device fails. What a
    /// kernel that does not end still uses is not freed, since that would wait for it.
    fn attempt<T, U>(
        &mut self,
        name: &str,
        device: Result<Arc<Device>, DriverError>,
        make: impl FnOnce(&mut Lab) -> T,
        run: impl FnOnce(&Lab, &T) -> Result<U, DriverError>,
    ) -> Result<U, String> {
        let kind = name.split(' ').next().unwrap_or(name);
        if self.0.contains(kind) {
            return Err("not tried: one of its kind does not end".into());
        }
        let whole = || {
            let mut lab = lab(device?, name)?;
            let made = make(&mut lab);
            let outcome = run(&lab, &made);
            if matches!(outcome, Err(DriverError::Late { .. })) {
                std::mem::forget((lab, made));
                self.0.insert(kind.to_owned());
            }
            outcome
        };
        match catch_unwind(AssertUnwindSafe(whole)) {
            Ok(outcome) => outcome.map_err(|error| error.to_string()),
            Err(_) => Err("the device failed while the case was made".into()),
        }
    }
}

/// Median milliseconds of one launch of a case, over `copies` that follow each other.
fn time(stream: &Stream, copies: &[Case], effort: Effort) -> Result<f64, DriverError> {
    let once = || copies.iter().try_for_each(|copy| copy.queue(stream));
    once()?; // loads the code, which a capture may not
    settle(stream, effort.limit)?;
    let begin = stream.record()?;
    once()?;
    let end = stream.record()?;
    settle(stream, effort.limit)?;
    let round = f64::from(end.milliseconds_since(&begin)?).max(1e-3);
    let rounds = effort.launches.div_ceil(copies.len());
    let rounds = rounds.min((GRAPH_MILLISECONDS / round).ceil() as usize);
    let graph = stream.capture(|stream| {
        (0..rounds).try_for_each(|_| copies.iter().try_for_each(|copy| copy.queue(stream)))
    })?;
    let mut times = Vec::new();
    for replay in 0..effort.replays + 2 {
        let begin = stream.record()?;
        // SAFETY: `copies` hold the buffers until this returns, and the stream is synchronised before.
        #[allow(unsafe_code)]
        unsafe {
            stream.replay(&graph)?;
        }
        let end = stream.record()?;
        settle(stream, effort.limit)?;
        if replay >= 2 {
            times.push(f64::from(end.milliseconds_since(&begin)?) / (rounds * copies.len()) as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// A case's line of the table; a failure is a line too.
fn measure(
    driver: &Arc<Driver>,
    hung: &mut Hung,
    (name, make): (&str, &Maker),
    effort: Effort,
) -> Value {
    let copies = |lab: &mut Lab| {
        let first = make(lab);
        let wanted = (COLD_BYTES / first.bytes)
            .ceil()
            .clamp(1.0, effort.copies_max as f64) as usize;
        let mut copies = vec![first];
        while copies.len() < wanted {
            copies.push(make(lab));
        }
        copies
    };
    // A context of its own: one that a fault has broken is no other case's.
    let device = Device::open_apart(driver, 0);
    let measured = hung.attempt(name, device, copies, |lab, copies| {
        let milliseconds = time(&lab.stream, copies, effort)?;
        let (bytes, flops) = (copies[0].bytes, copies[0].flops);
        Ok(json!({
            "name": name, "kernel": copies[0].to_string(), "milliseconds": milliseconds, "bytes": bytes, "flops": flops,
            "gb_per_s": bytes / milliseconds / 1e6, "tflop_per_s": flops / milliseconds / 1e9, "copies": copies.len(),
        }))
    });
    measured.unwrap_or_else(|error| json!({"name": name, "error": error}))
}

fn speed(driver: &Arc<Driver>, small: bool) -> Result<Value, String> {
    let device = Device::open(driver, 0).map_err(|error| error.to_string())?;
    let (major, minor) = device.capability();
    let (mut lines, mut hung) = (Vec::new(), Hung::default());
    for (name, make) in cases(small) {
        if !is_for(&name, &device) {
            lines.push(json!({"name": name, "skipped": "needs capability 9.0"}));
            continue;
        }
        let line = measure(driver, &mut hung, (&name, &make), Effort::of(small));
        // So that a run that is cut off leaves what it had.
        eprintln!("{line}");
        lines.push(line);
    }
    Ok(hung.over(json!({
        "device": device.name(), "capability": [major, minor],
        "emulated": driver.emulation_schedule(0), "cases": lines,
    })))
}

fn outputs(driver: &Arc<Driver>, path: &str) -> Result<Value, String> {
    let device = Device::open(driver, 0).map_err(|error| error.to_string())?;
    let (mut found, mut failed, mut hung) = (Vec::new(), Vec::new(), Hung::default());
    for (name, make) in cases(true) {
        if !is_for(&name, &device) {
            continue;
        }
        let read = hung.attempt(&name, device.apart(), make, |lab, case| {
            case.queue(&lab.stream)?;
            settle(&lab.stream, SMALL_LIMIT)?;
            case.read(&lab.stream, &name)
        });
        match read {
            Ok(more) => found.extend(more),
            Err(error) => failed.push(json!({"name": name, "error": error})),
        }
    }
    compare::write(path, &found).map_err(|error| format!("{path}: {error}"))?;
    let hopper = device.capability().0 == 9;
    Ok(hung.over(json!({"outputs": found.len(), "hopper": hopper, "failed": failed})))
}

/// One launch of every small case in one context, until one does not end, and the fatbins that none of them is of.
fn once(driver: &Arc<Driver>) -> Result<Value, String> {
    let device = Device::open(driver, 0).map_err(|error| error.to_string())?;
    let (mut count, mut failed, mut seen) = (0, Vec::new(), BTreeSet::new());
    let mut hung = Hung::default();
    for (name, make) in cases(true) {
        if !is_for(&name, &device) {
            continue;
        }
        if !hung.0.is_empty() {
            break; // what frees or fills memory of the context would wait for it
        }
        count += 1;
        let ran = hung.attempt(&name, Ok(device.clone()), make, |lab, case| {
            case.queue(&lab.stream)?;
            settle(&lab.stream, LIMIT)?;
            Ok(case.kernels())
        });
        match ran {
            Ok(kernels) => seen.extend(kernels.into_iter().filter_map(fatbin_of).map(|f| f.name)),
            Err(error) => failed.push(json!({"name": name, "error": error})),
        }
        eprintln!("{name}"); // where a run that is cut off came to
    }
    let all = FATBINS.iter().map(|fatbin| fatbin.name);
    let unseen: Vec<&str> = all
        .filter(|name| is_for(name, &device) && !seen.contains(name))
        .collect();
    Ok(hung.over(json!({"cases": count, "failed": failed, "seen": seen, "unseen": unseen})))
}

fn with_driver(work: impl Fn(&Arc<Driver>) -> Result<Value, String>) -> Result<Value, String> {
    match driver() {
        Some(driver) => work(&driver),
        None => Err("no driver, and no C++ compiler for the emulated one".into()),
    }
}

fn main() -> ExitCode {
    // `cargo bench` adds --bench.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["compare", a, b] => compare::differences(a, b),
        ["driver"] => match Emulation::new(&harness::build_folder()).build() {
            Ok(path) => {
                println!("{}", path.display());
                return ExitCode::SUCCESS;
            }
            Err(error) => Err(error.to_string()),
        },
        ["names"] => Ok(cases(false).into_iter().map(|(name, _)| name).collect()),
        ["outputs", path] => with_driver(|driver| outputs(driver, path)),
        ["once"] => with_driver(once),
        ["speed"] => with_driver(|driver| speed(driver, false)),
        ["speed", "--small"] => with_driver(|driver| speed(driver, true)),
        _ => Err(
            "usage: device driver | names | outputs FILE | compare FILE FILE | once | speed [--small]"
                .into(),
        ),
    };
    match outcome {
        Ok(value) => {
            println!("{value:#}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("device: {message}");
            ExitCode::FAILURE
        }
    }
}
