//! The plan itself: weights, KV cache, workspace and runtime of each rank.

use std::fmt;

use engine_spec::engine_config::MAX_MODEL_LEN_DEFAULT;
use engine_spec::{
    AttentionConfig, Device, Dtype, EngineConfig, KvCacheDtype, ModelConfig, Parallelism,
    Quantization,
};
use serde::{Deserialize, Serialize};

use crate::device::{StepBounds, device_workspace};
use crate::misfit::{Misfit, Nearest};
use crate::weights::{ResidentDtype, prediction_bytes, resident_dtype, weight_bytes_per_rank};
use crate::workspace::workspace;

/// Code, tokenizer, HTTP buffers and thread stacks of an engine process on the CPU.
const RUNTIME_CPU_BYTES: u64 = 96 << 20;
/// Driver context, module images and graph pools on each GPU; an estimate until measured there.
const RUNTIME_NVIDIA_BYTES: u64 = 1 << 30;
/// Communicator buffers when more than one rank works together; an estimate until measured.
const RUNTIME_COLLECTIVES_BYTES: u64 = 1 << 30;

/// Latents of a cached token that share a scale in eight bits.
const KV_GROUP: u32 = 128;
/// Latent and rotated key of the rows that the GPU keeps in eight bits.
const FP8_CACHE_WIDTHS: (u32, u32) = (512, 64);

/// Everything about a deployment that decides its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRequest {
    /// Arithmetic asked for.
    pub dtype: Dtype,
    /// Integers that the large matrices are made into at load.
    pub quantization: Quantization,
    /// Ranks of one replica.
    pub parallelism: Parallelism,
    /// Kind of device.
    pub device: Device,
    /// Longest prompt plus answer; absent = the model's own, at most 8192.
    pub max_model_len: Option<u32>,
    /// Sequences in one batch.
    pub max_num_seqs: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// Tokens per step.
    pub max_num_batched_tokens: u32,
    /// What keys and values are kept as.
    pub kv_cache: KvCacheDtype,
    /// Tokens that the prediction layer drafts for a sequence in a step; 0 leaves the layer out.
    pub draft_tokens: u32,
    /// Bytes of one device that may be used; absent = as many as are wanted.
    pub capacity_bytes: Option<u64>,
}

impl MemoryRequest {
    /// The request that an engine's configuration stands for.
    pub fn from_engine_config(config: &EngineConfig, capacity_bytes: Option<u64>) -> Self {
        Self {
            dtype: config.dtype,
            quantization: config.quantization,
            parallelism: config.parallelism,
            device: config.device,
            max_model_len: config.max_model_len,
            max_num_seqs: config.max_num_seqs,
            block_size: config.block_size,
            max_num_batched_tokens: config.max_num_batched_tokens,
            kv_cache: config.kv_cache_dtype,
            draft_tokens: config.num_speculative_tokens,
            capacity_bytes,
        }
    }
}

/// Bytes on the fullest rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RankBytes {
    /// Weights as served.
    pub weights_bytes: u64,
    /// The KV cache, all blocks.
    pub kv_bytes: u64,
    /// Activations and logits.
    pub workspace_bytes: u64,
    /// The process itself, the driver's context, communicators.
    pub runtime_bytes: u64,
}

impl RankBytes {
    /// Sum of all parts.
    pub fn total(&self) -> u64 {
        let Self {
            weights_bytes,
            kv_bytes,
            workspace_bytes,
            runtime_bytes,
        } = self;
        // A cache of absurd size may fill a u64 by itself.
        [*kv_bytes, *workspace_bytes, *runtime_bytes]
            .into_iter()
            .fold(*weights_bytes, u64::saturating_add)
    }
}

