//! Every target over its corpus and a bounded number of mutations, and the runner against bugs that were planted.
//!
//! `CACHALOT_FUZZ_SEED` and `CACHALOT_FUZZ_INPUTS` choose another run; a failure prints the seed and keeps its input.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use engine_fuzz::{Meter, Outcome, Runner, TARGETS, Target};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// One target at a time, because allocations are counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is \"{text}\", but must be a whole number"))
    })
}

fn runner(corpus: PathBuf) -> Runner {
    let inputs = setting("CACHALOT_FUZZ_INPUTS", 3000);
    Runner {
        corpus,
        failures: Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz"),
        seed: setting("CACHALOT_FUZZ_SEED", 20_261_125),
        inputs: inputs as usize,
        budget: Duration::from_secs(4 * inputs.div_ceil(3000)),
        hang: Duration::from_secs(60),
        meter: Some(Meter {
            reset: || {
                ALLOCATED.reset_peak_usage();
                ALLOCATED.current_usage()
            },
            peak: || ALLOCATED.peak_usage(),
        }),
    }
}

fn fuzz(name: &str) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let target = TARGETS.iter().find(|target| target.name == name).unwrap();
    let runner = runner(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus"));
    match runner.run(target) {
        Ok(Outcome { replayed, mutated }) => {
            println!(
                "{name}: {replayed} inputs of the corpus, {mutated} mutations, seed {}",
                runner.seed
            );
            assert!(mutated > 0, "the budget ended before the first mutation");
        }
        Err(failure) => panic!(
            "{name}, seed {}: {}\ninput ({} bytes) kept in {}: {:?}\nonce it is mended, add it to engine/fuzz/corpus/{name}/",
            runner.seed,
            failure.problem,
            failure.input.len(),
            failure.path.display(),
            String::from_utf8_lossy(&failure.input[..failure.input.len().min(2000)]),
        ),
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test] fn $name() { fuzz(stringify!($name)); })*

        #[test]
        fn every_target_has_a_test_and_a_corpus() {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            for name in names {
                let libfuzzer = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("libfuzzer/fuzz_targets/{name}.rs"));
                assert!(libfuzzer.is_file(), "{} is missing", libfuzzer.display());
            }
        }
    };
}

targets!(safetensors_header model_config tokenizer chat_request other_requests chat_template answer_parsers output_tokens grammar);

/// Runs a planted bug from one harmless input.
fn planted(run: fn(&[u8]), seed_input: &[u8]) -> engine_fuzz::Failure {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let corpus = folder.path().join("planted");
    std::fs::create_dir(&corpus).unwrap();
    std::fs::write(corpus.join("harmless"), seed_input).unwrap();
    let target = Target {
        name: "planted",
        run,
        dictionary: &["<boom>"],
        bytes_max: 64 << 20,
    };
    let mut runner = runner(folder.path().to_path_buf());
    runner.failures = folder.path().join("failures");
    runner.hang = Duration::from_secs(2);
    runner.inputs = 3000;
    let failure = runner.run(&target).unwrap_err();
    assert_eq!(std::fs::read(&failure.path).unwrap(), failure.input);
    assert_eq!(
        runner.run(&target).unwrap_err().input,
        failure.input,
        "the seed repeats the run"
    );
    failure
}

#[test]
fn the_runner_finds_a_panic_behind_a_number_and_a_word() {
    let failure = planted(
        |data| {
            let text = String::from_utf8_lossy(data);
            let number = text
                .split(':')
                .nth(1)
                .and_then(|rest| rest.trim_end_matches('}').parse::<u64>().ok());
            assert!(number.is_none_or(|n| n < 1 << 31), "too large");
            assert!(!text.contains("a<boom>"), "the word");
        },
        b"{\"a\":1}",
    );
    assert!(
        failure.problem.starts_with("panicked: "),
        "{}",
        failure.problem
    );
}

#[test]
fn the_runner_finds_a_hang() {
    let failure = planted(
        |data| {
            while data.windows(6).any(|part| part == b"<boom>") {
                std::thread::park_timeout(Duration::from_millis(50));
            }
        },
        b"harmless",
    );
    assert!(failure.problem.contains("hangs"), "{}", failure.problem);
}

#[test]
fn the_runner_finds_what_allocates_too_much() {
    let failure = planted(
        |data| {
            if data.len() > 40 {
                std::hint::black_box(vec![1u8; 100 << 20]);
            }
        },
        b"a b c d e f g h",
    );
    assert!(failure.problem.contains("allocated"), "{}", failure.problem);
}
