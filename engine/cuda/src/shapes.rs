//! Which shapes of a model the kernels take, asked before anything is allocated.

use engine_memory::{PICK_TOP_MAX, ResidentDtype};
use engine_model::{
    Attention, Gate, GatedMlp, GroupedAttention, LatentAttention, Layer, Mlp, Model, Query,
    TensorRole, WeightId,
};
use engine_spec::rank::{ROW_BLOCK, ROW_VECTOR};
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
    check_shares(model, matrices)?;
    let shape = |id: WeightId| match model.tensors[id.index()].shape.as_slice() {
        [n, k] => (*n, *k),
        _ => (0, 0),
    };
    let product = |id: WeightId| {
        let (n, k) = shape(id);
        plan::gemm(matrices, rows, n, k, 1)
    };
    let mut launches = vec![
        plan::embed(rows, hidden)?,
        plan::rms_norm(Format::Bf16, rows, hidden)?,
        plan::gemm(Format::Bf16, rows, shape(model.head).0, hidden, 1)?,
    ];
    let picked = rows.min(turn_rows(limits));
    launches.extend([
        plan::sample_adjust(picked, model.vocabulary)?,
        plan::sample(picked, model.vocabulary)?,
        plan::logprobs(picked, model.vocabulary, PICK_TOP_MAX as usize)?,
    ]);
    if let Some(prediction) = &model.prediction {
        // Its joining matrix is never FP8.
        let (n, k) = shape(prediction.join);
        launches.push(plan::gemm(Format::Bf16, rows, n, k, 1)?);
    }
    for layer in model.cached_layers() {
        match &layer.attention {
            Attention::Latent(attention) => {
                match &attention.query {
                    Query::Full(weight) => launches.push(product(*weight)?),
                    Query::LowRank { down, up, rank, .. } => launches.extend([
                        product(*down)?,
                        plan::rms_norm(Format::Bf16, rows, *rank)?,
                        product(*up)?,
                    ]),
                }
                launches.push(product(attention.kv_down)?);
                launches.push(product(attention.output)?);
                launches.extend(of_latent(attention, limits, rows)?);
            }
            Attention::Grouped(attention) => {
                launches.push(product(attention.query.weight)?);
                launches.push(product(attention.key.weight)?);
                launches.push(product(attention.output)?);
                launches.extend(of_grouped(attention, limits, rows)?);
            }
        }
        let dense = |mlp: &GatedMlp| -> Result<[Launch; 3], Unsupported> {
            Ok([
                plan::gemm(matrices, rows, 2 * mlp.held, hidden, 1)?,
                plan::activation(Activation::Swiglu(matrices), rows, mlp.held)?,
                product(mlp.down)?,
            ])
        };
        match &layer.mlp {
            Mlp::Dense(mlp) => launches.extend(dense(mlp)?),
            Mlp::Moe(moe) => {
                let inner = moe.experts.first().map_or(0, |mlp| mlp.inner);
                launches.extend(of_experts(&moe.gate, matrices, inner, hidden, rows)?);
                if let Some(shared) = &moe.shared {
                    launches.extend(dense(shared)?);
                }
            }
        }
        if matrices == Format::Fp8 {
            launches.push(plan::activation(Activation::Quantise, rows, hidden)?);
        }
    }
    Ok(launches)
}

/// Whether a rank's rows of every tensor begin and end where kernels store whole vectors, and where FP8 has a scale.
fn check_shares(model: &Model, matrices: Format) -> Result<(), Unsupported> {
    for spec in &model.tensors {
        let Some(share) = spec.share else {
            continue;
        };
        let end = share.first + spec.shape.first().copied().unwrap_or(0);
        let (unit, allowed) = match (matrices, spec.role) {
            (Format::Fp8, TensorRole::Matrix) => (
                ROW_BLOCK,
                "whole FP8 blocks of 128 rows; share it among fewer ranks",
            ),
            _ => (
                ROW_VECTOR,
                "multiples of 8; share it among another number of ranks",
            ),
        };
        let is_whole = |row: usize| row.is_multiple_of(unit) || row == share.of;
        if !is_whole(share.first) || !is_whole(end) {
            return Err(Unsupported {
                operation: "a rank's share of a matrix",
                field: "rows",
                value: end - share.first,
                allowed,
            });
        }
    }
    Ok(())
}

fn of_grouped(
    attention: &GroupedAttention,
    limits: &CudaLimits,
    rows: usize,
) -> Result<[Launch; 4], Unsupported> {
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
        plan::gqa_prefill(rows, heads, kv_heads, width, limits.splits_max())?,
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
