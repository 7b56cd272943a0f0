//! Models on the emulated driver, run the way the engine runs them.

// Not every test file uses every helper; a helper is no test, and may unwrap all the same.
#![allow(dead_code, clippy::unwrap_used)]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use engine_core::{Batch, BatchEntry, BlockId, Executor, Logits, SequenceId, TokenId};
use engine_cuda::{CudaExecutor, CudaLimits, Gpu, ProductChoice, Products};
use engine_group::{Joining, ProcessGroup, Terms, join};
use engine_load::{Progress, read_config};
use engine_memory::{MemoryPlan, MemoryRequest, ResidentDtype, memory_plan};
use engine_spec::{
    Device as Kind, Dtype, KvCacheDtype, ModelConfig, Parallelism, Quantization, Rank,
};
use kernels::driver::{Device, Driver, NCCL_LIBRARY};
use kernels::emulation::{BuildError, Emulation};
use serde::Deserialize;

/// Vectors made by `engine/cpu/tests/golden/make_golden.py`.
#[derive(Deserialize)]
pub struct Golden {
    pub prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
pub struct Prompt {
    pub tokens: Vec<u32>,
    pub positions: Vec<usize>,
    pub logits: Vec<Vec<f32>>,
    pub greedy: Vec<u32>,
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A model of the CPU backend's tests.
pub fn random_model(name: &str) -> PathBuf {
    root().join("engine/cpu/tests/golden").join(name)
}

/// The trained model of the quick start.
pub fn trained_model() -> PathBuf {
    root().join("e2e/models/tiny-r1")
}

pub fn golden(path: &Path) -> Golden {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

pub fn trained_golden() -> Golden {
    golden(&root().join("engine/cpu/tests/golden/tiny-r1.json"))
}

/// The driver under test: the emulated one, `KERNELS_DRIVER`, or none on a machine without a C++ compiler.
pub fn driver() -> Option<Arc<Driver>> {
    static DRIVER: OnceLock<Option<Arc<Driver>>> = OnceLock::new();
    DRIVER
        .get_or_init(|| {
            let path = match std::env::var_os("KERNELS_DRIVER") {
                Some(path) => PathBuf::from(path),
                // Where the kernels' own tests build it, so that it is built once.
                None => match Emulation::new(&build_folder()).build_with_nccl() {
                    Ok(path) => path,
                    Err(error @ (BuildError::NoCompiler | BuildError::WrongMachine)) => {
                        eprintln!("skipped: {error}");
                        return None;
                    }
                    Err(error) => panic!("the emulated driver does not build: {error}"),
                },
            };
            Some(Driver::load(Some(&path)).unwrap())
        })
        .clone()
}

/// NCCL beside it: the emulated one, or `KERNELS_NCCL`, or what the loader finds.
pub fn nccl() -> Option<PathBuf> {
    if std::env::var_os("KERNELS_DRIVER").is_some() {
        return std::env::var_os("KERNELS_NCCL").map(PathBuf::from);
    }
    let driver = Emulation::new(&build_folder()).build_with_nccl();
    Some(driver.ok()?.with_file_name(NCCL_LIBRARY))
}

pub fn build_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation")
}

/// A GPU with a context of its own: its faults are its own.
pub fn gpu() -> Option<Gpu> {
    Some(gpu_of(&device()?))
}

pub fn device() -> Option<Arc<Device>> {
    Some(Device::open_apart(&driver()?, 0).unwrap())
}

/// With the products that the first GPU of this process got: each would try them again, a second of the emulator's time.
pub fn gpu_of(device: &Arc<Device>) -> Gpu {
    static PRODUCTS: OnceLock<Products> = OnceLock::new();
    let products = *PRODUCTS.get_or_init(|| Gpu::over(device.clone()).unwrap().products());
    Gpu::with_products(device.clone(), ProductChoice::Fixed(products)).unwrap()
}

pub fn limits(resident: ResidentDtype) -> CudaLimits {
    CudaLimits {
        resident,
        kv_cache: KvCacheDtype::Auto,
        kv_blocks: 64,
        block_size: 8,
        model_len_max: 256,
        batched_tokens_max: 128,
        sequences_max: 6,
        draft_tokens: 0,
        parts_bytes: 1 << 20,
        graphs: true,
    }
}

pub fn plan(config: &ModelConfig, request: MemoryRequest) -> (MemoryPlan, CudaLimits) {
    let plan = memory_plan(config, &request).unwrap();
    let limits = CudaLimits::from_plan(
        config,
        &plan,
        request.max_num_seqs,
        request.max_num_batched_tokens,
    );
    (plan, limits)
}

pub fn request(dtype: Dtype) -> MemoryRequest {
    MemoryRequest {
        dtype,
        quantization: Quantization::None,
        parallelism: Parallelism::default(),
        device: Kind::Nvidia,
        max_model_len: Some(1024),
        max_num_seqs: 4,
        block_size: 16,
        max_num_batched_tokens: 64,
        kv_cache: KvCacheDtype::Auto,
        draft_tokens: 0,
        capacity_bytes: None,
    }
}

pub fn load(gpu: &Gpu, dir: &Path, limits: CudaLimits) -> CudaExecutor {
    let config = read_config(dir).unwrap();
    CudaExecutor::load(gpu, dir, &config, limits, &Progress::default()).unwrap()
}

/// One sequence's next tokens in the given blocks.
pub fn entry(sequence: u64, tokens: &[u32], start: usize, blocks: &[u32]) -> BatchEntry {
    BatchEntry {
        sequence: SequenceId(sequence),
        tokens: tokens.iter().map(|token| TokenId(*token)).collect(),
        start,
        blocks: blocks.iter().map(|block| BlockId(*block)).collect(),
        wants_logits: true,
        drafts: 0,
    }
}

/// Runs a batch and returns its logits rows.
pub fn step(executor: &mut dyn Executor, entries: Vec<BatchEntry>) -> Vec<Vec<f32>> {
    let mut logits = Logits::default();
    executor.execute(&Batch { entries }, &mut logits).unwrap();
    (0..logits.rows())
        .map(|row| logits.row(row).to_vec())
        .collect()
}

/// Logits after all of `tokens`, as one prefill from position 0.
pub fn prefill(executor: &mut dyn Executor, tokens: &[u32]) -> Vec<f32> {
    let blocks: Vec<u32> = (0..32).collect();
    step(executor, vec![entry(1, tokens, 0, &blocks)]).remove(0)
}

/// Greedy continuation of `tokens`, one decode step per token.
pub fn greedy(executor: &mut dyn Executor, tokens: &[u32], count: usize) -> Vec<u32> {
    let blocks: Vec<u32> = (0..32).collect();
    let mut row = prefill(executor, tokens);
    let mut found = Vec::new();
    while found.len() < count {
        let token = argmax(&row);
        found.push(token);
        let start = tokens.len() + found.len() - 1;
        if found.len() < count {
            row = step(executor, vec![entry(1, &[token], start, &blocks)]).remove(0);
        }
    }
    found
}

pub fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

pub fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|value| value.to_bits()).collect()
}

/// Largest difference, relative to the largest magnitude of the expected row.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected
        .iter()
        .fold(0f32, |scale, value| scale.max(value.abs()));
    let worst = found
        .iter()
        .zip(expected)
        .fold(0f32, |worst, (f, e)| worst.max((f - e).abs()));
    worst / scale
}

/// For ranks to come, and to answer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Joins the group whose rank 0 is at `leader`; the others count as gone after `timeout` without a word.
pub fn rank_of_group(
    leader: &str,
    index: u32,
    count: u32,
    timeout: Duration,
) -> Arc<dyn ProcessGroup> {
    let joining = Joining {
        rank: Rank::new(index, count).unwrap(),
        leader: leader.to_owned(),
        terms: Terms::default(),
        patience: PATIENCE,
        timeout,
        secret: None,
    };
    Arc::new(join(&joining).unwrap().0)
}

pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}
