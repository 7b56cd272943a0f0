//! Where everything lies in the arena: pure arithmetic, so that it can be compared with the memory plan without a device.
//!
//! Order: weights, cache, activations. Gate and up of an MLP lie one after the other, and the experts of a layer in order,
//! because one product reads them as one matrix. Invariant: no two pieces overlap and every piece begins at 256 bytes.

use engine_memory::{EXCHANGE_BYTES, MemoryPlan, ResidentDtype, StepBounds, device_workspace};
use engine_model::{
    Attention, Drafting, GatedMlp, KvLayout, LatentAttention, Mlp, Model, Moe, RowShare, Slot,
    TensorRole, WeightId, build_share,
};
use engine_spec::{KvCacheDtype, ModelConfig, Parallelism, Rank};
use kernels::plan::{self, Format, QUANT_GROUP};

use crate::picking::PickSpans;
use crate::shapes::part_width;

/// What the driver aligns allocations to.
const ALIGNMENT: usize = 256;

/// Sizes that a backend allocates for, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaLimits {
    /// Dtype of weights.
    pub resident: ResidentDtype,
    /// What keys and values are kept as.
    pub kv_cache: KvCacheDtype,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Positions of a sequence.
    pub model_len_max: usize,
    /// Tokens of a step.
    pub batched_tokens_max: usize,
    /// Sequences of a step.
    pub sequences_max: usize,
    /// Drafts of a sequence in a step; 0 leaves the prediction layer out.
    pub draft_tokens: usize,
    /// Bytes for the parts of split contexts.
    pub parts_bytes: usize,
    /// Record decode steps once and replay them.
    pub graphs: bool,
}

impl CudaLimits {
    /// The limits of a plan.
    pub fn from_plan(
        config: &ModelConfig,
        plan: &MemoryPlan,
        max_num_seqs: u32,
        max_num_batched_tokens: u32,
    ) -> Self {
        let bounds = StepBounds {
            max_model_len: plan.max_model_len,
            max_num_seqs,
            max_num_batched_tokens,
            block_size: plan.block_size,
            draft_tokens: plan.draft_tokens,
        };
        let parallelism = Parallelism {
            tensor: plan.ranks,
            ..Parallelism::default()
        };
        let workspace = device_workspace(config, plan.resident, parallelism, bounds);
        Self {
            resident: plan.resident,
            kv_cache: plan.kv_cache,
            kv_blocks: plan.kv_blocks as usize,
            block_size: plan.block_size as usize,
            model_len_max: plan.max_model_len as usize,
            batched_tokens_max: max_num_batched_tokens as usize,
            sequences_max: max_num_seqs as usize,
            draft_tokens: plan.draft_tokens as usize,
            parts_bytes: usize::try_from(workspace.parts).unwrap_or(usize::MAX),
            graphs: true,
        }
    }

    /// The rank's share of the model, with its prediction layer when drafts are asked for.
    pub(crate) fn build(&self, config: &ModelConfig, rank: Rank) -> Model {
        let drafting = match self.draft_tokens {
            0 => Drafting::Off,
            _ => Drafting::On,
        };
        build_share(config, drafting, rank)
    }

    /// Rows that a step samples: the token after each sequence, and after each of its drafts.
    pub(crate) fn sampled_max(&self) -> usize {
        self.sequences_max * (1 + self.draft_tokens)
    }

    /// Parts that the longest context has.
    pub(crate) fn splits_max(&self) -> usize {
        plan::mla_splits(self.model_len_max)
    }

    /// Blocks of the longest sequence: entries of a block table.
    pub(crate) fn table_length(&self) -> usize {
        self.model_len_max.div_ceil(self.block_size)
    }
}

/// A piece of the arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub at: usize,
    pub bytes: usize,
}

