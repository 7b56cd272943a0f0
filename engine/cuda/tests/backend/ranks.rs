//! Ranks that share a model, each on a GPU of its own, give the bytes that one GPU alone gives.

use std::sync::Arc;
use std::thread;

use crate::support::{PATIENCE, entry, free_address, golden, gpu, limits, random_model, request};
use engine_core::{
    Batch, BatchEntry, DraftBatch, Executor, Logits, PickRow, Picked, SamplingParameters, TokenId,
};
use engine_cuda::{
    AllocatedBytes, CudaExecutor, CudaLimits, ExchangeChoice, Gpu, ProductChoice, Products,
};
use engine_group::{Alone, Command, Follower, LeadingExecutor, Next, ProcessGroup};
use engine_load::{LoadError, Progress, read_config};
use engine_memory::{ResidentDtype, memory_plan, resident_dtype};
use engine_spec::{Device, Dtype, ModelConfig, Parallelism, Quantization};

/// Latent attention with full and with low-rank queries, routed and shared experts, heads that are shared out and key-value
/// heads that are copied, a tied head, shares of unequal width.
const SHARED: [(&str, &[u32]); 6] = [
    ("v2-cuda", &[2, 4]),
    ("v3-mtp-cuda", &[2, 4]),
    ("llama-cuda", &[2, 4]),
    ("qwen2-cuda", &[3]),
    ("qwen3-cuda", &[5]),
    ("qwen3-moe-cuda", &[2, 4]),
];

/// The ways that ranks exchange.
const WAYS: [ExchangeChoice; 2] = [ExchangeChoice::Host, ExchangeChoice::Nccl];

/// Loads a rank's share.
type Load = Arc<dyn Fn(Arc<dyn ProcessGroup>) -> CudaExecutor + Send + Sync>;

/// Ranks of a model on threads; rank 0 leads them.
struct Ranks {
    leader: LeadingExecutor,
    group: Arc<dyn ProcessGroup>,
    followers: Vec<thread::JoinHandle<Result<(), String>>>,
    held: Vec<AllocatedBytes>,
}

impl Ranks {
    fn start(count: u32, load: &Load) -> Self {
        let leader = free_address();
        let (sender, receiver) = std::sync::mpsc::channel();
        let followers = (1..count).map(|index| {
            let (leader, load, sender) = (leader.clone(), load.clone(), sender.clone());
            thread::spawn(move || {
                let group = crate::support::rank_of_group(&leader, index, count, PATIENCE);
                let executor = load(group.clone());
                sender.send(executor.allocated_bytes()).unwrap();
                let mut follower = Follower::new(Box::new(executor), group, PATIENCE);
                loop {
                    match follower.next(PATIENCE)? {
                        Next::Wait => {}
                        Next::Step(_) => follower.execute()?,
                        Next::End => return Ok(()),
                    }
                }
            })
        });
        let followers = followers.collect();
        let group = crate::support::rank_of_group(&leader, 0, count, PATIENCE);
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
        self.group.broadcast(&Command::End.encode()).unwrap();
        for follower in self.followers {
            follower.join().unwrap().unwrap();
        }
    }
}

fn files(model: &str, limits: CudaLimits, way: ExchangeChoice) -> Load {
    let dir = random_model(model);
    let config = read_config(&dir).unwrap();
    Arc::new(move |group| {
        let progress = Progress::default();
        let gpu = gpu().unwrap().with_exchange(way, crate::support::nccl());
        CudaExecutor::load_share(&gpu, &dir, &config, limits, group, &progress).unwrap()
    })
}

/// A model of other sizes, with random weights.
fn random(model: &str, sizes: &[(&str, u32)], products: Products, way: ExchangeChoice) -> Load {
    let text = std::fs::read_to_string(random_model(model).join("config.json")).unwrap();
    let mut text: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (name, size) in sizes {
        text[name] = (*size).into();
    }
    let config = ModelConfig::from_hf_json(&text.to_string()).unwrap();
    let resident = resident_dtype(Dtype::Auto, Quantization::None, &config, Device::Nvidia);
    let limits = limits(resident);
    Arc::new(move |group| {
        let choice = ProductChoice::Fixed(products);
        let gpu = Gpu::with_products(crate::support::device().unwrap(), choice).unwrap();
        let gpu = gpu.with_exchange(way, crate::support::nccl());
        let progress = Progress::default();
        CudaExecutor::dummy_share(&gpu, &config, 5, limits, group, &progress).unwrap()
    })
}

fn limits_of(model: &str) -> CudaLimits {
    let config = read_config(&random_model(model)).unwrap();
    let resident = resident_dtype(Dtype::Auto, Quantization::None, &config, Device::Nvidia);
    limits(resident)
}

