//! What a device's kernels give and how fast: the part of `make gpu-check` that launches them.
//!
//!     device outputs FILE    small shapes; writes every output, to be compared with another driver's
//!     device compare A B     differences between two such files, as JSON
//!     device speed           true shapes; times by events over graph replays, as JSON
//!     device driver          builds the emulated driver where it is missing; its path
//!     device speed --small   the same over small shapes, to try the program itself
//!
//! `KERNELS_DRIVER` names the driver; without it the emulated one is built, whose times mean nothing and are marked.
//! Invariant: a case's inputs depend on its name alone, so two devices compute the same thing.

#![allow(missing_docs)]

mod attention;
mod build;
mod compare;
#[allow(dead_code)] // what the tests need besides
#[path = "../../tests/ops/harness.rs"]
mod harness;
mod products;
mod rows;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use build::Case;
use harness::{Lab, Random, driver};
use kernels::driver::{Device, Driver, DriverError, Stream};
use kernels::emulation::Emulation;
use serde_json::{Value, json};

/// Bytes that the copies of a case's operands should exceed, so that no cache holds them: over twice an H200's second cache.
const COLD_BYTES: f64 = 128e6;
const COPIES_MAX: usize = 48;
/// Launches in a graph, and graphs timed.
const LAUNCHES: usize = 48;
const REPLAYS: usize = 11;

/// How much is repeated.
#[derive(Clone, Copy)]
struct Effort {
    copies_max: usize,
    launches: usize,
    replays: usize,
}

impl Effort {
    /// Small shapes are for trying the program on the emulated driver.
    fn of(small: bool) -> Self {
        if small {
            return Self {
                copies_max: 2,
                launches: 2,
                replays: 1,
            };
        }
        Self {
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

fn lab(driver: &std::sync::Arc<Driver>, name: &str) -> Result<Lab, DriverError> {
    // A context of its own: one that a fault has broken is no other case's.
    let device = Device::open_apart(driver, 0)?;
    Ok(Lab {
        stream: device.stream()?,
        device,
        schedule: 0,
        random: Random::new(1, name, 0),
    })
}

/// Median milliseconds of one launch of a case, over `copies` that follow each other.
fn time(stream: &Stream, copies: &[Case], effort: Effort) -> Result<f64, DriverError> {
    for copy in copies {
        copy.queue(stream)?; // loads the code, which a capture may not
    }
    stream.synchronize()?;
    let rounds = effort.launches.div_ceil(copies.len());
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
        end.synchronize()?;
        if replay >= 2 {
            times.push(f64::from(end.milliseconds_since(&begin)?) / (rounds * copies.len()) as f64);
        }
    }
    stream.synchronize()?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// A case's line of the table; a failure is a line too.
fn measure(driver: &std::sync::Arc<Driver>, name: &str, make: &Maker, effort: Effort) -> Value {
    let measured = || -> Result<Value, DriverError> {
        let mut lab = lab(driver, name)?;
        let first = make(&mut lab);
        let (bytes, flops) = (first.bytes, first.flops);
        let wanted = (COLD_BYTES / bytes)
            .ceil()
            .clamp(1.0, effort.copies_max as f64) as usize;
        let mut copies = vec![first];
        while copies.len() < wanted {
            copies.push(make(&mut lab));
        }
        let milliseconds = time(&lab.stream, &copies, effort)?;
        Ok(json!({
            "name": name, "kernel": copies[0].kernels(), "milliseconds": milliseconds, "bytes": bytes, "flops": flops,
            "gb_per_s": bytes / milliseconds / 1e6, "tflop_per_s": flops / milliseconds / 1e9, "copies": copies.len(),
        }))
    };
    // Making a case panics where the device fails, as in a test.
    match catch_unwind(AssertUnwindSafe(measured)) {
        Ok(Ok(line)) => line,
        Ok(Err(error)) => json!({"name": name, "error": error.to_string()}),
        Err(_) => json!({"name": name, "error": "the device failed while the case was made"}),
    }
}

fn speed(driver: &std::sync::Arc<Driver>, small: bool) -> Result<Value, DriverError> {
    let device = Device::open(driver, 0)?;
    let (major, minor) = device.capability();
    let mut lines = Vec::new();
    for (name, make) in cases(small) {
        if name.starts_with("hopper") && major != 9 {
            lines.push(json!({"name": name, "skipped": "needs capability 9.0"}));
            continue;
        }
        let line = measure(driver, &name, &make, Effort::of(small));
        eprintln!("{line}");
        lines.push(line);
    }
    Ok(json!({
        "device": device.name(), "capability": [major, minor],
        "emulated": driver.emulation_schedule(0), "cases": lines,
    }))
}

fn outputs(driver: &std::sync::Arc<Driver>, path: &str) -> Result<(), String> {
    let mut found = Vec::new();
    let hopper = Device::open(driver, 0)
        .map_err(|error| error.to_string())?
        .capability()
        .0
        == 9;
    for (name, make) in cases(true) {
        if name.starts_with("hopper") && !hopper {
            continue;
        }
        let run = || -> Result<Vec<compare::Output>, DriverError> {
            let mut lab = lab(driver, &name)?;
            let case = make(&mut lab);
            case.queue(&lab.stream)?;
            lab.stream.synchronize()?;
            case.read(&lab.stream, &name)
        };
        match run() {
            Ok(more) => found.extend(more),
            Err(error) => return Err(format!("{name}: {error}")),
        }
    }
    compare::write(path, &found).map_err(|error| format!("{path}: {error}"))
}

fn main() -> ExitCode {
    // `cargo bench` adds --bench.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["compare", a, b] => compare::differences(a, b).map(|value| println!("{value:#}")),
        ["driver"] => Emulation::new(&harness::build_folder())
            .build()
            .map(|path| println!("{}", path.display()))
            .map_err(|error| error.to_string()),
        ["outputs", path] => match driver() {
            Some(driver) => outputs(&driver, path),
            None => Err("no driver, and no C++ compiler for the emulated one".into()),
        },
        ["speed"] | ["speed", "--small"] => match driver() {
            Some(driver) => speed(&driver, words.len() > 1)
                .map(|value| println!("{value:#}"))
                .map_err(|error| error.to_string()),
            None => Err("no driver, and no C++ compiler for the emulated one".into()),
        },
        _ => {
            Err("usage: device driver | outputs FILE | compare FILE FILE | speed [--small]".into())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("device: {message}");
            ExitCode::FAILURE
        }
    }
}