/// What one replica will hold in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryPlan {
    /// The fullest rank.
    pub per_rank: RankBytes,
    /// Devices of one replica.
    pub ranks: u32,
    /// Dtype of weights and cache while serving.
    pub resident: ResidentDtype,
    /// Longest prompt plus answer, tokens.
    pub max_model_len: u32,
    /// Tokens per KV block.
    pub block_size: u32,
    /// KV blocks on each rank.
    pub kv_blocks: u32,
    /// Tokens the cache holds.
    pub kv_tokens: u64,
    /// Bytes of one cached token on one rank, all layers.
    pub kv_bytes_per_token: u64,
    /// What keys and values are kept as.
    #[serde(default, skip_serializing_if = "KvCacheDtype::is_auto")]
    pub kv_cache: KvCacheDtype,
    /// Tokens that the prediction layer drafts for a sequence in a step; 0 when it is left out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub draft_tokens: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl MemoryPlan {
    /// The same plan with fewer blocks, for ranks of which one has less room; never more than it has.
    pub fn with_kv_blocks(self, blocks: u32) -> Self {
        let kv_blocks = blocks.min(self.kv_blocks);
        let kv_tokens = u64::from(kv_blocks) * u64::from(self.block_size);
        Self {
            per_rank: RankBytes {
                kv_bytes: kv_tokens.saturating_mul(self.kv_bytes_per_token),
                ..self.per_rank
            },
            kv_blocks,
            kv_tokens,
            ..self
        }
    }

    /// Bytes of the fullest rank.
    pub fn total_bytes(&self) -> u64 {
        self.per_rank.total()
    }

    /// Sequences of the longest context that the cache holds at once.
    pub fn full_sequences(&self) -> u64 {
        self.kv_tokens / u64::from(self.max_model_len)
    }
}

/// The context that a deployment serves.
///
/// # Errors
/// When more is asked for than the model is declared for.
pub fn resolve_max_model_len(config: &ModelConfig, asked: Option<u32>) -> Result<u32, Misfit> {
    match asked {
        None => Ok(config.max_positions.min(MAX_MODEL_LEN_DEFAULT)),
        Some(requested) if requested > config.max_positions => Err(Misfit::ContextTooLong {
            requested,
            max_positions: config.max_positions,
        }),
        Some(requested) => Ok(requested),
    }
}

/// Plans the memory of one replica.
///
/// The KV cache gets room for `max_num_seqs` sequences of the longest context, or what the capacity
/// leaves, but never less than one such sequence.
///
/// # Errors
/// [`Misfit`] with the numbers and the nearest settings that fit.
pub fn memory_plan(config: &ModelConfig, request: &MemoryRequest) -> Result<MemoryPlan, Misfit> {
    let max_model_len = resolve_max_model_len(config, request.max_model_len)?;
    check_parallelism(config, request.parallelism)?;
    if (request.dtype, request.device) == (Dtype::Float32, Device::Nvidia) {
        return Err(Misfit::NoArithmetic);
    }
    check_blocks(config, request)?;
    check_drafts(config, request)?;
    check_kv_cache(config, request)?;
    if config.packed.is_some() && request.device == Device::Nvidia {
        return Err(Misfit::Packed);
    }
    if request.quantization != Quantization::None && request.device == Device::Nvidia {
        return Err(Misfit::NoIntegers(request.quantization));
    }
    let fixed = fixed_bytes(config, request, max_model_len);
    let block_bytes = u64::from(request.block_size) * kv_bytes_per_token(config, request);
    let blocks_per_sequence = u64::from(max_model_len.div_ceil(request.block_size));
    let blocks_wanted = blocks_per_sequence * u64::from(request.max_num_seqs);
    let blocks = match request.capacity_bytes {
        None => blocks_wanted,
        Some(capacity) => {
            let left = capacity.saturating_sub(fixed.total());
            let blocks = (left / block_bytes).min(blocks_wanted);
            if blocks < blocks_per_sequence {
                let kv_bytes = blocks_per_sequence.saturating_mul(block_bytes);
                return Err(does_not_fit(config, request, fixed, kv_bytes, capacity));
            }
            blocks
        }
    };
    let kv_blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
    Ok(MemoryPlan {
        per_rank: RankBytes {
            kv_bytes: u64::from(kv_blocks).saturating_mul(block_bytes),
            ..fixed
        },
        ranks: request.parallelism.ranks(),
        resident: resident(config, request),
        max_model_len,
        block_size: request.block_size,
        kv_blocks,
        kv_tokens: u64::from(kv_blocks) * u64::from(request.block_size),
        kv_bytes_per_token: block_bytes / u64::from(request.block_size),
        kv_cache: request.kv_cache,
        draft_tokens: request.draft_tokens,
    })
}

