//! Seeded bugs: each barrier, wait, commit and bounds check of the kernels is taken out, one at a time, and the tests of
//! the kernels concerned must fail.
//!
//! `cargo test -p kernels --test ops -- --ignored --nocapture mutation::every` runs all of them and prints the figure,
//! with `KERNELS_MUTATION=permute` those of files of that name, with `KERNELS_MUTATION=permute.cu:41` those of that line
//! and of lines that begin so; a plain `cargo test` runs a sample.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kernels::emulation::Emulation;

use crate::harness::{build_folder, driver};

/// A file with seeded bugs, the sources to build for it and the tests that must notice.
struct Target {
    file: &'static str,
    sources: &'static [&'static str],
    tests: &'static [&'static str],
}

const TARGETS: &[Target] = &[
    Target {
        file: "cuda/sm80/embed_bf16.cu",
        sources: &["embed_bf16"],
        tests: &["rows::embedding"],
    },
    Target {
        file: "cuda/sm80/rms_norm.h",
        sources: &["rms_norm_bf16", "rms_norm_fp8"],
        tests: &["rows::norm", "rows::a_norm"],
    },
    Target {
        file: "cuda/common/reduce.h",
        sources: &["rms_norm_bf16", "rms_norm_fp8"],
        tests: &["rows::norm", "rows::a_norm"],
    },
    Target {
        file: "cuda/sm80/activation.h",
        sources: &["swiglu_bf16", "swiglu_fp8", "quantise_fp8"],
        tests: &["rows::quantisation", "rows::swiglu"],
    },
    Target {
        file: "cuda/sm80/gemm.h",
        sources: &[
            "gemm_bf16",
            "gemm_fp8",
            "grouped_gemm_bf16",
            "grouped_gemm_fp8",
            "permute",
        ],
        tests: &[
            "gemms::gemm",
            "gemms::batched",
            "gemms::a_gemm",
            "experts::grouped",
        ],
    },
    Target {
        file: "cuda/sm90/hopper_gemm.h",
        sources: &["hopper_gemm_bf16", "hopper_gemm_fp8", "permute"],
        tests: &["hopper_gemms"],
    },
    Target {
        file: "cuda/sm90/hopper_mla_decode_bf16.cu",
        sources: &["hopper_mla_decode_bf16", "mla_combine_bf16"],
        tests: &[
            "hopper_attention::hopper_decode_a",
            "hopper_attention::a_row",
        ],
    },
    Target {
        file: "cuda/sm90/hopper_mla_prefill_bf16.cu",
        sources: &["hopper_mla_prefill_bf16"],
        tests: &["hopper_attention::hopper_prefill"],
    },
    Target {
        file: "cuda/sm80/gate_f32.cu",
        sources: &["gate_f32"],
        tests: &["experts::the_gate"],
    },
    Target {
        file: "cuda/sm80/greedy_f32.cu",
        sources: &["greedy_f32"],
        tests: &["rows::greedy"],
    },
    Target {
        file: "cuda/sm80/copy_blocks.cu",
        sources: &["copy_blocks"],
        tests: &["rows::copying"],
    },
    Target {
        file: "cuda/sm80/share_columns.cu",
        sources: &["share_columns"],
        tests: &["ranks::"],
    },
    Target {
        file: "cuda/sm80/permute.cu",
        sources: &["permute"],
        tests: &["experts::permutation", "experts::tiles_are_of"],
    },
    Target {
        file: "cuda/sm80/combine_bf16.cu",
        sources: &["combine_bf16"],
        tests: &["experts::combination"],
    },
    Target {
        file: "cuda/sm80/rope.h",
        sources: &["rope_bf16", "mla_cache_write_bf16"],
        tests: &[
            "attention::rope",
            "attention::a_position",
            "attention::the_cache",
        ],
    },
    Target {
        file: "cuda/sm80/rope_bf16.cu",
        sources: &["rope_bf16"],
        tests: &["attention::rope", "attention::a_position"],
    },
    Target {
        file: "cuda/sm80/mla_cache_write.h",
        sources: &["mla_cache_write_bf16", "mla_cache_write_fp8"],
        tests: &["attention::the_cache", "fp8_cache::a_row"],
    },
    Target {
        file: "cuda/sm80/mla_decode.h",
        sources: &[
            "mla_decode_bf16",
            "mla_decode_fp8",
            "mla_combine_bf16",
            "copy_blocks",
        ],
        tests: &[
            "attention::decode",
            "attention::a_decoded",
            "fp8_cache::decode",
        ],
    },
    Target {
        file: "cuda/sm80/mla_combine_bf16.cu",
        sources: &["mla_decode_bf16", "mla_combine_bf16"],
        tests: &["attention::decode", "attention::a_decoded"],
    },
    Target {
        file: "cuda/sm80/gqa_cache_write_bf16.cu",
        sources: &["gqa_cache_write_bf16"],
        tests: &["grouped::grouped_heads"],
    },
    Target {
        file: "cuda/sm80/gqa.h",
        sources: &["gqa_decode_bf16", "gqa_prefill_bf16", "mla_combine_bf16"],
        tests: &[
            "grouped::grouped_decode",
            "grouped::a_grouped",
            "grouped::grouped_prefill",
        ],
    },
    Target {
        file: "cuda/sm80/sample.h",
        sources: &["sample_f32", "logprobs_f32"],
        tests: &[
            "sampling::sampling",
            "sampling::a_row",
            "sampling::logprobs",
        ],
    },
    Target {
        file: "cuda/sm80/sample_adjust_f32.cu",
        sources: &["sample_adjust_f32"],
        tests: &["sampling::adjusted"],
    },
    Target {
        file: "cuda/sm80/sample_f32.cu",
        sources: &["sample_f32"],
        tests: &["sampling::sampling", "sampling::a_row"],
    },
    Target {
        file: "cuda/sm80/logprobs_f32.cu",
        sources: &["logprobs_f32"],
        tests: &["sampling::logprobs"],
    },
    Target {
        file: "cuda/sm80/mla_prefill_bf16.cu",
        sources: &["mla_prefill_bf16"],
        tests: &["attention::prefill"],
    },
];

