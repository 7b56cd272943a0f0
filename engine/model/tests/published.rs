//! The expected tensors of published models, against their published sizes.

use engine_model::{Attention, Mlp, Query, Slot, TensorRole, build, build_to_draft};
use engine_spec::ModelConfig;

const V3: &str = r#"{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "rope_theta": 10000, "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}"#;

const V2_LITE: &str = r#"{"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_attention_heads": 16, "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": false,
    "routed_scaling_factor": 1.0, "rope_theta": 10000, "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}, "bos_token_id": 100000, "eos_token_id": 100001}"#;

fn config(text: &str) -> ModelConfig {
    ModelConfig::from_hf_json(text).expect("a published config")
}

#[test]
fn the_tensors_of_v3_are_those_of_its_files() {
    let model = build(&config(V3));
    let elements: usize = model.tensors.iter().map(|spec| spec.elements()).sum();
    assert_eq!(elements, 671_026_419_200);
    // The files hold 91 991 tensors: these, a scale for each matrix, and the prediction layer, which is a MoE layer
    // with its matrices' scales and six tensors of its own.
    let matrices = |range: &str| {
        let of = |spec: &&engine_model::TensorSpec| spec.name.starts_with(range);
        let list: Vec<_> = model.tensors.iter().filter(of).collect();
        let fp8 = list
            .iter()
            .filter(|spec| spec.role == TensorRole::Matrix)
            .count();
        (list.len(), fp8)
    };
    let (all, fp8) = matrices("");
    let (layer, layer_fp8) = matrices("model.layers.60.");
    assert_eq!(all + fp8 + layer + layer_fp8 + 6, 91_991);
    assert_eq!(model.unused_prefixes, ["model.layers.61."]);
    let shape = |name: &str| {
        let found = model.tensors.iter().find(|spec| spec.name == name);
        found.map(|spec| spec.shape.clone())
    };
    for (name, expected) in [
        (
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
            [576, 7168],
        ),
        ("model.layers.0.self_attn.q_b_proj.weight", [24576, 1536]),
        (
            "model.layers.60.mlp.experts.255.down_proj.weight",
            [7168, 2048],
        ),
        ("model.layers.2.mlp.gate_proj.weight", [18432, 7168]),
    ] {
        assert_eq!(shape(name).as_deref(), Some(&expected[..]), "{name}");
    }
    assert_eq!(shape("model.layers.2.mlp.gate.weight"), None);
}

#[test]
fn the_softmax_scales_are_the_published_ones() {
    for (text, expected) in [(V3, 0.135_233_8), (V2_LITE, 0.114_721_4)] {
        let model = build(&config(text));
        let Attention::Latent(attention) = &model.layers[0].attention else {
            panic!("latent attention expected");
        };
        assert!(
            (attention.scale - expected).abs() < 1e-6,
            "{}",
            attention.scale
        );
    }
}

#[test]
fn v2_lite_has_a_full_query_two_joined_shared_experts_and_no_bias() {
    let model = build(&config(V2_LITE));
    let elements: usize = model.tensors.iter().map(|spec| spec.elements()).sum();
    assert_eq!(elements, 15_706_484_224);
    let layer = &model.layers[1];
    let Attention::Latent(attention) = &layer.attention else {
        panic!("latent attention expected");
    };
    assert!(matches!(attention.query, Query::Full(_)));
    assert_eq!(model.slot_width(Slot::QueryLatent), 0);
    let Mlp::Moe(moe) = &layer.mlp else {
        panic!("layer 1 is dense");
    };
    assert_eq!(moe.shared.map(|mlp| mlp.inner), Some(2816));
    assert_eq!(moe.gate.bias, None);
    assert!(matches!(model.layers[0].mlp, Mlp::Dense(_)));
}

fn grouped(model: &engine_model::Model, layer: usize) -> &engine_model::GroupedAttention {
    match &model.layers[layer].attention {
        Attention::Grouped(attention) => attention,
        Attention::Latent(_) => panic!("grouped-query attention expected"),
    }
}

fn counted(model: &engine_model::Model) -> (usize, usize) {
    let elements = model.tensors.iter().map(|spec| spec.elements()).sum();
    (model.tensors.len(), elements)
}