fn resident(config: &ModelConfig, request: &MemoryRequest) -> ResidentDtype {
    let MemoryRequest {
        dtype,
        quantization,
        device,
        ..
    } = *request;
    resident_dtype(dtype, quantization, config, device)
}

/// All parts but the KV cache.
fn fixed_bytes(config: &ModelConfig, request: &MemoryRequest, max_model_len: u32) -> RankBytes {
    let dtype = resident(config, request);
    let runtime_bytes = match (request.device, request.parallelism.ranks()) {
        (Device::Cpu, _) => RUNTIME_CPU_BYTES,
        (Device::Nvidia, 1) => RUNTIME_NVIDIA_BYTES,
        (Device::Nvidia, _) => RUNTIME_NVIDIA_BYTES + RUNTIME_COLLECTIVES_BYTES,
    };
    let workspace_bytes = match request.device {
        Device::Cpu => workspace(
            config,
            request.parallelism,
            request.max_num_seqs,
            request.max_num_batched_tokens,
            request.draft_tokens,
        )
        .bytes(),
        Device::Nvidia => device_workspace(
            config,
            dtype,
            request.parallelism,
            StepBounds {
                max_model_len,
                max_num_seqs: request.max_num_seqs,
                max_num_batched_tokens: request.max_num_batched_tokens,
                block_size: request.block_size,
                draft_tokens: request.draft_tokens,
            },
        )
        .bytes(),
    };
    let drafting = match request.draft_tokens {
        0 => 0,
        _ => prediction_bytes(config, dtype, request.device, request.parallelism),
    };
    RankBytes {
        weights_bytes: weight_bytes_per_rank(config, dtype, request.device, request.parallelism)
            + drafting,
        kv_bytes: 0,
        workspace_bytes,
        runtime_bytes,
    }
}

/// Bytes of one cached token on the fullest rank: of each layer, a prediction layer included, the latent and the
/// rotated key, or the keys and values of the rank's heads.
fn kv_bytes_per_token(config: &ModelConfig, request: &MemoryRequest) -> u64 {
    let dtype = resident(config, request);
    let tensor = request.parallelism.tensor;
    let of_layer = match (&config.attention, request.kv_cache) {
        (AttentionConfig::Latent(mla), KvCacheDtype::Fp8) => {
            let (codes, rotated) = (mla.kv_lora_rank, mla.cached_width() - mla.kv_lora_rank);
            u64::from(codes + 4 * codes.div_ceil(KV_GROUP) + 2 * rotated)
        }
        (AttentionConfig::Latent(mla), KvCacheDtype::Auto) => {
            u64::from(mla.cached_width()) * dtype.kv_bytes()
        }
        (AttentionConfig::Grouped(gqa), _) => {
            u64::from(2 * gqa.kv_heads_per_rank(tensor) * gqa.head_dim) * dtype.kv_bytes()
        }
    };
    let layers = config.layers + u32::from(request.draft_tokens > 0);
    u64::from(layers) * of_layer
}

/// Only the GPU has kernels for a cache in eight bits, and for the published shape alone.
fn check_kv_cache(config: &ModelConfig, request: &MemoryRequest) -> Result<(), Misfit> {
    let why = match (request.kv_cache, request.device, &config.attention) {
        (KvCacheDtype::Auto, ..) => return Ok(()),
        (KvCacheDtype::Fp8, Device::Cpu, _) => "this is the device cpu",
        (KvCacheDtype::Fp8, Device::Nvidia, AttentionConfig::Grouped(_)) => {
            "this model caches keys and values of heads"
        }
        (KvCacheDtype::Fp8, Device::Nvidia, AttentionConfig::Latent(mla)) => {
            let rotated = mla.cached_width() - mla.kv_lora_rank;
            if (mla.kv_lora_rank, rotated) == FP8_CACHE_WIDTHS {
                return Ok(());
            }
            "this model has other widths"
        }
    };
    Err(Misfit::NoFp8Cache(why))
}

