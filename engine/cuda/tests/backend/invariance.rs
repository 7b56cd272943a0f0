//! The bytes of a sequence's logits do not depend on company, chunks, blocks, nor on whether a graph ran.

use crate::support::{bits, entry, gpu, limits, load, prefill, random_model, step, trained_model};
use engine_core::BatchEntry;
use engine_cuda::{CudaExecutor, CudaLimits};
use engine_memory::ResidentDtype;

fn with(change: impl FnOnce(&mut CudaLimits)) -> Option<CudaExecutor> {
    let mut limits = limits(ResidentDtype::Bfloat16);
    change(&mut limits);
    Some(load(&gpu()?, &trained_model(), limits))
}

/// Any tokens of the model's vocabulary.
fn prompt(length: usize, salt: usize) -> Vec<u32> {
    (0..length)
        .map(|i| ((i * 7919 + salt * 104_729) % 540 + 2) as u32)
        .collect()
}

#[test]
fn decoding_and_chunks_give_the_bytes_of_one_prefill() {
    let Some(mut executor) = with(|_| ()) else {
        return;
    };
    let tokens = prompt(70, 1);
    let lengths = [1, 17, 33, 64, 70];
    let whole: Vec<_> = lengths
        .iter()
        .map(|length| bits(&prefill(&mut executor, &tokens[..*length])))
        .collect();
    // Scattered blocks, and chunks that end inside a block.
    let blocks: Vec<u32> = (0..32).map(|i| 32 + i * 5 % 32).collect();
    for chunks in [vec![17, 16, 31, 6], vec![1, 32, 31, 1, 5]] {
        let mut done = 0;
        for count in chunks {
            let part = &tokens[done..done + count];
            let row = step(&mut executor, vec![entry(2, part, done, &blocks)]).remove(0);
            done += count;
            if let Some(at) = lengths.iter().position(|length| *length == done) {
                assert_eq!(bits(&row), whole[at], "{done} tokens");
            }
        }
    }
    // Token by token, through the recorded graph.
    for (position, token) in tokens.iter().enumerate().take(17) {
        let row = step(&mut executor, vec![entry(3, &[*token], position, &blocks)]).remove(0);
        if position == 0 || position == 16 {
            assert_eq!(bits(&row), whole[usize::from(position == 16)]);
        }
    }
}

#[test]
fn prefill_and_decode_in_one_batch_do_not_disturb_each_other() {
    let Some(mut executor) = with(|_| ()) else {
        return;
    };
    let prompts: Vec<Vec<u32>> = [(40, 1), (23, 2), (9, 3), (35, 4)]
        .map(|(length, salt)| prompt(length, salt))
        .into();
    let alone: Vec<_> = prompts
        .iter()
        .map(|tokens| bits(&prefill(&mut executor, tokens)))
        .collect();
    let tables: Vec<Vec<u32>> = (0..4)
        .map(|sequence| (0..8).map(|i| sequence * 8 + (i * 3) % 8).collect())
        .collect();
    let next = |sequence: usize, start: usize, count: usize| -> BatchEntry {
        let tokens = &prompts[sequence][start..start + count];
        entry(sequence as u64, tokens, start, &tables[sequence])
    };
    let silent = |mut entry: BatchEntry| {
        entry.wants_logits = false;
        entry
    };
    // Chunks beside single tokens, in an order in which decodes are not first, some without logits.
    step(
        &mut executor,
        vec![silent(next(0, 0, 39)), silent(next(1, 0, 20))],
    );
    let rows = step(
        &mut executor,
        vec![
            silent(next(1, 20, 1)),
            next(2, 0, 9),
            next(0, 39, 1),
            silent(next(3, 0, 30)),
        ],
    );
    assert_eq!(bits(&rows[0]), alone[2]);
    assert_eq!(bits(&rows[1]), alone[0]);
    let rows = step(&mut executor, vec![next(3, 30, 5), next(1, 21, 2)]);
    assert_eq!(bits(&rows[0]), alone[3]);
    assert_eq!(bits(&rows[1]), alone[1]);
}

#[test]
fn sequences_that_share_prefix_blocks_see_the_same_prefix() {
    let Some(mut executor) = with(|_| ()) else {
        return;
    };
    let prefix = prompt(24, 5);
    let tails = [prompt(7, 6), prompt(3, 7)];
    let mut shared = entry(1, &prefix, 0, &[9, 4, 7]);
    shared.wants_logits = false;
    step(&mut executor, vec![shared]);
    let tables = [[9, 4, 7, 20], [9, 4, 7, 30]];
    let entries = [0, 1].map(|i| entry(i as u64, &tails[i], 24, &tables[i]));
    let rows = step(&mut executor, entries.into());
    for (tail, row) in tails.iter().zip(&rows) {
        let whole: Vec<u32> = prefix.iter().chain(tail).copied().collect();
        assert_eq!(bits(row), bits(&prefill(&mut executor, &whole)));
    }
}

