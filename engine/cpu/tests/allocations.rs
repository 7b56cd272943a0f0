//! A step of the engine allocates nothing.
//!
//! The step path is what runs between two looks at the queue of new requests: `Engine::prepare` (scheduling, the entries
//! of the batch), `CpuExecutor::execute` on all of its threads, sampling, and the bookkeeping of `Engine::run`, with the
//! caller's list of events emptied and used again. A request's own memory - its tokens, its block table, the names of its
//! prefixes - is allocated when it is submitted. What clients are told about an event is not part of a step.
//!
//! This file holds a single test, since the counter counts for the whole process.

// The interface of a global allocator is unsafe.
#![allow(unsafe_code)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use engine_core::{Engine, Limits, Request, RequestId, SamplingParameters, TokenId};
use engine_memory::{IntegerFormat, IntegerSource, ResidentDtype};
use support::{folder, limits, load};

struct Counting;

static COUNTS: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

impl Counting {
    fn count() {
        if COUNTS.load(Ordering::Relaxed) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count();
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count();
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count();
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations, on all threads, while `run` runs.
fn allocations(run: impl FnOnce()) -> usize {
    ALLOCATIONS.store(0, Ordering::Relaxed);
    COUNTS.store(true, Ordering::Relaxed);
    run();
    COUNTS.store(false, Ordering::Relaxed);
    ALLOCATIONS.load(Ordering::Relaxed)
}

fn request(id: u64, vocabulary: usize) -> Request {
    Request {
        id: RequestId(id),
        // No two share a prefix.
        prompt: (0..70)
            .map(|at| TokenId(((at * 7 + id * 11) % vocabulary as u64) as u32))
            .collect(),
        choices: 1,
        max_tokens: 40,
        parameters: SamplingParameters {
            seed: id,
            temperature: if id.is_multiple_of(2) { 0.0 } else { 0.8 },
            top_p: 0.9,
            ignore_eos: true,
            repetition_penalty: if id.is_multiple_of(4) { 1.2 } else { 1.0 },
            presence_penalty: if id % 4 == 1 { 0.5 } else { 0.0 },
            frequency_penalty: if id % 4 == 3 { 0.3 } else { 0.0 },
            logit_bias: [(TokenId(3), 2.0)].into(),
            ..Default::default()
        },
        stop_tokens: Vec::new(),
        cache_salt: String::new(),
        constraint: None,
        priority: 0,
        tenant: String::new(),
        resumed: Vec::new(),
    }
}

fn integers(format: IntegerFormat) -> ResidentDtype {
    ResidentDtype::Integer(format, IntegerSource::Load)
}

#[test]
fn no_step_allocates_on_any_thread() {
    // The counter counts.
    assert!(allocations(|| drop(std::hint::black_box(Box::new(1)))) > 0);
    for (model, resident, drafts) in [
        ("v3-groups", ResidentDtype::Bfloat16, 0),
        ("v3-groups", ResidentDtype::Float32, 0),
        ("qwen2", ResidentDtype::Bfloat16, 0),
        ("qwen3-moe", ResidentDtype::Bfloat16, 0),
        ("qwen3-moe", ResidentDtype::Float32, 0),
        ("v3-groups", integers(IntegerFormat::Int8), 0),
        ("qwen3-moe", integers(IntegerFormat::Int4 { group: 64 }), 0),
        ("v3-mtp", ResidentDtype::Bfloat16, 2),
    ] {
        let mut limits = limits(resident);
        limits.kv_blocks = 128;
        limits.threads = 3;
        limits.draft_tokens = drafts;
        let mut executor = load(&folder(model), limits);
        let vocabulary = engine_core::Executor::vocabulary(&executor);
        let mut engine = Engine::new(Limits {
            vocabulary,
            max_model_len: limits.model_len_max,
            max_num_seqs: limits.sequences_max,
            // Prompts are cut into chunks, which meet other sequences' decoding steps.
            max_num_batched_tokens: 24,
            max_queued_requests: 8,
            block_size: limits.block_size,
            block_count: limits.kv_blocks,
            draft_tokens: drafts,
        })
        .unwrap();
        let mut events = Vec::with_capacity(64);
        // The first round stands for the canary that a server decodes before it is ready.
        for round in 0..3 {
            for id in 0..4 {
                engine.submit(request(4 * round + id, vocabulary)).unwrap();
            }
            let mut steps = 0;
            while !engine.is_idle() {
                events.clear();
                let counted = allocations(|| {
                    engine.step(&mut executor, &mut events).unwrap();
                });
                assert!(
                    round == 0 || counted == 0,
                    "{model} {resident:?}, {drafts} drafts: step {steps} of round {round} allocated {counted} times"
                );
                steps += 1;
            }
            assert!(steps > 40, "{steps} steps");
        }
    }
}