/// Ranks share FP8 matrices by whole blocks: a part of a block would have its scale on two of them.
fn check_blocks(config: &ModelConfig, request: &MemoryRequest) -> Result<(), Misfit> {
    let ResidentDtype::Float8E4m3(blocks) = resident(config, request) else {
        return Ok(());
    };
    let tensor = request.parallelism.tensor;
    let refused = |reason: String| Misfit::Indivisible {
        axis: "tensor",
        found: tensor,
        reason,
    };
    let shared = config.moe.as_ref().map_or(0, |moe| {
        moe.shared_experts.saturating_mul(moe.intermediate_size)
    });
    let dense = match config.moe_layers() < config.layers {
        true => config.intermediate_size,
        false => 0,
    };
    let rows = [
        ("hidden width's", config.hidden_size),
        ("dense layers'", dense),
        ("shared experts'", shared),
    ];
    let few = |(_, rows): &&(&str, u32)| *rows > 0 && rows / blocks.rows < tensor;
    if let Some((whose, rows)) = rows.iter().find(few).filter(|_| tensor > 1) {
        return Err(refused(format!(
            "leaves a rank less than a block of {} of the {whose} {rows} rows, and an FP8 block has one scale",
            blocks.rows
        )));
    }
    let heads = config.attention.heads() / tensor.max(1);
    let widths = match &config.attention {
        AttentionConfig::Latent(a) => [heads * a.qk_head_dim(), 0],
        AttentionConfig::Grouped(a) => [heads, a.kv_heads_per_rank(tensor)].map(|n| n * a.head_dim),
    };
    let cut = widths.iter().find(|rows| !rows.is_multiple_of(blocks.rows));
    match cut.filter(|_| tensor > 1) {
        Some(rows) => Err(refused(format!(
            "gives a rank {rows} rows of heads, which are no whole blocks of {}, and an FP8 block has one scale",
            blocks.rows
        ))),
        None => Ok(()),
    }
}

fn check_drafts(config: &ModelConfig, request: &MemoryRequest) -> Result<(), Misfit> {
    if request.draft_tokens == 0 {
        return Ok(());
    }
    if !config.can_predict() {
        return Err(Misfit::NoPredictionLayer(config.architecture));
    }
    Ok(())
}

/// Ranks hold a part of every layer, and whole experts.
fn check_parallelism(config: &ModelConfig, parallelism: Parallelism) -> Result<(), Misfit> {
    let Parallelism {
        tensor,
        expert,
        pipeline,
    } = parallelism;
    let indivisible = |axis, found, reason: String| {
        Err(Misfit::Indivisible {
            axis,
            found,
            reason,
        })
    };
    let heads = config.attention.heads();
    if tensor == 0 || !heads.is_multiple_of(tensor) {
        return indivisible(
            "tensor",
            tensor,
            format!("must divide the model's {heads} heads"),
        );
    }
    if let AttentionConfig::Grouped(gqa) = &config.attention
        && !gqa.kv_heads.is_multiple_of(tensor)
        && !tensor.is_multiple_of(gqa.kv_heads)
    {
        let reason = format!(
            "must divide the model's {} key-value heads or be a multiple of them",
            gqa.kv_heads
        );
        return indivisible("tensor", tensor, reason);
    }
    match &config.moe {
        None if expert != 1 => {
            return indivisible(
                "expert",
                expert,
                "must be 1: the model has no experts".into(),
            );
        }
        Some(moe) if expert == 0 || !moe.routed_experts.is_multiple_of(expert) => {
            let reason = format!(
                "must divide the model's {} routed experts",
                moe.routed_experts
            );
            return indivisible("expert", expert, reason);
        }
        Some(_) if expert != tensor => {
            let reason = format!("must be equal to tensor ({tensor}): ranks hold whole experts");
            return indivisible("expert", expert, reason);
        }
        _ => {}
    }
    if pipeline != 1 {
        let reason = "must be 1: ranks hold a part of every layer".to_owned();
        return indivisible("pipeline", pipeline, reason);
    }
    Ok(())
}