fn prompt(model: &str) -> Vec<u32> {
    let prompts = golden(&random_model(model).join("golden.json")).prompts;
    let longest = prompts.into_iter().max_by_key(|p| p.tokens.len()).unwrap();
    longest.tokens
}

fn rows(logits: &Logits) -> Vec<Vec<u32>> {
    (0..logits.rows())
        .map(|row| crate::support::bits(logits.row(row)))
        .collect()
}

fn bits(executor: &mut dyn Executor, entries: Vec<BatchEntry>) -> Vec<Vec<u32>> {
    let mut logits = Logits::default();
    executor.execute(&Batch { entries }, &mut logits).unwrap();
    rows(&logits)
}

/// A prefill in chunks beside a short prompt, then a step that decodes one and prefills the other, then decodes.
fn conversation(executor: &mut dyn Executor, tokens: &[u32]) -> Vec<Vec<u32>> {
    let blocks: Vec<u32> = (0..30).collect();
    let others: Vec<u32> = (30..60).rev().collect();
    let half = tokens.len() / 2;
    let mut silent = entry(1, &tokens[..half], 0, &blocks);
    silent.wants_logits = false;
    let mut seen = bits(executor, vec![silent, entry(2, &tokens[..3], 0, &others)]);
    let rest = entry(1, &tokens[half..], half, &blocks);
    seen.extend(bits(executor, vec![entry(2, &[7], 3, &others), rest]));
    for step in 0..2 {
        let (one, other) = (tokens.len() + step, 4 + step);
        let next = [entry(1, &[9], one, &blocks), entry(2, &[3], other, &others)];
        seen.extend(bits(executor, next.into()));
    }
    seen
}

#[test]
fn two_and_four_gpus_give_the_bytes_of_one() {
    if gpu().is_none() {
        return;
    }
    for (model, counts) in SHARED {
        let tokens = prompt(model);
        let load = |way| files(model, limits_of(model), way);
        let expected = conversation(&mut load(WAYS[0])(Arc::new(Alone)), &tokens);
        assert!(expected.iter().flatten().any(|bits| *bits != 0));
        for (count, way) in counts.iter().flat_map(|count| WAYS.map(|way| (count, way))) {
            let mut ranks = Ranks::start(*count, &load(way));
            let found = conversation(&mut ranks.leader, &tokens);
            assert_eq!(found, expected, "{model}, {count} ranks over {way}");
            ranks.leader.idle().unwrap();
            ranks.end();
        }
    }
}