#[test]
fn graphs_and_turns_of_attention_change_no_byte() {
    let Some(mut recorded) = with(|_| ()) else {
        return;
    };
    let Some(mut plain) = with(|limits| {
        limits.graphs = false;
        // Room for the parts of three rows: attention takes several turns.
        limits.parts_bytes = 3 * 4 * 65 * 4;
    }) else {
        return;
    };
    let prompts: Vec<Vec<u32>> = (0..5).map(|salt| prompt(6 + salt, salt)).collect();
    let mut rows: Vec<Vec<Vec<u32>>> = Vec::new();
    for executor in [&mut recorded, &mut plain] {
        let mut seen = Vec::new();
        for (sequence, tokens) in prompts.iter().enumerate() {
            let table = [sequence as u32 * 3, sequence as u32 * 3 + 1];
            let first = step(executor, vec![entry(sequence as u64, tokens, 0, &table)]);
            seen.extend(first.iter().map(|row| bits(row)));
        }
        for turn in 0..2 {
            // Three, then five: graphs of four and of six rows, the latter of the limit.
            let count = 3 + 2 * turn;
            let entries = (0..count)
                .map(|sequence| {
                    let table = [sequence as u32 * 3, sequence as u32 * 3 + 1];
                    let start = prompts[sequence].len() + if sequence < 3 { turn } else { 0 };
                    entry(sequence as u64, &[40 + turn as u32], start, &table)
                })
                .collect();
            seen.extend(step(executor, entries).iter().map(|row| bits(row)));
        }
        rows.push(seen);
    }
    assert_eq!(rows[0], rows[1]);
    assert_eq!((recorded.graphs(), plain.graphs()), (2, 0));
}

/// Contexts beyond one part of 512 positions, where a decode merges parts.
#[test]
fn split_contexts_give_the_same_bytes_in_chunks_and_token_by_token() {
    let wide = |limits: &mut CudaLimits| {
        limits.model_len_max = 640;
        limits.block_size = 16;
    };
    let Some(mut executor) = with(wide) else {
        return;
    };
    let tokens = prompt(530, 8);
    let blocks: Vec<u32> = (0..40).collect();
    let other: Vec<u32> = (0..40).rev().collect();
    let feed = |executor: &mut CudaExecutor, sizes: &[usize], blocks: &[u32]| {
        let mut done = 0;
        let mut last = Vec::new();
        for size in sizes {
            let part = &tokens[done..done + size];
            last = step(executor, vec![entry(1, part, done, blocks)]).remove(0);
            done += size;
        }
        bits(&last)
    };
    let whole = feed(&mut executor, &[128, 128, 128, 128, 18], &blocks);
    let cut = feed(&mut executor, &[128, 128, 128, 127, 17, 1, 1], &other);
    assert_eq!(whole, cut);
}

/// The same of grouped-query attention: chunks, company, graphs, turns and parts change no byte.
#[test]
fn grouped_attention_gives_the_same_bytes_in_chunks_company_turns_and_parts() {
    let tokens: Vec<u32> = (0..530).map(|i| (i * 29 + 3) % 90 + 2).collect();
    let blocks: Vec<u32> = (0..40).collect();
    let other: Vec<u32> = (0..40).map(|i| 79 - i).collect();
    let mut rows = Vec::new();
    for turns in [false, true] {
        let Some(gpu) = gpu() else { return };
        let mut limits = limits(ResidentDtype::Bfloat16);
        limits.model_len_max = 640;
        limits.block_size = 16;
        limits.kv_blocks = 80;
        if turns {
            // Room for the parts of three rows of four heads in two parts.
            limits.parts_bytes = 3 * 8 * 65 * 4;
            limits.graphs = false;
        }
        let mut executor = load(&gpu, &random_model("llama-cuda"), limits);
        let mut feed = |sizes: &[usize], blocks: &[u32], company: bool| {
            let mut done = 0;
            let mut last = Vec::new();
            for size in sizes {
                let mut entries = vec![entry(1, &tokens[done..done + size], done, blocks)];
                if company && done == 0 {
                    entries.insert(0, entry(2, &[7, 9, 11], 0, &[41]));
                } else if company {
                    entries.insert(0, entry(2, &[13], 3, &[41]));
                }
                last = step(&mut executor, entries).pop().unwrap();
                done += size;
            }
            bits(&last)
        };
        if !turns {
            rows.push(feed(&[128, 128, 128, 128, 18], &blocks, false));
        }
        rows.push(feed(&[100, 125, 125, 125, 53, 1, 1], &other, turns));
    }
    assert!(rows.iter().all(|row| *row == rows[0]));
}
