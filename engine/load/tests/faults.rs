//! Every way a model directory can be broken ends in its fault and in a message that names file, tensor and values.

// Helpers of tests are no tests to clippy.
#![allow(clippy::unwrap_used)]

mod support;

use engine_load::inspect;
use engine_spec::ModelFault::{
    ModelConfigInvalid, ModelNotFound, UnsupportedArchitecture, WeightsMismatch, WeightsMissing,
    WeightsTruncated,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::{
    Tensor, config, file, grouped_config, layout, open, refused, tensor, tensors, with_header,
    write, write_index, write_sharded,
};
use tempfile::TempDir;

const MODEL: &str = "model.safetensors";
const GATE_BIAS: &str = "model.layers.1.mlp.gate.e_score_correction_bias";

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn edited(edit: impl FnOnce(&mut Vec<Tensor>)) -> TempDir {
    let dir = directory();
    let mut list = tensors(&config());
    edit(&mut list);
    write(dir.path(), &config(), &list);
    dir
}

fn position(list: &[Tensor], name: &str) -> usize {
    list.iter().position(|tensor| tensor.name == name).unwrap()
}

#[test]
fn a_whole_model_opens_and_is_counted() {
    let single = edited(|_| ());
    open(single.path()).unwrap();
    let sharded = directory();
    write_sharded(sharded.path(), &config(), &tensors(&config()));
    open(sharded.path()).unwrap();
    let [one, two] = [single.path(), sharded.path()].map(|dir| inspect(dir).unwrap());
    assert_eq!((one.shards, two.shards), (1, 2));
    assert_eq!(one.tensors as usize, tensors(&config()).len());
    assert_eq!(one.parameters, one.config.parameters());
    assert_eq!((one.tensors, one.parameters), (two.tensors, two.parameters));
    assert!(one.digest.starts_with("sha256:") && one.digest != two.digest);
    assert_eq!(one.digest, inspect(single.path()).unwrap().digest);
}

#[test]
fn a_missing_directory_config_or_weight_file_is_named() {
    let dir = directory();
    refused(&dir.path().join("nowhere"), ModelNotFound, &["nowhere"]);
    refused(dir.path(), ModelNotFound, &["config.json"]);
    std::fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    refused(dir.path(), WeightsMissing, &[MODEL, "index.json"]);
}

#[test]
fn a_bad_config_names_the_field() {
    let cases = [
        (json!("nonsense"), ModelConfigInvalid, "config.json"),
        (
            json!({"model_type": "mamba"}),
            UnsupportedArchitecture,
            "mamba",
        ),
    ];
    for (config, fault, word) in cases {
        let dir = directory();
        write(dir.path(), &config, &[]);
        refused(dir.path(), fault, &[word]);
    }
    let mut wrong = config();
    wrong["num_experts_per_tok"] = json!(400);
    let dir = directory();
    write(dir.path(), &wrong, &[]);
    refused(
        dir.path(),
        ModelConfigInvalid,
        &["num_experts_per_tok", "400"],
    );
}

#[test]
fn a_truncated_file_is_noticed_at_any_length() {
    let whole = file(&tensors(&config()));
    for length in [0, 1, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        let dir = edited(|_| ());
        std::fs::write(dir.path().join(MODEL), &whole[..length]).unwrap();
        refused(dir.path(), WeightsTruncated, &[MODEL]);
    }
}

#[test]
fn a_malformed_header_is_refused() {
    let list = tensors(&config());
    let (entries, data) = layout(&list);
    let text = |entries: &[(String, Value)]| {
        let inner: Vec<String> = entries
            .iter()
            .map(|(name, entry)| format!("{}:{entry}", json!(name)))
            .collect();
        format!("{{{}}}", inner.join(","))
    };
    let shifted = |by: i64| {
        let mut entries = entries.clone();
        for (_, entry) in &mut entries[1..2] {
            for end in [0, 1] {
                let offset = entry["data_offsets"][end].as_i64().unwrap() + by;
                entry["data_offsets"][end] = json!(offset);
            }
        }
        text(&entries)
    };
    let doubled = {
        let mut entries = entries.clone();
        entries.push(entries[0].clone());
        text(&entries)
    };
    let mut longer = data.clone();
    longer.push(0);
    let cases = [
        (with_header("{", &data), "not valid"),
        (with_header("[1]", &data), "not valid"),
        (with_header(&shifted(-2), &data), "overlaps"),
        (with_header(&shifted(2), &data), "leaves a hole"),
        (with_header(&doubled, &data), "listed twice"),
        (
            with_header(&text(&entries), &longer),
            "1 bytes after the last tensor",
        ),
        (u64::MAX.to_le_bytes().to_vec(), "header length"),
    ];
    for (bytes, word) in cases {
        let dir = edited(|_| ());
        std::fs::write(dir.path().join(MODEL), bytes).unwrap();
        refused(dir.path(), WeightsMismatch, &[MODEL, word]);
    }
}

#[test]
fn a_missing_tensor_is_named_with_its_shape() {
    let name = "model.layers.1.mlp.experts.3.up_proj.weight";
    let dir = edited(|list| {
        list.remove(position(list, name));
    });
    refused(dir.path(), WeightsMissing, &[name, "[8, 16]", MODEL]);
}

#[test]
fn a_wrong_shape_or_dtype_names_expected_and_found() {
    let name = "model.layers.0.self_attn.o_proj.weight";
    let replace = |dtype: &'static str, shape: &'static [usize]| {
        edited(move |list| {
            let at = position(list, name);
            list[at] = tensor(name, dtype, shape);
        })
    };
    let transposed = replace("BF16", &[10, 16]);
    refused(
        transposed.path(),
        WeightsMismatch,
        &[name, "[10, 16]", "[16, 10]", MODEL],
    );
    let wide = replace("F32", &[16, 10]);
    refused(
        wide.path(),
        WeightsMismatch,
        &[name, "F32", "expected BF16"],
    );
    let integer = replace("I32", &[16, 10]);
    refused(integer.path(), WeightsMismatch, &[name, "I32"]);
}

#[test]
fn a_span_that_contradicts_its_shape_is_refused() {
    let list = tensors(&config());
    let (mut entries, data) = layout(&list);
    entries[0].1["shape"] = json!([31, 16]);
    let header: serde_json::Map<String, Value> = entries.into_iter().collect();
    let dir = edited(|_| ());
    let bytes = with_header(&Value::Object(header).to_string(), &data);
    std::fs::write(dir.path().join(MODEL), bytes).unwrap();
    refused(
        dir.path(),
        WeightsMismatch,
        &["model.embed_tokens.weight", "[31, 16]"],
    );
}

#[test]
fn a_gate_that_contradicts_the_config_names_the_field() {
    let without = edited(|list| {
        list.remove(position(list, GATE_BIAS));
    });
    refused(without.path(), WeightsMissing, &[GATE_BIAS]);

    let short = edited(|list| {
        let at = position(list, GATE_BIAS);
        list[at] = tensor(GATE_BIAS, "F32", &[3]);
    });
    refused(short.path(), WeightsMismatch, &[GATE_BIAS, "[3]", "[4]"]);

    let dir = directory();
    let mut greedy = config();
    greedy["topk_method"] = json!("greedy");
    write(dir.path(), &greedy, &tensors(&config()));
    refused(dir.path(), WeightsMismatch, &[GATE_BIAS, "topk_method"]);

    let dir = directory();
    let mut full_query = config();
    full_query["q_lora_rank"] = Value::Null;
    write(dir.path(), &full_query, &tensors(&config()));
    refused(dir.path(), WeightsMismatch, &["q_a_proj", "q_lora_rank"]);
}

#[test]
fn a_model_of_another_family_than_its_config_says_names_the_field() {
    let directory_of = |config: &Value, list: &[Tensor]| {
        let dir = directory();
        write(dir.path(), config, list);
        dir
    };
    for family in ["qwen2", "llama", "qwen3", "qwen3_moe"] {
        let config = grouped_config(family);
        open(directory_of(&config, &tensors(&config)).path()).unwrap();
    }
    let qwen2 = grouped_config("qwen2");
    let bias = "model.layers.1.self_attn.k_proj.bias";
    let mut list = tensors(&qwen2);
    list.remove(position(&list, bias));
    let dir = directory_of(&qwen2, &list);
    refused(dir.path(), WeightsMissing, &[bias, "[6]"]);

    let qwen3 = grouped_config("qwen3");
    let norm = "model.layers.0.self_attn.q_norm.weight";
    let mut list = tensors(&qwen3);
    list.remove(position(&list, norm));
    let dir = directory_of(&qwen3, &list);
    refused(dir.path(), WeightsMissing, &[norm, "[6]"]);
    let mut list = tensors(&qwen3);
    let at = position(&list, norm);
    list[at] = tensor(norm, "BF16", &[12]);
    let dir = directory_of(&qwen3, &list);
    refused(dir.path(), WeightsMismatch, &[norm, "[12]", "[6]"]);

    let extra = |config: &Value, name: &str, shape: &[usize], field: &str| {
        let mut list = tensors(config);
        list.push(tensor(name, "BF16", shape));
        let dir = directory_of(config, &list);
        refused(dir.path(), WeightsMismatch, &[name, field, MODEL]);
    };
    extra(&qwen2, norm, &[6], "model_type");
    extra(&qwen3, bias, &[6], "model_type");
    let llama = grouped_config("llama");
    extra(&llama, bias, &[6], "model_type");
    extra(
        &llama,
        "model.layers.0.self_attn.o_proj.bias",
        &[16],
        "attention_bias",
    );
    extra(&llama, "model.layers.0.mlp.up_proj.bias", &[24], "mlp_bias");
    let moe = grouped_config("qwen3_moe");
    extra(
        &moe,
        "model.layers.1.mlp.shared_expert_gate.weight",
        &[1, 16],
        "model_type",
    );

    // A layer that has experts in the file and none by the config.
    let mut dense = moe.clone();
    dense["mlp_only_layers"] = json!([1]);
    let dir = directory_of(&dense, &tensors(&moe));
    refused(
        dir.path(),
        WeightsMissing,
        &["model.layers.1.mlp.gate_proj.weight"],
    );
}

#[test]
fn an_index_that_lies_is_refused() {
    let list = tensors(&config());
    let name = list[0].name.clone();
    let place = |file: &str| {
        let dir = directory();
        let mut map = write_sharded(dir.path(), &config(), &list);
        map.insert(name.clone(), file.into());
        write_index(dir.path(), &map);
        dir
    };
    let absent = place("c.safetensors");
    refused(absent.path(), WeightsMissing, &["c.safetensors", &name]);
    let elsewhere = place("b.safetensors");
    refused(elsewhere.path(), WeightsMissing, &["b.safetensors", &name]);
    let outside = place("../a.safetensors");
    refused(
        outside.path(),
        WeightsMismatch,
        &["../a.safetensors", "plain file name"],
    );

    let dir = directory();
    write_sharded(dir.path(), &config(), &list);
    std::fs::write(dir.path().join("b.safetensors"), file(&list)).unwrap();
    refused(dir.path(), WeightsMismatch, &["is also in a.safetensors"]);

    let dir = directory();
    write_sharded(dir.path(), &config(), &list);
    std::fs::write(dir.path().join("model.safetensors.index.json"), "{}").unwrap();
    refused(
        dir.path(),
        WeightsMismatch,
        &["model.safetensors.index.json"],
    );
}

#[test]
fn fp8_matrices_need_scales_of_the_right_shape() {
    let mut quantised = config();
    quantised["quantization_config"] = json!({"quant_method": "fp8", "weight_block_size": [8, 8]});
    let with_scales = |edit: &dyn Fn(&mut Vec<Tensor>)| {
        let mut list = Vec::new();
        for old in tensors(&config()) {
            let wide = ["embed", "lm_head", "norm", ".gate."]
                .iter()
                .any(|part| old.name.contains(part));
            if wide {
                list.push(old);
                continue;
            }
            let scales: Vec<usize> = old.shape.iter().map(|size| size.div_ceil(8)).collect();
            list.push(tensor(&old.name, "F8_E4M3", &old.shape));
            list.push(tensor(&format!("{}_scale_inv", old.name), "F32", &scales));
        }
        edit(&mut list);
        let dir = directory();
        write(dir.path(), &quantised, &list);
        dir
    };
    let scale = "model.layers.0.mlp.up_proj.weight_scale_inv";
    open(with_scales(&|_| ()).path()).unwrap();
    let without = with_scales(&|list| {
        list.remove(position(list, scale));
    });
    refused(without.path(), WeightsMissing, &[scale, "[3, 2]"]);
    let wrong = with_scales(&|list| {
        let at = position(list, scale);
        list[at] = tensor(scale, "F32", &[3, 1]);
    });
    refused(wrong.path(), WeightsMismatch, &[scale, "[3, 1]", "[3, 2]"]);
}

#[test]
fn a_prediction_layer_may_be_in_the_file() {
    let dir = edited(|list| {
        list.push(tensor("model.layers.2.eh_proj.weight", "BF16", &[16, 32]));
        list.push(tensor(
            "model.layers.2.mlp.gate.e_score_correction_bias",
            "F32",
            &[4],
        ));
    });
    open(dir.path()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_damaged_file_never_panics(
        at in 0usize..4000, byte in any::<u8>(), cut in prop::option::of(0usize..20_000)
    ) {
        let dir = edited(|_| ());
        let path = dir.path().join(MODEL);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Some(cut) = cut {
            bytes.truncate(cut % bytes.len());
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Err(error) = open(dir.path()) {
            prop_assert!(error.fault().is_some(), "{}", error.chain());
        }
    }
}
