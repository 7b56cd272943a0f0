//! Ranks that share a model give the bytes that one rank alone gives.

use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::support::{INT4, INT8, entry, folder, golden, limits};
use engine_core::{Batch, BatchEntry, DraftBatch, Executor, Logits};
use engine_cpu::{AllocatedBytes, CpuExecutor, CpuLimits};
use engine_group::{Follower, Joining, LeadingExecutor, Next, ProcessGroup, Terms, join};
use engine_load::{Progress, read_config};
use engine_memory::{MemoryRequest, ResidentDtype, memory_plan};
use engine_spec::{Device, Dtype, KvCacheDtype, ModelConfig, Parallelism, Quantization, Rank};

const PATIENCE: Duration = Duration::from_secs(60);

/// Every model that can be shared by so many ranks: all families, FP8 with and without whole blocks, integers in files, tied
/// and untied heads, key-value heads that are shared out and such that are copied.
const SHARED: [(&str, &[u32]); 16] = [
    ("v2-lite", &[2, 4]),
    ("v2-groups", &[2, 4]),
    ("v3-groups", &[2, 4]),
    ("v3-mtp", &[2, 4]),
    ("v3-fp8", &[2, 4]),
    ("v31-ue8m0", &[4]),
    ("kimi-k2", &[2, 4]),
    ("v2-w8a16", &[4]),
    ("qwen2", &[2]),
    ("qwen2-fp8", &[3]),
    ("llama", &[2, 4]),
    ("llama-tied", &[5]),
    ("llama-w4a16", &[2, 4]),
    ("qwen3", &[2, 3]),
    ("qwen3-w8a8", &[2, 4]),
    ("qwen3-moe-cuda", &[2, 4]),
];

/// Ranks of a model on threads; rank 0 leads them.
struct Ranks {
    leader: LeadingExecutor,
    group: Arc<dyn ProcessGroup>,
    followers: Vec<thread::JoinHandle<()>>,
    held: Vec<AllocatedBytes>,
}

/// Loads a rank's share.
type Load = Arc<dyn Fn(Arc<dyn ProcessGroup>) -> CpuExecutor + Send + Sync>;

impl Ranks {
    fn start(count: u32, load: &Load) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let leader = listener.local_addr().unwrap().to_string();
        drop(listener);
        let group = move |index| {
            let joining = Joining {
                rank: Rank::new(index, count).unwrap(),
                leader: leader.clone(),
                terms: Terms::default(),
                patience: PATIENCE,
                timeout: PATIENCE,
                secret: None,
            };
            let (group, _) = join(&joining).unwrap();
            let group: Arc<dyn ProcessGroup> = Arc::new(group);
            group
        };
        let (sender, receiver) = std::sync::mpsc::channel();
        let followers = (1..count).map(|index| {
            let (group, load, sender) = (group.clone(), load.clone(), sender.clone());
            thread::spawn(move || {
                let group = group(index);
                let executor = load(group.clone());
                sender.send(executor.allocated_bytes()).unwrap();
                let mut follower = Follower::new(Box::new(executor), group, PATIENCE);
                loop {
                    match follower.next(PATIENCE).unwrap() {
                        Next::Wait => {}
                        Next::Step(_) => follower.execute().unwrap(),
                        Next::End => return,
                    }
                }
            })
        });
        let followers = followers.collect();
        let group = group(0);
        let executor = load(group.clone());
        let mut held = vec![executor.allocated_bytes()];
        held.extend((1..count).map(|_| receiver.recv_timeout(PATIENCE).unwrap()));
        Self {
            leader: LeadingExecutor::new(Box::new(executor), group.clone()),
            group,
            followers,
            held,
        }
    }

    fn end(self) {
        let end = engine_group::Command::End.encode();
        self.group.broadcast(&end).unwrap();
        for follower in self.followers {
            follower.join().unwrap();
        }
    }
}

fn files(model: &str, limits: CpuLimits) -> Load {
    let dir = folder(model);
    let config = read_config(&dir).unwrap();
    Arc::new(move |group| {
        CpuExecutor::load_share(&dir, &config, limits, group, &Progress::default()).unwrap()
    })
}

fn alone(load: &Load) -> CpuExecutor {
    load(Arc::new(engine_group::Alone))
}

fn bits(executor: &mut dyn Executor, entries: Vec<BatchEntry>) -> Vec<Vec<u32>> {
    let mut logits = Logits::default();
    executor.execute(&Batch { entries }, &mut logits).unwrap();
    rows(&logits)
}

fn rows(logits: &Logits) -> Vec<Vec<u32>> {
    let bits = |row: &[f32]| row.iter().map(|value| value.to_bits()).collect();
    (0..logits.rows())
        .map(|row| bits(logits.row(row)))
        .collect()
}

/// A prompt of several attention chunks.
fn prompt(model: &str) -> Vec<u32> {
    let text = golden(&folder(model).join("golden.json"));
    let prompt = text
        .prompts
        .into_iter()
        .max_by_key(|prompt| prompt.tokens.len());
    prompt.unwrap().tokens
}

/// A prefill in chunks beside a short prompt, then steps that decode one and prefill the other.
fn conversation(executor: &mut dyn Executor, tokens: &[u32]) -> Vec<Vec<u32>> {
    let blocks: Vec<u32> = (0..30).collect();
    let others: Vec<u32> = (30..60).rev().collect();
    let half = tokens.len() / 2;
    let mut silent = entry(1, &tokens[..half], 0, &blocks);
    silent.wants_logits = false;
    let mut seen = bits(executor, vec![silent, entry(2, &tokens[..3], 0, &others)]);
    let rest = entry(1, &tokens[half..], half, &blocks);
    seen.extend(bits(executor, vec![entry(2, &[7], 3, &others), rest]));
    for step in 0..4 {
        let (one, other) = (tokens.len() + step, 4 + step);
        let next = [entry(1, &[9], one, &blocks), entry(2, &[3], other, &others)];
        seen.extend(bits(executor, next.into()));
    }
    seen
}

