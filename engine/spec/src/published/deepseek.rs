//! DeepSeek's families: latent attention, and experts from some layer on.

use super::{Fields, Stored, packing, refuse_biases, rope::rope, stored};
use crate::model_config::{
    Architecture, AttentionConfig, ConfigError, GateScoring, GateSelection, MlaConfig, ModelConfig,
    MoeConfig,
};

pub(super) fn read(architecture: Architecture, f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
    match architecture {
        Architecture::DeepseekV2 => Family::V2.read(f),
        _ => Family::V3.read(f),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Family {
    V2,
    V3,
}

impl Family {
    /// `v2` or `v3`: the defaults of transformers' configuration classes.
    fn default<T>(self, v2: T, v3: T) -> T {
        match self {
            Self::V2 => v2,
            Self::V3 => v3,
        }
    }

    fn read(self, f: &Fields<'_>) -> Result<ModelConfig, ConfigError> {
        let heads = f.size("num_attention_heads", self.default(32, 128))?;
        let kv_heads = f.optional_size("num_key_value_heads", Some(heads))?;
        if kv_heads.is_some_and(|n| n != heads) {
            return Err(ConfigError::invalid(
                "num_key_value_heads",
                kv_heads.unwrap_or_default(),
                format!("latent attention has as many as num_attention_heads ({heads})"),
            ));
        }
        refuse_biases(f)?;
        let Stored {
            dtype: stored_dtype,
            blocks: weight_blocks,
            integers,
        } = stored(f)?;
        let (rope_theta, rope_scaling) = rope(f)?;
        Ok(ModelConfig {
            architecture: self.default(Architecture::DeepseekV2, Architecture::DeepseekV3),
            vocab_size: f.size("vocab_size", self.default(102_400, 129_280))?,
            hidden_size: f.size("hidden_size", self.default(4096, 7168))?,
            intermediate_size: f.size("intermediate_size", self.default(11_008, 18_432))?,
            layers: f.size("num_hidden_layers", self.default(32, 61))?,
            attention: AttentionConfig::Latent(MlaConfig {
                heads,
                q_lora_rank: f.optional_size("q_lora_rank", Some(1536))?,
                kv_lora_rank: f.size("kv_lora_rank", 512)?,
                qk_nope_head_dim: f.size("qk_nope_head_dim", 128)?,
                qk_rope_head_dim: f.size("qk_rope_head_dim", 64)?,
                v_head_dim: f.size("v_head_dim", 128)?,
            }),
            moe: self.moe(f)?,
            rms_norm_eps: f.number("rms_norm_eps", 1e-6)?,
            rope_theta,
            rope_scaling,
            max_positions: f.size("max_position_embeddings", self.default(2048, 4096))?,
            tied_embeddings: f.flag("tie_word_embeddings", false)?,
            // transformers 5 leaves the field out at its default of 1 even for files without such
            // a layer; nothing but an explicit number promises one.
            mtp_layers: f.size("num_nextn_predict_layers", 0)?,
            bos_token: f.optional_size("bos_token_id", Some(self.default(1, 0)))?,
            eos_tokens: f.integers("eos_token_id", Some(self.default(2, 1)))?,
            stored_dtype,
            weight_blocks,
            integers,
            packed: packing(f)?,
        })
    }

    fn moe(self, f: &Fields<'_>) -> Result<Option<MoeConfig>, ConfigError> {
        let Some(routed_experts) =
            f.optional_size("n_routed_experts", Some(self.default(64, 256)))?
        else {
            return Ok(None);
        };
        let scoring = match f.text("scoring_func")?.as_deref() {
            Some("sigmoid") => GateScoring::Sigmoid,
            Some("softmax") => GateScoring::Softmax,
            None => self.default(GateScoring::Softmax, GateScoring::Sigmoid),
            Some(other) => {
                let way_out = "served are sigmoid and softmax";
                return Err(ConfigError::invalid("scoring_func", other, way_out));
            }
        };
        let selection = match f.text("topk_method")?.as_deref() {
            Some("greedy") => GateSelection::Greedy,
            Some("group_limited_greedy") => GateSelection::GroupLimitedGreedy,
            Some("noaux_tc") => GateSelection::BiasedGroups,
            None => self.default(GateSelection::Greedy, GateSelection::BiasedGroups),
            Some(other) => {
                let way_out = "served are greedy, group_limited_greedy and noaux_tc";
                return Err(ConfigError::invalid("topk_method", other, way_out));
            }
        };
        Ok(Some(MoeConfig {
            routed_experts,
            shared_experts: f
                .optional_size("n_shared_experts", Some(self.default(2, 1)))?
                .unwrap_or(0),
            experts_per_token: f
                .optional_size("num_experts_per_tok", self.default(None, Some(8)))?
                .ok_or(ConfigError::Missing("num_experts_per_tok"))?,
            intermediate_size: f.size("moe_intermediate_size", self.default(1407, 2048))?,
            first_dense_layers: f.size("first_k_dense_replace", self.default(0, 3))?,
            layer_frequency: f.size("moe_layer_freq", 1)?,
            layer_remainder: 0,
            dense_layers: Vec::new(),
            scoring,
            selection,
            groups: f
                .optional_size("n_group", self.default(None, Some(8)))?
                .unwrap_or(1),
            groups_per_token: f
                .optional_size("topk_group", self.default(None, Some(4)))?
                .unwrap_or(1),
            normalise_weights: f.flag("norm_topk_prob", self.default(false, true))?,
            routed_scaling: f.number("routed_scaling_factor", self.default(1.0, 2.5))?,
        }))
    }
}