/// How a tensor is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Form {
    /// As stored, or narrowed or dequantised to it.
    Bf16,
    /// A gate's bias.
    Float32,
    /// As stored; float32 scales.
    Fp8 { scales: Span },
    /// bf16: all heads' transposed keys at the place, all heads' values after them.
    Absorbed {
        values: Span,
        heads: usize,
        nope: usize,
        value: usize,
        latent: usize,
    },
}

/// A tensor's place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Placed {
    pub span: Span,
    pub rows: usize,
    pub columns: usize,
    pub form: Form,
    /// Which rows of the file's tensor it has, where a rank has some of them.
    pub share: Option<RowShare>,
}

/// Activation buffers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers {
    /// By [`Slot`]: span and values per row.
    pub slots: Vec<(Span, usize)>,
    /// float32 parts of split contexts and their logarithms.
    pub parts: Span,
    pub lse: Span,
    /// Gate and up rows, their product, the experts' outputs, the shared expert's.
    pub gate_up: Span,
    pub product: Span,
    pub expert_out: Span,
    pub shared_out: Span,
    /// float32 gate scores; choices and weights; the sort.
    pub scores: Span,
    pub chosen: Span,
    pub choice_weights: Span,
    pub row_token: Span,
    pub slot_row: Span,
    pub offsets: Span,
    pub tiles: Span,
    /// fp8 activations and their scales.
    pub codes: Span,
    pub code_scales: Span,
    pub product_scales: Span,
    /// Rows that want logits, and the logits in float32.
    pub gathered: Span,
    pub logits: Span,
    /// What sampling takes.
    pub picks: PickSpans,
    /// The step's inputs.
    pub tokens: Span,
    pub positions: Span,
    pub lengths: Span,
    pub cache_rows: Span,
    pub wanted: Span,
    pub tables: Span,
    /// Rows of [`Slot::Previous`] that a drafting pass goes on from.
    pub sources: Span,
    /// u32 zeros: how many blocks of a product have come, see [`kernels::params::HopperGemmParams`].
    pub tickets: Span,
    /// float32 `[positions, rope / 2, {cos, sin}]`.
    pub rotary: Span,
    /// Packed columns of all ranks.
    pub exchange: Span,
}

/// The arena's map.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub weights: Vec<Placed>,
    pub weights_bytes: usize,
    /// One per layer, the prediction layer's last.
    pub cache: Vec<Span>,
    /// Positions that each has room for, and their form.
    pub cache_rows: usize,
    pub cache_format: Format,
    pub cache_bytes: usize,
    pub buffers: Buffers,
    pub workspace_bytes: usize,
}

/// Bytes of a position in a layer's cache. In eight bits: codes, a float32 scale for each group, rotated keys in bf16.
fn row_bytes(kv: KvLayout, kv_cache: KvCacheDtype) -> usize {
    match (kv, kv_cache) {
        (KvLayout::Latent { latent, rope }, KvCacheDtype::Fp8) => {
            latent + 4 * latent.div_ceil(QUANT_GROUP) + 2 * rope
        }
        _ => 2 * kv.width(),
    }
}

#[derive(Default)]
pub(crate) struct Bump(usize);

impl Bump {
    pub fn take(&mut self, bytes: usize) -> Span {
        let span = Span { at: self.0, bytes };
        self.0 = (self.0 + bytes).next_multiple_of(ALIGNMENT);
        span
    }
}

impl Layout {
    pub fn new(model: &Model, limits: &CudaLimits) -> Self {
        let mut bump = Bump::default();
        let weights = Placement::new(model, limits.resident).place(&mut bump);
        let weights_bytes = bump.0;
        let rows = limits.kv_blocks * limits.block_size;
        let cache = model
            .cached_layers()
            .map(|layer| bump.take(rows * row_bytes(layer.kv, limits.kv_cache)))
            .collect();
        let cache_end = bump.0;
        let buffers = buffers(model, limits, &mut bump);
        Self {
            weights,
            weights_bytes,
            cache,
            cache_rows: rows,
            cache_format: match limits.kv_cache {
                KvCacheDtype::Auto => Format::Bf16,
                KvCacheDtype::Fp8 => Format::Fp8,
            },
            cache_bytes: cache_end - weights_bytes,
            buffers,
            workspace_bytes: bump.0 - cache_end,
        }
    }

