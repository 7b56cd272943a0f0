//! The frame that all families share: an embedding, layers of attention and MLP with a norm before each and an addition
//! after each, a last norm and a head. A family fills in attention and MLP.

use engine_spec::{ModelConfig, Rank};

use crate::layers::{Attention, GatedMlp, KvLayout, Layer, Mlp, Model, Norm, Prediction, Residual};
use crate::rope::Rope;
use crate::tensors::{TensorList, TensorRole};

/// Whether a model drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drafting {
    /// Its prediction layers, if it has any, are left alone.
    Off,
    /// The first layer after the decoder layers predicts.
    On,
}

/// The graph of `config` with the family's parts. `attention` is called with the prefix of a layer's attention tensors,
/// `mlp` with the layer's index and the prefix of its MLP tensors; both add the tensors they need, or the rank's share.
pub(crate) fn build(
    config: &ModelConfig,
    attention: impl Fn(&str, &mut TensorList) -> (Attention, KvLayout),
    mlp: impl Fn(u32, &str, &mut TensorList) -> Mlp,
    drafting: Drafting,
    rank: Rank,
) -> Model {
    let mut tensors = TensorList::new(rank);
    let hidden = config.hidden_size;
    let epsilon = config.rms_norm_eps as f32;
    let table = |tensors: &mut TensorList, name: &str| {
        tensors.add_split(name.into(), &[config.vocab_size, hidden], TensorRole::Table)
    };
    let embedding = table(&mut tensors, "model.embed_tokens.weight");
    let layer = |index: u32, tensors: &mut TensorList| {
        let prefix = format!("model.layers.{index}.");
        let norm_of = |tensors: &mut TensorList, name: &str| {
            norm(tensors, &format!("{prefix}{name}"), hidden, epsilon)
        };
        let input_norm = norm_of(tensors, "input_layernorm");
        let (attention, kv) = attention(&format!("{prefix}self_attn."), tensors);
        let mlp_norm = norm_of(tensors, "post_attention_layernorm");
        Layer {
            input_norm,
            attention,
            kv,
            mlp_norm,
            mlp: mlp(index, &format!("{prefix}mlp."), tensors),
            residual: Residual::Add,
        }
    };
    let layers = (0..config.layers)
        .map(|index| layer(index, &mut tensors))
        .collect();
    let final_norm = norm(&mut tensors, "model.norm", hidden, epsilon);
    let head = if config.tied_embeddings {
        embedding
    } else {
        table(&mut tensors, "lm_head.weight")
    };
    let prediction = (drafting == Drafting::On).then(|| {
        let prefix = format!("model.layers.{}.", config.layers);
        let norm_of = |tensors: &mut TensorList, name: &str| {
            norm(tensors, &format!("{prefix}{name}"), hidden, epsilon)
        };
        Prediction {
            token_norm: norm_of(&mut tensors, "enorm"),
            hidden_norm: norm_of(&mut tensors, "hnorm"),
            // Never FP8 in published checkpoints, like a table.
            join: tensors.add_split(
                format!("{prefix}eh_proj.weight"),
                &[hidden, 2 * hidden],
                TensorRole::Table,
            ),
            layer: layer(config.layers, &mut tensors),
            final_norm: norm_of(&mut tensors, "shared_head.norm"),
            prefix,
        }
    });
    Model {
        tensors: tensors.specs,
        rank,
        unused_prefixes: Vec::new(),
        forbidden_suffixes: Vec::new(),
        hidden: hidden as usize,
        vocabulary: config.vocab_size as usize,
        embedding,
        layers,
        final_norm,
        head,
        rope: Rope::new(config),
        prediction,
    }
}

/// `name.weight` of `width` values.
pub(crate) fn norm(tensors: &mut TensorList, name: &str, width: u32, epsilon: f32) -> Norm {
    Norm {
        weight: tensors.vector(format!("{name}.weight"), width),
        epsilon,
    }
}

/// The three projections of an MLP under `prefix`, rows shared by all ranks.
pub(crate) fn gated_mlp(
    prefix: &str,
    hidden: u32,
    inner: u32,
    tensors: &mut TensorList,
) -> GatedMlp {
    let held = tensors.rank.share_rows(inner as usize);
    GatedMlp {
        gate: tensors.split_matrix(format!("{prefix}gate_proj.weight"), inner, hidden),
        up: tensors.split_matrix(format!("{prefix}up_proj.weight"), inner, hidden),
        down: tensors.split_matrix(format!("{prefix}down_proj.weight"), hidden, inner),
        inner: inner as usize,
        first: held.start,
        held: held.len(),
    }
}

/// The rank's own of `count` experts, each whole, and the index of the first one.
pub(crate) fn experts(
    prefix: &str,
    count: u32,
    hidden: u32,
    inner: u32,
    tensors: &mut TensorList,
) -> (usize, Vec<GatedMlp>) {
    const TENSORS: usize = 3;
    let own = tensors.rank.share(count as usize);
    tensors.pass_over(TENSORS * own.start);
    let experts = own.clone().map(|expert| {
        let mut matrix = |name: &str, out, input| {
            tensors.matrix(
                format!("{prefix}experts.{expert}.{name}.weight"),
                out,
                input,
            )
        };
        GatedMlp {
            gate: matrix("gate_proj", inner, hidden),
            up: matrix("up_proj", inner, hidden),
            down: matrix("down_proj", hidden, inner),
            inner: inner as usize,
            first: 0,
            held: inner as usize,
        }
    });
    let experts = experts.collect();
    tensors.pass_over(TENSORS * (count as usize - own.end));
    (own.start, experts)
}