/// In place of a replacement: the call's first argument.
const FIRST_ARGUMENT: &str = "";

/// What is replaced by what. An empty ending takes a whole call with its arguments.
const RULES: &[(&str, &str)] = &[
    ("block_sync()", "(void)0"),
    ("warp_sync()", "(void)0"),
    ("copy_async_wait<", "(void)0"),
    ("copy_async_commit()", "(void)0"),
    ("mbarrier_wait(", "(void)0"),
    ("mbarrier_arrive(", "(void)0"),
    ("wgmma_wait<", "(void)0"),
    // Orders memory that the emulator does not order; it only marks who has fenced.
    ("wgmma_fence(", "(void)0"),
    ("mbarrier_init_fence()", "(void)0"),
    ("memory_fence()", "(void)0"),
    ("wgmma_commit()", "(void)0"),
    ("async_proxy_fence()", "(void)0"),
    ("within(", "true"),
    ("at_most(", FIRST_ARGUMENT),
];

/// A seeded bug.
struct Bug {
    target: &'static Target,
    line: usize,
    removed: String,
    text: String,
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {}", self.target.file, self.line, self.removed)
    }
}

/// Where the call that begins at `start` ends: after its last parenthesis.
fn call_end(text: &str, start: usize) -> usize {
    let mut depth = 0;
    for (index, character) in text[start..].char_indices() {
        match character {
            '(' => depth += 1,
            ')' if depth == 1 => return start + index + 1,
            ')' => depth -= 1,
            _ => {}
        }
    }
    text.len()
}

/// Of a call's arguments.
fn first_argument(arguments: &str) -> &str {
    let mut depth = 0;
    let end = arguments.find(|character| {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        character == ',' && depth == 0
    });
    end.map_or(arguments, |end| &arguments[..end])
}

fn bugs() -> Vec<Bug> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut bugs = Vec::new();
    for target in TARGETS {
        let text = std::fs::read_to_string(root.join(target.file)).expect("a kernel source");
        for (name, replacement) in RULES {
            for (start, _) in text.match_indices(name) {
                let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
                let before = &text[line_start..start];
                let inside_word = before.ends_with(|c: char| c.is_alphanumeric() || c == '_');
                if before.contains("//") || inside_word {
                    continue;
                }
                let end = call_end(&text, start);
                let replacement = match *replacement {
                    FIRST_ARGUMENT => {
                        format!("({})", first_argument(&text[start + name.len()..end]))
                    }
                    other => other.to_owned(),
                };
                bugs.push(Bug {
                    target,
                    line: text[..start].matches('\n').count() + 1,
                    removed: text[start..end].to_owned(),
                    text: format!("{}{replacement}{}", &text[..start], &text[end..]),
                });
            }
        }
    }
    bugs
}

/// Runs a target's tests against a driver: whether they pass. The first that fails ends the run.
fn passes(target: &Target, library: &Path, patience: Patience) -> bool {
    let limits = format!(
        "ulimit -c 0; ulimit -t {}; exec \"$0\" \"$@\"",
        patience.processor.as_secs()
    );
    let mut child = Command::new("sh")
        .args(["-c", &limits])
        .arg(std::env::current_exe().expect("this test"))
        .args(target.tests)
        .env("KERNELS_DRIVER", library)
        // A figure that another run repeats.
        .env("KERNELS_SEED", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test runs");
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        output
            .lines()
            .map_while(Result::ok)
            .try_for_each(|line| send.send(line))
    });
    let end = Instant::now() + patience.clock;
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) if !line.ends_with("... FAILED") => {}
            Err(RecvTimeoutError::Disconnected) => {
                return child.wait().expect("a child").success();
            }
            // A hang is a failure too, but the emulator should have reported it.
            Ok(_) | Err(RecvTimeoutError::Timeout) => {
                child.kill().expect("a child");
                child.wait().expect("a child");
                return false;
            }
        }
    }
}