    /// Bytes of the longest row that ranks exchange.
    pub fn exchanged_row_bytes(&self, limits: &CudaLimits, vocabulary: usize) -> usize {
        let slots = self.buffers.slots.iter().map(|(_, width)| 2 * width);
        let product = self.buffers.product.bytes / limits.batched_tokens_max.max(1);
        slots.chain([4 * vocabulary, product]).max().unwrap_or(0)
    }

    /// All of it.
    pub fn bytes(&self) -> usize {
        self.weights_bytes + self.cache_bytes + self.workspace_bytes
    }
}

/// Gives every tensor its place.
struct Placement<'a> {
    model: &'a Model,
    resident: ResidentDtype,
    placed: Vec<Option<Placed>>,
}

impl<'a> Placement<'a> {
    fn new(model: &'a Model, resident: ResidentDtype) -> Self {
        Self {
            model,
            resident,
            placed: vec![None; model.tensors.len()],
        }
    }

    fn place(mut self, bump: &mut Bump) -> Vec<Placed> {
        for layer in self.model.cached_layers() {
            if let Attention::Latent(attention) = &layer.attention {
                self.absorbed(attention, bump);
            }
            match &layer.mlp {
                Mlp::Dense(mlp) => self.mlp(mlp, bump),
                Mlp::Moe(moe) => self.moe(moe, bump),
            }
        }
        for id in (0..self.model.tensors.len() as u32).map(WeightId) {
            if self.placed[id.index()].is_none() {
                self.group(&[id], bump);
            }
        }
        self.placed.into_iter().flatten().collect()
    }

    fn shape(&self, id: WeightId) -> (usize, usize) {
        match self.model.tensors[id.index()].shape.as_slice() {
            [rows, columns] => (*rows, *columns),
            shape => (1, shape.iter().product()),
        }
    }

    /// Tensors of one role in one piece, without gaps.
    fn group(&mut self, ids: &[WeightId], bump: &mut Bump) {
        let role = |id: &WeightId| self.model.tensors[id.index()].role;
        let narrow = matches!(self.resident, ResidentDtype::Float8E4m3(_))
            && ids.iter().all(|id| role(id) == TensorRole::Matrix);
        let sizes: Vec<(usize, usize)> = ids.iter().map(|id| self.shape(*id)).collect();
        let elements: usize = sizes.iter().map(|(rows, columns)| rows * columns).sum();
        let whole = bump.take(elements * if narrow { 1 } else { 2 });
        let scale_count = |(rows, columns): (usize, usize)| {
            rows.div_ceil(QUANT_GROUP) * columns.div_ceil(QUANT_GROUP)
        };
        let scales_whole = match narrow {
            true => bump.take(sizes.iter().map(|size| scale_count(*size) * 4).sum()),
            false => Span::default(),
        };
        let (mut at, mut scales_at) = (whole.at, scales_whole.at);
        for (id, (rows, columns)) in ids.iter().zip(sizes) {
            let bytes = rows * columns * if narrow { 1 } else { 2 };
            let form = if narrow {
                let bytes = scale_count((rows, columns)) * 4;
                let scales = Span {
                    at: scales_at,
                    bytes,
                };
                scales_at += bytes;
                Form::Fp8 { scales }
            } else {
                Form::Bf16
            };
            self.placed[id.index()] = Some(Placed {
                span: Span { at, bytes },
                rows,
                columns,
                form,
                share: self.model.tensors[id.index()].share,
            });
            at += bytes;
        }
    }

    fn mlp(&mut self, mlp: &GatedMlp, bump: &mut Bump) {
        self.group(&[mlp.gate, mlp.up], bump);
        self.group(&[mlp.down], bump);
    }