/// As the engine drafts: the prediction layer over a step's rows, then over what it left.
fn drafts(executor: &mut dyn Executor, tokens: &[u32]) -> Vec<Vec<u32>> {
    let blocks: Vec<u32> = (0..32).collect();
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
fn gpus_draft_the_bytes_of_one() {
    if gpu().is_none() {
        return;
    }
    const MODEL: &str = "v3-mtp-cuda";
    let limits = CudaLimits {
        draft_tokens: 2,
        ..limits(ResidentDtype::Bfloat16)
    };
    let tokens = prompt(MODEL);
    let load = |way| files(MODEL, limits, way);
    let expected = drafts(&mut load(WAYS[0])(Arc::new(Alone)), &tokens);
    assert_eq!(expected.len(), 1 + 1 + 1 + 3);
    for way in WAYS {
        let mut ranks = Ranks::start(2, &load(way));
        assert_eq!(drafts(&mut ranks.leader, &tokens), expected, "{way}");
        ranks.end();
    }
}

/// Codes and their scales are exchanged. Two ranks have whole blocks of these widths.
#[test]
fn fp8_products_of_shares_are_those_of_the_whole() {
    if gpu().is_none() {
        return;
    }
    let tokens: Vec<u32> = (3..15).collect();
    for products in [Products::Portable, Products::Hopper] {
        let sizes = [("moe_intermediate_size", 256)];
        let load = |way| random("v3-fp8-cuda", &sizes, products, way);
        let mut alone = load(WAYS[0])(Arc::new(Alone));
        let resident = alone.limits().resident;
        assert!(matches!(resident, ResidentDtype::Float8E4m3(_)));
        let expected = conversation(&mut alone, &tokens);
        for way in WAYS {
            let mut ranks = Ranks::start(2, &load(way));
            let found = conversation(&mut ranks.leader, &tokens);
            assert_eq!(found, expected, "{products}, {way}");
            ranks.end();
        }
    }
}

/// Which bytes a Hopper product has depends on how k is cut, and that on the rows of the whole matrix: of this head all
/// fill the device with k in one piece, half of them do not.
#[test]
fn hopper_products_of_shares_are_cut_as_the_whole_is() {
    if gpu().is_none() {
        return;
    }
    let sizes = [
        ("hidden_size", 1024),
        ("vocab_size", 133 * 128),
        ("num_hidden_layers", 1),
    ];
    let load = |way| random("llama-cuda", &sizes, Products::Hopper, way);
    let once = |executor: &mut dyn Executor| bits(executor, vec![entry(1, &[9], 0, &[0])]);
    let expected = once(&mut load(WAYS[0])(Arc::new(Alone)));
    for way in WAYS {
        let mut ranks = Ranks::start(2, &load(way));
        assert_eq!(once(&mut ranks.leader), expected, "{way}");
        ranks.end();
    }
}

#[test]
fn rank_0_picks_from_the_logits_of_all() {
    if gpu().is_none() {
        return;
    }
    const MODEL: &str = "llama-cuda";
    let tokens = prompt(MODEL);
    let load = |way| files(MODEL, limits_of(MODEL), way);
    let pick = |executor: &mut dyn Executor| -> Vec<Picked> {
        let blocks: Vec<u32> = (0..30).collect();
        let batch = Batch {
            entries: vec![entry(1, &tokens, 0, &blocks)],
        };
        let picker = executor.picker().unwrap();
        picker.compute(&batch).unwrap();
        let known: Vec<_> = tokens.iter().map(|t| TokenId(*t)).collect();
        let parameters = SamplingParameters {
            temperature: 1.5,
            seed: 9,
            ..SamplingParameters::default()
        };
        let row = PickRow {
            row: 0,
            parameters: &parameters,
            tokens: &known,
            drafts: &[],
            prompt_len: known.len(),
            choice: 0,
            allowed: None,
            logprobs: Some(4),
        };
        let mut picked = Vec::new();
        picker.pick(&[row], &mut picked).unwrap();
        picked
    };
    let expected = pick(&mut load(WAYS[0])(Arc::new(Alone)));
    for way in WAYS {
        let mut ranks = Ranks::start(2, &load(way));
        assert_eq!(pick(&mut ranks.leader), expected, "{way}");
        ranks.end();
    }
}

#[test]
fn each_rank_holds_what_the_plan_says() {
    if gpu().is_none() {
        return;
    }
    for (model, counts) in SHARED {
        let config = read_config(&random_model(model)).unwrap();
        for count in counts {
            let request = engine_memory::MemoryRequest {
                parallelism: Parallelism {
                    tensor: *count,
                    expert: config.moe.as_ref().map_or(1, |_| *count),
                    pipeline: 1,
                },
                max_model_len: Some(64),
                ..request(Dtype::Auto)
            };
            let plan = memory_plan(&config, &request).unwrap();
            let limits = CudaLimits::from_plan(&config, &plan, 4, 64);
            let ranks = Ranks::start(*count, &files(model, limits, ExchangeChoice::Auto));
            let planned = plan.per_rank;
            for (rank, held) in ranks.held.iter().enumerate() {
                let name = format!("{model}, rank {rank} of {count}");
                let pairs = [
                    (held.kv, planned.kv_bytes),
                    (held.workspace, planned.workspace_bytes),
                    (held.weights, planned.weights_bytes),
                ];
                // Small pieces are mostly what they are aligned to.
                for (used, planned) in pairs {
                    assert!(
                        used as f64 <= planned as f64 * 1.03 + 65_536.0,
                        "{name}: {used} of {planned}"
                    );
                }
            }
            ranks.end();
        }
    }
}

#[test]
fn a_share_that_cuts_an_fp8_block_is_refused_with_the_way_out() {
    let Some(gpu) = gpu() else { return };
    let dir = random_model("v3-fp8-cuda");
    let config = read_config(&dir).unwrap();
    let leader = free_address();
    let other = {
        let leader = leader.clone();
        thread::spawn(move || {
            (1..4)
                .map(|index| {
                    let leader = leader.clone();
                    thread::spawn(move || {
                        crate::support::rank_of_group(&leader, index, 4, PATIENCE)
                    })
                })
                .collect::<Vec<_>>()
                .into_iter()
                .map(|t| t.join().unwrap())
                .collect::<Vec<_>>()
        })
    };
    let group = crate::support::rank_of_group(&leader, 0, 4, PATIENCE);
    let _others = other.join().unwrap();
    let progress = Progress::default();
    let refused = CudaExecutor::load_share(
        &gpu,
        &dir,
        &config,
        limits_of("v3-fp8-cuda"),
        group,
        &progress,
    );
    let Err(LoadError::Backend(message)) = refused else {
        panic!("it was loaded");
    };
    assert!(
        message.contains("whole FP8 blocks of 128 rows; share it among fewer ranks"),
        "{message}"
    );
}