fn library(target: &Target, text: Option<String>) -> Option<PathBuf> {
    let mut emulation = Emulation::new(&build_folder()).only(target.sources);
    if let Some(text) = text {
        emulation = emulation.replace(Path::new(target.file), text);
    }
    emulation.build().ok()
}

/// When tests are given up. An endless loop is told by the processor time it takes, for a machine that has other work may
/// leave a sound one as little as it likes; the clock is for a hang that takes none.
#[derive(Clone, Copy)]
struct Patience {
    processor: Duration,
    clock: Duration,
}

impl Patience {
    const MOST: Self = Self {
        processor: Duration::from_secs(600),
        clock: Duration::from_secs(1800),
    };

    /// Three times what tests can have used that took so long without a bug.
    fn after(control: Duration) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let processor = control * 3 * u32::try_from(threads).unwrap_or(1);
        Self {
            processor: processor.clamp(Duration::from_secs(20), Self::MOST.processor),
            ..Self::MOST
        }
    }
}

/// Seeds the bugs and gives those that nobody noticed.
fn survivors<'a>(bugs: &[&'a Bug]) -> Vec<&'a Bug> {
    let mut survivors = Vec::new();
    let mut patience: BTreeMap<&str, Patience> = BTreeMap::new();
    for bug in bugs {
        let target = bug.target;
        let patience = *patience.entry(target.file).or_insert_with(|| {
            let library = library(target, None).expect("the kernels compile");
            let begin = Instant::now();
            assert!(
                passes(target, &library, Patience::MOST),
                "{}: the tests fail without a bug",
                target.file
            );
            Patience::after(begin.elapsed())
        });
        let library = library(target, Some(bug.text.clone()))
            .unwrap_or_else(|| panic!("it does not compile without {bug}"));
        let caught = !passes(target, &library, patience);
        println!("{} {bug}", if caught { "caught  " } else { "SURVIVED" });
        if !caught {
            survivors.push(*bug);
        }
        // One library and one tree per bug would fill a disk.
        if let Some(folder) = library.parent() {
            std::fs::remove_dir_all(folder).ok();
        }
    }
    survivors
}

fn can_run() -> bool {
    std::env::var_os("KERNELS_DRIVER").is_none() && driver().is_some()
}

#[test]
fn a_sample_of_seeded_bugs_is_caught() {
    if !can_run() {
        return;
    }
    // Of small files only: these are the bugs that compile and run in seconds.
    let wanted = [
        ("cuda/common/reduce.h", "block_sync"),
        ("cuda/sm80/permute.cu", "block_sync"),
        ("cuda/sm80/mla_prefill_bf16.cu", "copy_async_wait"),
        ("cuda/sm80/rope_bf16.cu", "within"),
        ("cuda/sm80/share_columns.cu", "at_most"),
        // What the emulator's mark of writers and its handing over are for.
        ("cuda/sm80/gqa.h", "warp_sync"),
        ("cuda/sm90/hopper_mla_prefill_bf16.cu", "warp_sync"),
    ];
    let all = bugs();
    let sample: Vec<&Bug> = wanted
        .iter()
        .map(|(file, what)| {
            all.iter()
                .find(|bug| bug.target.file == *file && bug.removed.starts_with(what))
                .unwrap_or_else(|| panic!("{file} has no {what} to remove"))
        })
        .collect();
    let survivors = survivors(&sample);
    assert!(
        survivors.is_empty(),
        "{} of {} survived",
        survivors.len(),
        sample.len()
    );
}

#[test]
#[ignore = "minutes; run by its own command"]
fn every_seeded_bug_is_tried_and_nine_of_ten_are_caught() {
    if !can_run() {
        return;
    }
    let only = std::env::var("KERNELS_MUTATION").unwrap_or_default();
    let mut all = bugs();
    all.retain(|bug| bug.to_string().contains(&only));
    assert!(!all.is_empty(), "no seeded bug is in {only}");
    let survivors = survivors(&all.iter().collect::<Vec<_>>());
    let caught = all.len() - survivors.len();
    println!("caught {caught} of {} seeded bugs", all.len());
    assert!(caught * 10 >= all.len() * 9, "{caught} of {}", all.len());
}