    fn moe(&mut self, moe: &Moe, bump: &mut Bump) {
        let gate_up: Vec<WeightId> = moe.experts.iter().flat_map(|e| [e.gate, e.up]).collect();
        let down: Vec<WeightId> = moe.experts.iter().map(|e| e.down).collect();
        self.group(&gate_up, bump);
        self.group(&down, bump);
        if let Some(shared) = &moe.shared {
            self.mlp(shared, bump);
        }
        if let Some(bias) = moe.gate.bias {
            let span = bump.take(moe.gate.experts * 4);
            self.placed[bias.index()] = Some(Placed {
                span,
                rows: 1,
                columns: moe.gate.experts,
                form: Form::Float32,
                share: None,
            });
        }
    }

    fn absorbed(&mut self, attention: &LatentAttention, bump: &mut Bump) {
        let LatentAttention {
            heads,
            nope,
            value,
            latent,
            ..
        } = *attention;
        let span = bump.take(heads * latent * nope * 2);
        let values = bump.take(heads * value * latent * 2);
        self.placed[attention.kv_up.index()] = Some(Placed {
            span,
            rows: latent,
            columns: nope,
            form: Form::Absorbed {
                values,
                heads,
                nope,
                value,
                latent,
            },
            share: None,
        });
    }
}

/// The widest of each kind of layer.
#[derive(Default)]
struct Widest {
    /// Gate rows, of what a rank computes; as many are up.
    gate: usize,
    /// Their products, of all ranks.
    product: usize,
    experts: usize,
    top_k: usize,
    shared: bool,
    product_scales: usize,
    quantised: usize,
}

impl Widest {
    fn of(model: &Model) -> Self {
        let mut widest = Self {
            quantised: model.hidden,
            ..Self::default()
        };
        for layer in model.cached_layers() {
            widest.quantised = widest
                .quantised
                .max(model.slot_width(Slot::Value))
                .max(model.slot_width(Slot::QueryLatent));
            match &layer.mlp {
                Mlp::Dense(mlp) => widest.inner(1, mlp.held, mlp.inner),
                Mlp::Moe(moe) => {
                    widest.experts = widest.experts.max(moe.gate.experts);
                    widest.top_k = widest.top_k.max(moe.gate.top_k);
                    widest.shared |= moe.shared.is_some();
                    let routed = moe.experts.first().map_or(0, |mlp| mlp.inner);
                    // All experts that a token chose may be this rank's.
                    widest.inner(moe.gate.top_k, routed, routed);
                    let shared = moe.shared.map_or((0, 0), |mlp| (mlp.held, mlp.inner));
                    widest.inner(1, shared.0, shared.1);
                }
            }
        }
        widest
    }

    fn inner(&mut self, rows: usize, held: usize, inner: usize) {
        self.gate = self.gate.max(rows * held);
        self.product = self.product.max(rows * inner);
        self.product_scales = self.product_scales.max(rows * inner.div_ceil(QUANT_GROUP));
    }
}

