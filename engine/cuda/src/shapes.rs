//! Which shapes of a model the kernels take, asked before anything is allocated.

use engine_memory::{PICK_TOP_MAX, ResidentDtype};
use engine_model::{Attention, Gate, GroupedAttention, LatentAttention, Layer, Mlp, Model, Query};
use engine_spec::{GateSelection, KvCacheDtype};
use kernels::plan::{self, Activation, Format, Launch, Unsupported};

use crate::layout::CudaLimits;
use crate::picking::turn_rows;

/// Values of one head's output while its context is in parts.
pub(crate) fn part_width(layer: &Layer) -> usize {
    match &layer.attention {
        Attention::Latent(attention) => attention.latent,
        Attention::Grouped(attention) => attention.width,
    }
}

/// Experts that are groups of one, or none at all, are one group to the kernel.
pub(crate) fn gate_groups(gate: &Gate) -> (usize, usize) {
    match gate.selection {
        GateSelection::Greedy => (1, 1),
        GateSelection::GroupLimitedGreedy | GateSelection::BiasedGroups => {
            (gate.groups, gate.groups_per_token)
        }
    }
}

/// Why a model is not served on the GPU, and the way out.
pub fn refusal(reason: &Unsupported) -> String {
    format!("no CUDA kernel takes this model: {reason}; serve it with the device cpu")
}

/// Every kernel that steps of `model` within `limits` may launch, each once with the most shared memory.
///
/// # Errors
/// The first shape that no kernel takes, with what the kernels take.
pub(crate) fn check_shapes(model: &Model, limits: &CudaLimits) -> Result<Vec<Launch>, Unsupported> {
    let mut launches: Vec<Launch> = Vec::new();
    // Kernels change at 16 and 32 rows, and the most rows bound the grid.
    for rows in [1, 17, limits.batched_tokens_max.max(33)] {
        for launch in of_step(model, limits, rows)? {
            match launches.iter_mut().find(|l| l.kernel == launch.kernel) {
                Some(known) => known.shared_bytes = known.shared_bytes.max(launch.shared_bytes),
                None => launches.push(launch),
            }
        }
    }
    Ok(launches)
}

fn of_step(model: &Model, limits: &CudaLimits, rows: usize) -> Result<Vec<Launch>, Unsupported> {
    let hidden = model.hidden;
    let matrices = match limits.resident {
        ResidentDtype::Float8E4m3(_) => Format::Fp8,
        // Integers are refused by the plan.
        ResidentDtype::Bfloat16 | ResidentDtype::Float32 | ResidentDtype::Integer(..) => {
            Format::Bf16
        }
    };
    let product = |n, k| plan::gemm(matrices, rows, n, k, 1);
    let mut launches = vec![
        plan::embed(rows, hidden)?,
        plan::rms_norm(Format::Bf16, rows, hidden)?,
        plan::gemm(Format::Bf16, rows, model.vocabulary, hidden, 1)?,
    ];
    let picked = rows.min(turn_rows(limits));
    launches.extend([
        plan::sample_adjust(picked, model.vocabulary)?,
        plan::sample(picked, model.vocabulary)?,
        plan::logprobs(picked, model.vocabulary, PICK_TOP_MAX as usize)?,
    ]);
    if model.prediction.is_some() {
        // Its joining matrix is never FP8.
        launches.push(plan::gemm(Format::Bf16, rows, hidden, 2 * hidden, 1)?);
    }
    for layer in model.cached_layers() {
        match &layer.attention {
            Attention::Latent(attention) => {
                let queries = attention.heads * attention.query_width();
                match &attention.query {
                    Query::Full(_) => launches.push(product(queries, hidden)?),
                    Query::LowRank { rank, .. } => launches.extend([
                        product(*rank, hidden)?,
                        plan::rms_norm(Format::Bf16, rows, *rank)?,
                        product(queries, *rank)?,
                    ]),
                }
                launches.push(product(attention.latent + attention.rope, hidden)?);
                launches.push(product(hidden, attention.heads * attention.value)?);
                launches.extend(of_latent(attention, limits, rows)?);
            }
            Attention::Grouped(attention) => {
                let (heads, kv_heads) = (attention.heads, attention.kv_heads);
                launches.push(product(heads * attention.width, hidden)?);
                launches.push(product(kv_heads * attention.width, hidden)?);
                launches.push(product(hidden, heads * attention.width)?);
                launches.extend(of_grouped(attention, limits, rows)?);
            }
        }
        let dense = |inner| -> Result<[Launch; 3], Unsupported> {
            Ok([
                product(2 * inner, hidden)?,
                plan::activation(Activation::Swiglu(matrices), rows, inner)?,
                product(hidden, inner)?,
            ])
        };
        match &layer.mlp {
            Mlp::Dense(mlp) => launches.extend(dense(mlp.inner)?),
            Mlp::Moe(moe) => {
                let inner = moe.experts.first().map_or(0, |mlp| mlp.inner);
                launches.extend(of_experts(&moe.gate, matrices, inner, hidden, rows)?);
                if let Some(shared) = &moe.shared {
                    launches.extend(dense(shared.inner)?);
                }
            }
        }
        if matrices == Format::Fp8 {
            launches.push(plan::activation(Activation::Quantise, rows, hidden)?);
        }
    }
    Ok(launches)
}