#[test]
fn the_tensors_of_the_r1_distills_are_those_of_their_files() {
    let qwen = r#"{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 10000,
        "max_position_embeddings": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
    let model = build(&config(qwen));
    // The files' index lists 339 tensors.
    assert_eq!(counted(&model), (339, 7_615_616_512));
    let attention = grouped(&model, 27);
    assert_eq!((attention.group(), attention.width), (7, 128));
    assert!(attention.value.bias.is_some() && attention.head_norms.is_none());
    assert_eq!(model.slot_width(Slot::FreshKey), 512);
    assert_eq!(model.slot_width(Slot::CacheRow), 0);

    let llama = r#"{"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
        "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": false,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "torch_dtype": "bfloat16"}"#;
    let model = build(&config(llama));
    assert_eq!(counted(&model), (291, 8_030_261_248));
    let attention = grouped(&model, 0);
    assert_eq!(attention.query.bias, None);
    assert_eq!(attention.scale, 128f64.sqrt().recip() as f32);
    assert_eq!(model.layers[0].kv.width(), 2 * 8 * 128);
}

#[test]
fn the_tensors_of_qwen3_are_those_of_its_files() {
    let moe = r#"{"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128, "norm_topk_prob": true,
        "max_position_embeddings": 40960, "rope_theta": 1000000, "tie_word_embeddings": false}"#;
    let model = build(&config(moe));
    // The files' index lists 18867 tensors.
    assert_eq!(counted(&model), (18_867, 30_532_122_624));
    let Mlp::Moe(experts) = &model.layers[47].mlp else {
        panic!("layer 47 is dense");
    };
    assert!(experts.shared.is_none() && experts.gate.normalise);
    assert_eq!((experts.gate.experts, experts.gate.top_k), (128, 8));

    let tied = r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1000000, "tie_word_embeddings": true}"#;
    let model = build(&config(tied));
    assert_eq!(counted(&model), (310, 596_049_920));
    assert_eq!(model.head, model.embedding);
    // Heads are wider together than the residual stream.
    assert_eq!(model.slot_width(Slot::Query), 2048);
    assert!(grouped(&model, 0).head_norms.is_some());
}

#[test]
fn a_layer_is_dense_where_the_config_says_so() {
    let text = r#"{"model_type": "qwen3_moe", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
        "mlp_only_layers": [3]}"#;
    let model = build(&config(text));
    let moe: Vec<bool> = model
        .layers
        .iter()
        .map(|layer| matches!(layer.mlp, Mlp::Moe(_)))
        .collect();
    assert_eq!(moe, [false, true, false, false, false, true]);
}

#[test]
fn the_prediction_layer_of_v3_is_the_layer_after_the_last_one() {
    let model = build_to_draft(&config(V3));
    let prediction = model.prediction.as_ref().unwrap();
    let name = |id: engine_model::WeightId| model.tensors[id.index()].name.as_str();
    assert_eq!(name(prediction.join), "model.layers.61.eh_proj.weight");
    assert_eq!(
        name(prediction.token_norm.weight),
        "model.layers.61.enorm.weight"
    );
    assert_eq!(
        name(prediction.hidden_norm.weight),
        "model.layers.61.hnorm.weight"
    );
    assert_eq!(
        name(prediction.final_norm.weight),
        "model.layers.61.shared_head.norm.weight"
    );
    assert_eq!(model.tensors[prediction.join.index()].shape, [7168, 14_336]);
    assert!(matches!(prediction.layer.mlp, Mlp::Moe(_)));
    assert!(model.unused_prefixes.is_empty());
    assert_eq!(model.cached_layers().count(), 62);
    assert_eq!(model.slot_width(Slot::Joined), 2 * 7168);
    // The published copies of embedding and head in that layer are the model's own and are not read twice.
    assert!(
        !model
            .tensors
            .iter()
            .any(|spec| spec.name.contains("61.embed") || spec.name.contains("shared_head.head"))
    );

    let off = build(&config(V3));
    assert!(off.prediction.is_none());
    assert_eq!(off.unused_prefixes, ["model.layers.61."]);
    assert_eq!(
        (off.slot_width(Slot::Joined), off.slot_width(Slot::Previous)),
        (0, 0)
    );
    let (on, off) = (counted(&model).1, counted(&off).1);
    assert_eq!(
        on - off,
        187_107_328 + 2 * 7168 + 257 * 44_040_192 + 256 * 7168 + 256 + 7168 * 14_336 + 3 * 7168
    );
    // Families without such a layer are built as they are.
    assert!(build_to_draft(&config(V2_LITE)).prediction.is_none());
}
