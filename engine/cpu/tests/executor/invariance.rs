//! The bytes of a sequence's logits do not depend on company, chunks, blocks, threads or instruction set.

use crate::support::{INT4, INT8, entry, folder, golden, limits, load, prefill, step};
use engine_cpu::{CpuExecutor, CpuLimits, Isa};
use engine_memory::ResidentDtype;
use proptest::prelude::*;

/// A prompt long enough to span several attention chunks and to run on several threads.
fn prompt(model: &str) -> Vec<u32> {
    golden(&folder(model).join("golden.json"))
        .prompts
        .remove(3)
        .tokens
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}

const FORMS: [ResidentDtype; 3] = [ResidentDtype::Bfloat16, INT8, INT4];

fn with(model: &str, form: ResidentDtype, change: impl FnOnce(&mut CpuLimits)) -> CpuExecutor {
    let mut limits = limits(form);
    change(&mut limits);
    load(&folder(model), limits)
}

#[test]
fn threads_and_instruction_sets_give_the_same_bytes() {
    for (model, form) in ["v2-lite", "v3-groups", "qwen2", "qwen3-moe"]
        .into_iter()
        .flat_map(|model| FORMS.map(|form| (model, form)))
    {
        let tokens = prompt(model);
        let expected = bits(&prefill(&mut with(model, form, |l| l.threads = 1), &tokens));
        for isa in Isa::available() {
            for threads in [1, 2, 4] {
                let mut executor = with(model, form, |l| (l.threads, l.isa) = (threads, isa));
                let found = bits(&prefill(&mut executor, &tokens));
                assert_eq!(
                    found, expected,
                    "{model}, {form:?}, {isa:?}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn decoding_gives_the_bytes_of_prefill() {
    for (model, form) in [
        "v2-groups",
        "v3-mtp",
        "v3-fp8",
        "llama",
        "llama-tied",
        "qwen3",
    ]
    .into_iter()
    .flat_map(|model| FORMS.map(|form| (model, form)))
    {
        let tokens = prompt(model);
        let blocks: Vec<u32> = (0..64).collect();
        let mut executor = with(model, form, |_| ());
        let mut rows = Vec::new();
        for (position, token) in tokens.iter().enumerate() {
            rows.push(step(&mut executor, vec![entry(1, &[*token], position, &blocks)]).remove(0));
        }
        for length in [1, 2, 63, 64, 65, tokens.len()] {
            let whole = prefill(&mut executor, &tokens[..length]);
            assert_eq!(
                bits(&whole),
                bits(&rows[length - 1]),
                "{model}, {form:?}, {length} tokens"
            );
        }
    }
}

/// Longer than two splits of a context: a prompt's rows each go through all of theirs, while a single row's are shared by
/// the threads.
#[test]
fn a_long_context_gives_the_same_bytes_on_one_thread_and_split_over_many() {
    const LENGTH: usize = 1100;
    for (model, form) in [
        ("v3-groups", ResidentDtype::Bfloat16),
        ("v3-groups", INT8),
        ("qwen2", ResidentDtype::Bfloat16),
        ("qwen3-moe", ResidentDtype::Bfloat16),
    ] {
        let tokens: Vec<u32> = prompt(model).into_iter().cycle().take(LENGTH).collect();
        let blocks: Vec<u32> = (0..LENGTH.div_ceil(8) as u32).rev().collect();
        let long = |limits: &mut CpuLimits| {
            limits.kv_blocks = blocks.len();
            limits.model_len_max = LENGTH;
            limits.batched_tokens_max = LENGTH;
        };
        let whole = |threads| {
            let mut executor = with(model, form, |limits| {
                long(limits);
                limits.threads = threads;
            });
            let row = step(&mut executor, vec![entry(1, &tokens, 0, &blocks)]).remove(0);
            (executor, bits(&row))
        };
        let (_, expected) = whole(1);
        for threads in [1, 2, 4] {
            let (mut executor, found) = whole(threads);
            assert_eq!(found, expected, "{model}, {threads} threads");
            let last = entry(1, &tokens[LENGTH - 1..], LENGTH - 1, &blocks);
            let found = bits(&step(&mut executor, vec![last]).remove(0));
            assert_eq!(found, expected, "{model}, {threads} threads, one row");
        }
    }
}

/// Several sequences over scattered blocks, cut into chunks and interleaved as a scheduler might.
#[derive(Clone, Debug)]
struct Schedule {
    block_size: usize,
    threads: usize,
    /// Order of the cache's blocks.
    blocks: Vec<u32>,
    lengths: Vec<usize>,
    /// Which sequence goes on, and by how many tokens; several of one step are joined by `join`.
    turns: Vec<(usize, usize, bool)>,
}

fn schedule() -> impl Strategy<Value = Schedule> {
    let turns = prop::collection::vec((0usize..3, 1usize..40, any::<bool>()), 1..30);
    let lengths = prop::collection::vec(1usize..90, 3);
    (1usize..20, 1usize..4, lengths, turns).prop_flat_map(
        |(block_size, threads, lengths, turns)| {
            let blocks: Vec<u32> = (0..300).collect();
            (
                Just(blocks).prop_shuffle(),
                Just((block_size, threads, lengths, turns)),
            )
                .prop_map(|(blocks, (block_size, threads, lengths, turns))| Schedule {
                    block_size,
                    threads,
                    blocks,
                    lengths,
                    turns,
                })
        },
    )
}

/// Runs the schedule to its end and returns each sequence's last logits.
fn run(executor: &mut CpuExecutor, schedule: &Schedule, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let mut done = vec![0; prompts.len()];
    let mut last = vec![Vec::new(); prompts.len()];
    let tables: Vec<&[u32]> = schedule.blocks.chunks(100).collect();
    let mut pending: Vec<(usize, usize)> = Vec::new();
    let rest = (0..prompts.len()).map(|sequence| (sequence, usize::MAX, false));
    for (sequence, tokens, join) in schedule.turns.iter().copied().chain(rest) {
        let count = tokens.min(prompts[sequence].len() - done[sequence]);
        if count > 0 && !pending.iter().any(|(other, _)| *other == sequence) {
            pending.push((sequence, count));
        }
        if join {
            continue;
        }
        flush(
            executor,
            &mut pending,
            &mut done,
            &mut last,
            &tables,
            prompts,
        );
    }
    for sequence in 0..prompts.len() {
        pending.push((sequence, prompts[sequence].len() - done[sequence]));
    }
    pending.retain(|(_, count)| *count > 0);
    flush(
        executor,
        &mut pending,
        &mut done,
        &mut last,
        &tables,
        prompts,
    );
    last
}

fn flush(
    executor: &mut CpuExecutor,
    pending: &mut Vec<(usize, usize)>,
    done: &mut [usize],
    last: &mut [Vec<f32>],
    tables: &[&[u32]],
    prompts: &[Vec<u32>],
) {
    let entries = pending
        .iter()
        .map(|(sequence, count)| {
            let start = done[*sequence];
            let tokens = &prompts[*sequence][start..start + count];
            entry(*sequence as u64, tokens, start, tables[*sequence])
        })
        .collect();
    let rows = step(executor, entries);
    for ((sequence, count), row) in pending.drain(..).zip(rows) {
        done[sequence] += count;
        last[sequence] = row;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_schedule_gives_the_bytes_of_each_sequence_alone(schedule in schedule()) {
        for (model, form) in [
            ("v3-groups", ResidentDtype::Bfloat16),
            ("v2-lite", ResidentDtype::Bfloat16),
            ("qwen2", ResidentDtype::Bfloat16),
            ("qwen3-moe", ResidentDtype::Bfloat16),
            ("v3-groups", INT8),
            ("qwen3-moe", INT8),
            ("v2-lite", INT4),
            ("qwen2", INT4),
        ] {
            let tokens = prompt(model);
            let prompts: Vec<Vec<u32>> = schedule
                .lengths
                .iter()
                .enumerate()
                .map(|(index, length)| tokens.iter().cycle().skip(index * 7).take(*length).copied().collect())
                .collect();
            let mut executor = with(model, form, |l| {
                l.block_size = schedule.block_size;
                l.kv_blocks = 300;
                l.threads = schedule.threads;
            });
            let found = run(&mut executor, &schedule, &prompts);
            let mut alone = with(model, form, |l| l.threads = 1);
            for (prompt, row) in prompts.iter().zip(&found) {
                prop_assert_eq!(bits(row), bits(&prefill(&mut alone, prompt)), "{} {:?}", model, form);
            }
        }
    }
}