fn of_grouped(
    attention: &GroupedAttention,
    limits: &CudaLimits,
    rows: usize,
) -> Result<[Launch; 3], Unsupported> {
    let GroupedAttention {
        heads,
        kv_heads,
        width,
        ..
    } = *attention;
    if limits.kv_cache == KvCacheDtype::Fp8 {
        return Err(Unsupported {
            operation: "gqa_cache_write",
            field: "bits of a cached value",
            value: 8,
            allowed: "16",
        });
    }
    Ok([
        plan::gqa_cache_write(rows, heads, kv_heads, width)?,
        plan::gqa_decode(rows, heads, kv_heads, width, limits.splits_max())?,
        plan::mla_combine(rows, heads)?,
    ])
}

fn of_latent(
    attention: &LatentAttention,
    limits: &CudaLimits,
    rows: usize,
) -> Result<[Launch; 6], Unsupported> {
    let LatentAttention {
        heads,
        nope,
        rope,
        value,
        latent,
        ..
    } = *attention;
    let cache = match limits.kv_cache {
        KvCacheDtype::Auto => Format::Bf16,
        KvCacheDtype::Fp8 => Format::Fp8,
    };
    Ok([
        plan::rope(rows, heads, rope)?,
        plan::mla_cache_write(cache, rows, latent, rope)?,
        plan::gemm(Format::Bf16, rows, latent, nope, heads)?,
        plan::mla_decode(cache, rows, heads, latent, rope, limits.splits_max())?,
        plan::mla_combine(rows, heads)?,
        plan::gemm(Format::Bf16, rows, value, latent, heads)?,
    ])
}

fn of_experts(
    gate: &Gate,
    matrices: Format,
    inner: usize,
    hidden: usize,
    rows: usize,
) -> Result<[Launch; 7], Unsupported> {
    let (groups, kept) = gate_groups(gate);
    let chosen = rows * gate.top_k;
    Ok([
        plan::gemm(Format::Bf16, rows, gate.experts, hidden, 1)?,
        plan::gate(rows, gate.experts, gate.top_k, groups, kept)?,
        plan::permute(rows, gate.top_k, gate.experts)?,
        plan::grouped_gemm(matrices, chosen, 2 * inner, hidden, gate.experts)?,
        plan::activation(Activation::Swiglu(matrices), chosen, inner)?,
        plan::grouped_gemm(matrices, chosen, hidden, inner, gate.experts)?,
        plan::combine(rows, hidden)?,
    ])
}