#[test]
fn two_and_four_ranks_give_the_bytes_of_one() {
    for (model, counts) in SHARED {
        let tokens = prompt(model);
        for form in [ResidentDtype::Float32, ResidentDtype::Bfloat16, INT8, INT4] {
            let mut limits = limits(form);
            limits.threads = 1;
            let load = files(model, limits);
            let expected = conversation(&mut alone(&load), &tokens);
            assert!(expected.iter().flatten().any(|bits| *bits != 0));
            for count in counts {
                let mut ranks = Ranks::start(*count, &load);
                let found = conversation(&mut ranks.leader, &tokens);
                assert_eq!(found, expected, "{model}, {form:?}, {count} ranks");
                ranks.leader.idle().unwrap();
                ranks.end();
            }
        }
    }
}

/// As the engine drafts: the prediction layer over a step's rows, then over what it left.
fn drafts(executor: &mut dyn Executor, tokens: &[u32]) -> Vec<Vec<u32>> {
    let blocks: Vec<u32> = (0..40).collect();
    let count = tokens.len() - 1;
    let mut seen = bits(executor, vec![entry(1, &tokens[..count], 0, &blocks)]);
    let mut logits = Logits::default();
    let mut pass = DraftBatch::default();
    pass.batch.entries.push(entry(1, &tokens[1..], 0, &blocks));
    pass.rows.push(0);
    executor.draft(&pass, &mut logits).unwrap();
    seen.extend(rows(&logits));
    pass.batch.entries[0] = entry(1, &[11], count, &blocks);
    executor.draft(&pass, &mut logits).unwrap();
    seen.extend(rows(&logits));
    let mut verified = entry(1, &[5, 6, 11], count, &blocks);
    verified.drafts = 2;
    seen.extend(bits(executor, vec![verified]));
    seen
}

#[test]
fn ranks_draft_the_bytes_of_one() {
    let tokens = prompt("v3-mtp");
    for form in [ResidentDtype::Float32, ResidentDtype::Bfloat16, INT4] {
        let mut limits = limits(form);
        (limits.draft_tokens, limits.threads) = (2, 1);
        let load = files("v3-mtp", limits);
        let expected = drafts(&mut alone(&load), &tokens);
        assert_eq!(expected.len(), 1 + 1 + 1 + 3);
        for count in [2, 4] {
            let mut ranks = Ranks::start(count, &load);
            let found = drafts(&mut ranks.leader, &tokens);
            assert_eq!(found, expected, "{form:?}, {count} ranks");
            ranks.end();
        }
    }
}

#[test]
fn random_weights_are_one_model_on_all_ranks() {
    for (model, count) in [("v3-fp8", 4), ("qwen3-moe-cuda", 2), ("llama-tied", 5)] {
        let config = read_config(&folder(model)).unwrap();
        let limits = limits(ResidentDtype::Bfloat16);
        let load: Load = Arc::new(move |group| {
            let progress = Progress::default();
            let executor = CpuExecutor::dummy_share(&config, 7, limits, group, &progress).unwrap();
            assert_eq!(progress.done(), progress.total());
            executor
        });
        let tokens = prompt(model);
        let expected = conversation(&mut alone(&load), &tokens);
        let mut ranks = Ranks::start(count, &load);
        assert_eq!(
            conversation(&mut ranks.leader, &tokens),
            expected,
            "{model}"
        );
        ranks.end();
    }
}

fn request(config: &ModelConfig, count: u32, quantization: Quantization) -> MemoryRequest {
    MemoryRequest {
        dtype: Dtype::Auto,
        quantization,
        parallelism: Parallelism {
            tensor: count,
            expert: if config.moe.is_some() { count } else { 1 },
            pipeline: 1,
        },
        device: Device::Cpu,
        max_model_len: Some(100),
        max_num_seqs: 3,
        block_size: 8,
        max_num_batched_tokens: 64,
        draft_tokens: u32::from(config.mtp_layers > 0),
        kv_cache: KvCacheDtype::Auto,
        capacity_bytes: None,
    }
}

#[test]
fn each_rank_holds_what_the_plan_says() {
    for (model, counts) in SHARED {
        for quantization in [Quantization::None, Quantization::Int8, Quantization::Int4] {
            let config = read_config(&folder(model)).unwrap();
            let whole = memory_plan(&config, &request(&config, 1, quantization)).unwrap();
            for count in counts {
                let request = request(&config, *count, quantization);
                let plan = memory_plan(&config, &request).unwrap();
                let load = files(model, CpuLimits::from_plan(&plan, 3, 64));
                let ranks = Ranks::start(*count, &load);
                let name = format!("{model}, {quantization}, {count} ranks");
                for (rank, held) in ranks.held.iter().enumerate() {
                    let planned = plan.per_rank;
                    assert_eq!(held.kv, planned.kv_bytes, "{name}");
                    let logits =
                        request.max_num_seqs * (1 + request.draft_tokens) * config.vocab_size;
                    assert!(
                        held.workspace + u64::from(logits) * 4 <= planned.workspace_bytes,
                        "{name}"
                    );
                    // The first rank has the largest share.
                    assert!(held.weights <= planned.weights_bytes, "{name}");
                    assert!(rank > 0 || held.weights == planned.weights_bytes, "{name}");
                }
                assert!(
                    plan.per_rank.weights_bytes < whole.per_rank.weights_bytes,
                    "{name}"
                );
                ranks.end();
            }
        }
    }
}