fn buffers(model: &Model, limits: &CudaLimits, bump: &mut Bump) -> Buffers {
    let tokens = limits.batched_tokens_max;
    let sampled = limits.sampled_max();
    let drafting = usize::from(model.prediction.is_some());
    let slots = Slot::ALL
        .map(|slot| {
            let width = model.slot_width(slot);
            (bump.take(tokens * width * 2), width)
        })
        .into();
    let widest = Widest::of(model);
    let rows = tokens * widest.top_k;
    let part = model.cached_layers().map(part_width).max().unwrap_or(1);
    // Whole (row, head, split) units, each a part and its logarithm.
    let units = limits.parts_bytes / ((part + 1) * 4);
    let narrow = usize::from(matches!(limits.resident, ResidentDtype::Float8E4m3(_)));
    let picks = PickSpans::new(model.vocabulary, limits, bump);
    let mut take = |bytes: usize| bump.take(bytes);
    Buffers {
        slots,
        picks,
        parts: take(units * part * 4),
        lse: take(units * 4),
        gate_up: take(tokens * widest.gate * 2 * 2),
        product: take(tokens * widest.product * 2),
        expert_out: take(rows * model.hidden * 2),
        shared_out: take(usize::from(widest.shared) * tokens * model.hidden * 2),
        scores: take(tokens * widest.experts * 4),
        chosen: take(rows * 4),
        choice_weights: take(rows * 4),
        row_token: take(rows * 4),
        slot_row: take(rows * 4),
        offsets: take((widest.experts + 1) * 4),
        // The smaller tiles of few rows are the more numerous ones.
        tiles: take((rows / 16 + widest.experts) * 8),
        codes: take(narrow * tokens * widest.quantised),
        code_scales: take(narrow * tokens * widest.quantised.div_ceil(QUANT_GROUP) * 4),
        product_scales: take(narrow * tokens * widest.product_scales * 4),
        gathered: take(sampled * model.hidden * 2),
        logits: take(sampled * model.vocabulary * 4),
        tokens: take(tokens * 4),
        positions: take(tokens * 4),
        lengths: take(tokens * 4),
        cache_rows: take(tokens * 8),
        wanted: take(sampled * 4),
        tables: take(sampled * limits.table_length() * 4),
        sources: take(drafting * tokens * 4),
        tickets: take(plan::HOPPER_TICKET_BYTES),
        rotary: take(limits.model_len_max * model.rope.width() * 4),
        exchange: take(usize::from(!model.rank.is_alone()) * EXCHANGE_BYTES as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_memory::{MemoryRequest, memory_plan};
    use engine_spec::{AttentionConfig, Device, Dtype, Quantization};

    /// Published configurations: V3 in FP8, V2-Lite in bf16, a V3 whose FP8 blocks no product takes, Qwen2.5-7B and the FP8
    /// form of Qwen3-30B-A3B.
    const MODELS: [&str; 5] = [
        r#"{"model_type":"deepseek_v3","max_position_embeddings":163840,"n_group":8,
        "quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]}}"#,
        r#"{"model_type":"deepseek_v2","vocab_size":102400,"hidden_size":2048,"intermediate_size":10944,
        "moe_intermediate_size":1408,"num_hidden_layers":27,"num_attention_heads":16,"q_lora_rank":null,
        "kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,"n_routed_experts":64,
        "n_shared_experts":2,"num_experts_per_tok":6,"first_k_dense_replace":1,"max_position_embeddings":163840,
        "topk_method":"greedy","scoring_func":"softmax","norm_topk_prob":false,"routed_scaling_factor":1.0,
        "torch_dtype":"bfloat16"}"#,
        r#"{"model_type":"deepseek_v3","max_position_embeddings":163840,"n_group":8,
        "quantization_config":{"quant_method":"fp8","weight_block_size":[128,64]}}"#,
        r#"{"model_type":"qwen2","vocab_size":152064,"hidden_size":3584,"intermediate_size":18944,"num_hidden_layers":28,
        "num_attention_heads":28,"num_key_value_heads":4,"max_position_embeddings":131072,"torch_dtype":"bfloat16"}"#,
        r#"{"model_type":"qwen3_moe","vocab_size":151936,"hidden_size":2048,"intermediate_size":6144,
        "moe_intermediate_size":768,"num_hidden_layers":48,"num_attention_heads":32,"num_key_value_heads":4,"head_dim":128,
        "num_experts":128,"num_experts_per_tok":8,"norm_topk_prob":true,"max_position_embeddings":131072,
        "torch_dtype":"bfloat16","quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]}}"#,
    ];

    /// Ranks that share each of them.
    const RANKS: [&[u32]; 5] = [&[1, 8, 16], &[1, 2, 4], &[1, 8], &[1, 2, 4], &[1, 4, 8]];

    /// Of the first rank, whose share is the largest.
    fn layouts() -> impl Iterator<Item = (MemoryPlan, Model, Layout)> {
        let shared = MODELS.iter().zip(RANKS);
        let shared = shared.flat_map(|(text, ranks)| ranks.iter().map(move |count| (text, *count)));
        shared.flat_map(|(text, count)| {
            let config = ModelConfig::from_hf_json(text).expect("a config");
            [(8192, 16, 512, 0), (131_072, 64, 8192, 2), (100, 1, 1, 0)].map(
                |(length, sequences, tokens, drafts)| {
                    let drafts = if config.can_predict() { drafts } else { 0 };
                    let kv_cache = match config.attention {
                        AttentionConfig::Latent(_) if tokens == 8192 => KvCacheDtype::Fp8,
                        _ => KvCacheDtype::Auto,
                    };
                    let request = MemoryRequest {
                        dtype: Dtype::Auto,
                        quantization: Quantization::None,
                        parallelism: Parallelism {
                            tensor: count,
                            expert: config.moe.as_ref().map_or(1, |_| count),
                            pipeline: 1,
                        },
                        device: Device::Nvidia,
                        max_model_len: Some(length),
                        max_num_seqs: sequences,
                        block_size: 64,
                        max_num_batched_tokens: tokens,
                        kv_cache,
                        draft_tokens: drafts,
                        capacity_bytes: None,
                    };
                    let plan = memory_plan(&config, &request).expect("a plan");
                    let limits = CudaLimits::from_plan(&config, &plan, sequences, tokens);
                    let model = limits.build(&config, Rank::new(0, count).expect("a rank"));
                    let layout = Layout::new(&model, &limits);
                    (plan, model, layout)
                },
            )
        })
    }

    #[test]
    fn the_layout_takes_what_the_plan_says() {
        for (plan, _, layout) in layouts() {
            let parts = [
                (layout.weights_bytes, plan.per_rank.weights_bytes),
                (layout.cache_bytes, plan.per_rank.kv_bytes),
                (layout.workspace_bytes, plan.per_rank.workspace_bytes),
            ];
            for (used, planned) in parts {
                let share = used as f64 / planned as f64;
                // A step of one token is all alignment.
                let slack = if planned < 4 << 20 { 0.01 } else { 0.001 };
                assert!((share - 1.0).abs() < slack, "{used} of {planned}: {share}");
            }
        }
    }

    #[test]
    fn no_two_pieces_overlap() {
        for (_, model, layout) in layouts() {
            let mut spans: Vec<Span> = layout.cache.clone();
            assert_eq!(layout.weights.len(), model.tensors.len());
            for placed in &layout.weights {
                spans.push(placed.span);
                match placed.form {
                    Form::Fp8 { scales } => spans.push(scales),
                    Form::Absorbed { values, .. } => spans.push(values),
                    Form::Bf16 | Form::Float32 => {}
                }
            }
            spans.extend(layout.buffers.slots.iter().map(|(span, _)| *span));
            spans.retain(|span| span.bytes > 0);
            spans.sort_by_key(|span| span.at);
            for pair in spans.windows(2) {
                assert!(pair[0].at + pair[0].bytes <= pair[1].at, "{pair:?}");
            }
        }
    }

    #[test]
    fn experts_lie_in_order_gate_before_up() {
        for (_, model, layout) in layouts() {
            let moe = model.layers.iter().find_map(|layer| match &layer.mlp {
                Mlp::Moe(moe) => Some(moe),
                Mlp::Dense(_) => None,
            });
            let mut end = None;
            for expert in moe.into_iter().flat_map(|moe| &moe.experts) {
                for id in [expert.gate, expert.up] {
                    let span = layout.weights[id.index()].span;
                    assert!(end.is_none_or(|end| end == span.at));
                    end = Some(span.at + span.bytes);
                }
            }
        }
    }
}
