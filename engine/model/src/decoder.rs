//! The frame that all families share: an embedding, layers of attention and MLP with a norm before each and an addition
//! after each, a last norm and a head. A family fills in attention and MLP.

use engine_spec::ModelConfig;

use crate::layers::{Attention, GatedMlp, KvLayout, Layer, Mlp, Model, Norm, Residual};
use crate::rope::Rope;
use crate::tensors::{TensorList, TensorRole};

/// The graph of `config` with the family's parts. `attention` is called with the prefix of a layer's attention tensors,
/// `mlp` with the layer's index and the prefix of its MLP tensors; both add the tensors they need.
pub(crate) fn build(
    config: &ModelConfig,
    attention: impl Fn(&str, &mut TensorList) -> (Attention, KvLayout),
    mlp: impl Fn(u32, &str, &mut TensorList) -> Mlp,
) -> Model {
    let mut tensors = TensorList::default();
    let hidden = config.hidden_size;
    let epsilon = config.rms_norm_eps as f32;
    let table = |tensors: &mut TensorList, name: &str| {
        tensors.add(name.into(), &[config.vocab_size, hidden], TensorRole::Table)
    };
    let embedding = table(&mut tensors, "model.embed_tokens.weight");
    let layer = |index: u32| {
        let prefix = format!("model.layers.{index}.");
        let norm_of = |tensors: &mut TensorList, name: &str| {
            norm(tensors, &format!("{prefix}{name}"), hidden, epsilon)
        };
        let input_norm = norm_of(&mut tensors, "input_layernorm");
        let (attention, kv) = attention(&format!("{prefix}self_attn."), &mut tensors);
        let mlp_norm = norm_of(&mut tensors, "post_attention_layernorm");
        Layer {
            input_norm,
            attention,
            kv,
            mlp_norm,
            mlp: mlp(index, &format!("{prefix}mlp."), &mut tensors),
            residual: Residual::Add,
        }
    };
    let layers = (0..config.layers).map(layer).collect();
    let final_norm = norm(&mut tensors, "model.norm", hidden, epsilon);
    let head = if config.tied_embeddings {
        embedding
    } else {
        table(&mut tensors, "lm_head.weight")
    };
    Model {
        tensors: tensors.0,
        unused_prefixes: Vec::new(),
        forbidden_suffixes: Vec::new(),
        hidden: hidden as usize,
        vocabulary: config.vocab_size as usize,
        embedding,
        layers,
        final_norm,
        head,
        rope: Rope::new(config),
    }
}

/// `name.weight` of `width` values.
pub(crate) fn norm(tensors: &mut TensorList, name: &str, width: u32, epsilon: f32) -> Norm {
    Norm {
        weight: tensors.vector(format!("{name}.weight"), width),
        epsilon,
    }
}

/// The three projections of an MLP under `prefix`.
pub(crate) fn gated_mlp(
    prefix: &str,
    hidden: u32,
    inner: u32,
    tensors: &mut TensorList,
) -> GatedMlp {
    GatedMlp {
        gate: tensors.matrix(format!("{prefix}gate_proj.weight"), inner, hidden),
        up: tensors.matrix(format!("{prefix}up_proj.weight"), inner, hidden),
        down: tensors.matrix(format!("{prefix}down_proj.weight"), hidden, inner),
        inner: inner as usize,
    }
}