fn does_not_fit(
    config: &ModelConfig,
    request: &MemoryRequest,
    fixed: RankBytes,
    kv_bytes: u64,
    capacity_bytes: u64,
) -> Misfit {
    Misfit::DoesNotFit {
        needed_bytes: fixed.total().saturating_add(kv_bytes),
        capacity_bytes,
        weights_bytes: fixed.weights_bytes,
        kv_bytes,
        workspace_bytes: fixed.workspace_bytes,
        runtime_bytes: fixed.runtime_bytes,
        parallelism: request.parallelism,
        nearest: nearest(config, request, fixed, capacity_bytes),
    }
}

fn nearest(
    config: &ModelConfig,
    request: &MemoryRequest,
    fixed: RankBytes,
    capacity: u64,
) -> Nearest {
    let block_bytes = u64::from(request.block_size) * kv_bytes_per_token(config, request);
    let blocks = capacity.saturating_sub(fixed.total()) / block_bytes;
    let tokens = u32::try_from(blocks * u64::from(request.block_size)).unwrap_or(u32::MAX);
    let max_model_len = (tokens >= 2).then(|| tokens.min(config.max_positions));
    // Each of these asks the plan itself, so that advice and verdict cannot disagree.
    let fits = |changed: MemoryRequest| memory_plan_fits(config, &changed);
    let max_num_batched_tokens =
        std::iter::successors(Some(request.max_num_batched_tokens / 2), |n| {
            (*n > 1).then_some(n / 2)
        })
        .take_while(|n| *n >= request.max_num_seqs)
        .find(|n| {
            fits(MemoryRequest {
                max_num_batched_tokens: *n,
                ..*request
            })
        });
    let tensor = std::iter::successors(Some(request.parallelism.tensor * 2), |n| Some(n * 2))
        .take_while(|n| *n <= config.attention.heads().min(64))
        .find(|n| {
            let expert = if config.moe.is_some() { *n } else { 1 };
            fits(MemoryRequest {
                parallelism: Parallelism {
                    tensor: *n,
                    expert,
                    ..request.parallelism
                },
                ..*request
            })
        });
    Nearest {
        max_model_len,
        max_num_batched_tokens,
        tensor,
    }
}

/// Like [`memory_plan`] but without advice, which would recurse.
fn memory_plan_fits(config: &ModelConfig, request: &MemoryRequest) -> bool {
    let Ok(max_model_len) = resolve_max_model_len(config, request.max_model_len) else {
        return false;
    };
    if check_parallelism(config, request.parallelism).is_err()
        || check_blocks(config, request).is_err()
        || check_drafts(config, request).is_err()
    {
        return false;
    }
    let blocks = u64::from(max_model_len.div_ceil(request.block_size));
    let kv = blocks * u64::from(request.block_size) * kv_bytes_per_token(config, request);
    let needed = fixed_bytes(config, request, max_model_len).total() + kv;
    request
        .capacity_bytes
        .is_none_or(|capacity| needed <= capacity)
}

/// Bytes as a person reads them: GiB from one GiB up, else MiB.
pub(crate) fn gib(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 {
        format!("{gib:.1} GiB")
    } else {
        format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RankBytes {
            weights_bytes,
            kv_bytes,
            workspace_bytes,
            runtime_bytes,
        } = self.per_rank;
        let rows = [
            ("weights", weights_bytes),
            ("KV cache", kv_bytes),
            ("workspace", workspace_bytes),
            ("runtime", runtime_bytes),
            ("total", self.total_bytes()),
        ];
        writeln!(f, "per device, {} device(s) per replica", self.ranks)?;
        for (name, bytes) in rows {
            writeln!(f, "  {name:<10} {:>12}  {bytes:>16} bytes", gib(bytes))?;
        }
        write!(
            f,
            "KV cache: {} blocks of {} tokens = {} tokens, {} full contexts of {} tokens, {} bytes per token",
            self.kv_blocks,
            self.block_size,
            self.kv_tokens,
            self.full_sequences(),
            self.max_model_len,
            self.kv_bytes_per_token,
        )
    }
}
