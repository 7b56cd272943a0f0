#!/usr/bin/env python3
"""Golden vectors of checkpoints in the format of compressed-tensors, weights included.

    python make_compressed.py [NAME…]

Needs torch 2.11, transformers 5.23 and compressed-tensors 0.20. Scales, integers and their packing are made by
compressed-tensors; what the integers stand for, by its decompression, goes back into the model, and transformers computes
logits in float32. Everything is seeded; a second run writes the same bytes.
"""

import json
import sys

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from make_golden import (FAMILIES, GROUPED, GREEDY_TOKENS, HERE, MARGIN_MIN, SHAPE, GateCheck, configs, fill, llama3, lowest_index_topk,
                         published_tensors, put_back, store, vectors, yarn)

DEFAULT_ROPE = dict(rope_type="default", rope_theta=10000.0)

# ignore: names that stay wide; the rest of the linear maps is quantised
MODELS = {
    "llama-w4a16": dict(
        family="llama", seed=51, shards=1, format="pack-quantized", ignore=["lm_head"], scales=torch.bfloat16,
        weights=dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32), activations=None,
        fields=dict(GROUPED, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=16, tie_word_embeddings=False, rope_parameters=llama3(8.0, 32)),
        published=dict(attention_bias=False, mlp_bias=False)),
    "qwen3-w8a8": dict(
        family="qwen3", seed=52, shards=2, format="int-quantized", ignore=["lm_head"], scales=torch.float32,
        weights=dict(num_bits=8, type="int", symmetric=True, strategy="channel"),
        activations=dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True),
        fields=dict(GROUPED, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=20, tie_word_embeddings=False,
                    rope_parameters=DEFAULT_ROPE),
        published=dict(use_sliding_window=False, attention_bias=False)),
    "v2-w8a16": dict(
        family="deepseek_v2", seed=54, shards=1, format="pack-quantized", scales=torch.bfloat16,
        ignore=["lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.kv_b_proj", "model.layers.1.self_attn.kv_b_proj"],
        weights=dict(num_bits=8, type="int", symmetric=True, strategy="channel"), activations=None,
        fields=dict(SHAPE, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=None, n_routed_experts=8, n_shared_experts=2,
                    num_experts_per_tok=3, n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
                    norm_topk_prob=False, rope_parameters=yarn(40.0, 32, 0.707, 0.707)),
        published=dict(scoring_func="softmax")),
}


def is_linear(name, tensor, ignore):
    return tensor.dim() == 2 and "norm" not in name and "embed_tokens" not in name and name.removesuffix(".weight") not in ignore


def compress(spec, weight):
    """The module's tensors as stored, and the weights that they stand for."""
    args = QuantizationArgs(**spec["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    group = args.group_size or weight.shape[1]
    parts = weight.reshape(weight.shape[0], -1, group)
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    scale = scale.to(spec["scales"])
    compressor = BaseCompressor.get_value_from_registry(spec["format"])
    stored = compressor.compress({"weight": weight.to(spec["scales"]), "weight_scale": scale}, scheme)
    # In float32, so that what the integers stand for is not rounded again.
    meant = compressor.decompress(dict(stored, weight_scale=scale.float()), scheme)["weight"]
    return {name: tensor.contiguous() for name, tensor in stored.items()}, meant.float()


def quantization_config(spec):
    group = {"targets": ["Linear"], "weights": spec["weights"] | {"dynamic": False, "actorder": None, "observer": "minmax"},
             "input_activations": spec["activations"], "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": spec["format"], "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": spec["ignore"], "kv_cache_scheme": None, "global_compression_ratio": None}


def make(name):
    spec = MODELS[name]
    torch.manual_seed(spec["seed"])
    generator = torch.Generator().manual_seed(spec["seed"])
    config_class, model_class = FAMILIES[spec["family"]]
    config = config_class(**spec["fields"])
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    fill(model, generator, False)
    tensors, stored = published_tensors(model), {}
    for key, tensor in list(tensors.items()):
        if not is_linear(key, tensor, spec["ignore"]):
            stored[key] = tensor.bfloat16()
            continue
        parts, tensors[key] = compress(spec, tensor)
        stored |= {key.removesuffix("weight") + part: value for part, value in parts.items()}
    put_back(model, tensors)
    gates = GateCheck(model)
    vocab = spec["fields"]["vocab_size"]
    prompts = [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in [1, 7, 33, 100]]
    found, margin = vectors(model, prompts, lambda n: sorted({0, n // 2, n - 1}), vocab, GREEDY_TOKENS)
    assert gates.margin > MARGIN_MIN / 10, f"{name}: gate margin {gates.margin}: choose another seed"
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    store(folder, stored, spec["shards"])
    form = configs(dict(spec, stored="int"), model)["published"] | {"quantization_config": quantization_config(spec)}
    (folder / "config.json").write_text(json.dumps(form, indent=1, sort_keys=True) + "\n")
    (folder / "golden.json").write_text(json.dumps({"prompts": found}) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    print(f"{name}: gate margin {gates.margin:.2e}, greedy margin {margin:.2e}, {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.topk = lowest_index_topk
    for name in sys.argv[1:] or MODELS:
        make(name)
