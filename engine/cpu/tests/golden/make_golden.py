#!/usr/bin/env python3
"""Golden vectors of the CPU backend, made by Hugging Face transformers in float32.

    python make_golden.py random [NAME…]  # the random models in this folder (all, or the named), weights included
    python make_golden.py trained MODEL_DIR NAME   # vectors for a model that lives elsewhere -> NAME.json

Needs torch 2.11 and transformers 5.23 (`pip install torch transformers safetensors`). Everything is seeded; a second
run writes the same bytes.

How the known traps of the reference are dealt with:
- Softmax scale of V2: earlier releases left out mscale^2. 5.23 applies it; `check_scale` asserts that it does.
- Gate mask: earlier releases masked closed groups with 0.0. 5.23 uses -inf for V3; V2's scores are positive, where both
  agree. `check_gate` recomputes every choice of the reference with -inf and fails on a difference.
- Ties: torch.topk promises no order among equals. `lowest_index_topk` replaces it by a stable sort, which is the rule of
  the engine. Ties are made exact by gate rows of zeros, so that no rounding can break them.
- V2's norm_topk_prob is ignored by transformers; the models here keep it false.
- Near ties would make a test of rounding, not of arithmetic: a gate margin or a greedy margin below MARGIN_MIN fails, and
  another seed has to be chosen.
- A cache in bfloat16 can choose another expert than the exact one, which is no error of arithmetic and changes the logits at
  once. `check_rounded_cache` lets the reference itself compute with rounded keys and values and fails when a choice changes.
- The prediction layer of V3 (multi-token prediction) is computed by transformers' MtpModel, loaded from the stored files by
  its own mapping of names. It goes on from the hidden state after the final norm, has positions one higher than the
  engine's (rotary attention sees differences only), and is one layer for one draft; here the same layer is applied to what
  it left to draft further ones.
- Weights are rounded to what is stored (bfloat16, or FP8 times scale) before the reference computes, in float32.
"""

import hashlib
import json
import math
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM,
                          DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)
from transformers.modeling_layers import MtpModel

HERE = pathlib.Path(__file__).parent
MARGIN_MIN = 1e-4
GREEDY_TOKENS = 12
DRAFTS = 4

SHAPE = dict(vocab_size=96, hidden_size=72, intermediate_size=88, moe_intermediate_size=24, num_attention_heads=4,
             num_key_value_heads=4, kv_lora_rank=40, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, rms_norm_eps=1e-6,
             max_position_embeddings=256, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, attention_bias=False)


# Sizes that are no multiple of anything; no head is as wide as the residual stream shared out, where the family allows it.
GROUPED = dict(vocab_size=96, hidden_size=60, intermediate_size=76, rms_norm_eps=1e-6, max_position_embeddings=256, bos_token_id=0,
               eos_token_id=1)
NO_WINDOW = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)

FAMILIES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM), "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def llama3(factor, original):
    return dict(rope_type="llama3", rope_theta=10000.0, factor=factor, original_max_position_embeddings=original,
                low_freq_factor=1.0, high_freq_factor=4.0)


def yarn(factor, original, mscale, mscale_all_dim):
    return dict(rope_type="yarn", rope_theta=10000.0, factor=factor, original_max_position_embeddings=original, beta_fast=32,
                beta_slow=1, mscale=mscale, mscale_all_dim=mscale_all_dim)


# name -> architecture, fields, what the published form of config.json says on top, how it is stored
MODELS = {
    "v2-lite": dict(
        family="deepseek_v2", seed=11, stored="bf16", shards=1, config="published",
        fields=dict(SHAPE, num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=None, n_routed_experts=8, n_shared_experts=2,
                    num_experts_per_tok=3, n_group=1, topk_group=1, topk_method="greedy", routed_scaling_factor=1.0,
                    norm_topk_prob=False, rope_parameters=yarn(40.0, 32, 0.707, 0.707)),
        published=dict(scoring_func="softmax")),
    "v2-groups": dict(
        family="deepseek_v2", seed=12, stored="bf16", shards=1, config="transformers",
        fields=dict(SHAPE, num_hidden_layers=2, first_k_dense_replace=0, q_lora_rank=28, n_routed_experts=12, n_shared_experts=2,
                    num_experts_per_tok=3, n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0,
                    norm_topk_prob=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        published=dict(scoring_func="softmax")),
    "v3-groups": dict(
        family="deepseek_v3", seed=13, stored="bf16", shards=3, config="transformers", ties=True,
        fields=dict(SHAPE, num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=28, n_routed_experts=16, n_shared_experts=1,
                    num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True,
                    rope_parameters=yarn(8.0, 32, 1.0, 0.7), num_nextn_predict_layers=0),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    "v3-mtp": dict(
        family="deepseek_v3", seed=14, stored="bf16", shards=1, config="published", mtp=True,
        fields=dict(SHAPE, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=28, n_routed_experts=8, n_shared_experts=1,
                    num_experts_per_tok=2, n_group=2, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True,
                    rope_parameters=yarn(40.0, 64, 1.0, 1.0), num_nextn_predict_layers=1),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    "v3-fp8": dict(
        family="deepseek_v3", seed=15, stored="fp8", blocks=[32, 48], shards=2, config="published",
        fields=dict(SHAPE, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=28, n_routed_experts=8, n_shared_experts=1,
                    num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0), num_nextn_predict_layers=0),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    # Shapes that the CUDA kernels take: their small head shape, widths of whole vectors, FP8 blocks of 128.
    "v2-cuda": dict(
        family="deepseek_v2", seed=16, stored="bf16", shards=1, config="transformers",
        fields=dict(SHAPE, hidden_size=128, intermediate_size=192, moe_intermediate_size=32, kv_lora_rank=64, qk_nope_head_dim=32,
                    qk_rope_head_dim=32, v_head_dim=32, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=None,
                    n_routed_experts=12, n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2,
                    topk_method="group_limited_greedy", routed_scaling_factor=16.0, norm_topk_prob=False,
                    rope_parameters=yarn(40.0, 32, 0.707, 0.707)),
        published=dict(scoring_func="softmax")),
    "v3-fp8-cuda": dict(
        family="deepseek_v3", seed=17, stored="fp8", blocks=[128, 128], shards=1, config="published", spread=True,
        fields=dict(SHAPE, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, kv_lora_rank=64, qk_nope_head_dim=32,
                    qk_rope_head_dim=32, v_head_dim=32, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=48,
                    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
                    routed_scaling_factor=1.0, norm_topk_prob=True,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0), num_nextn_predict_layers=0),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    "v3-mtp-cuda": dict(
        family="deepseek_v3", seed=18, stored="bf16", shards=1, config="published", mtp=True,
        fields=dict(SHAPE, hidden_size=128, intermediate_size=96, moe_intermediate_size=32, kv_lora_rank=64, qk_nope_head_dim=32,
                    qk_rope_head_dim=32, v_head_dim=32, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=48,
                    n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1,
                    routed_scaling_factor=2.5, norm_topk_prob=True, rope_parameters=yarn(40.0, 64, 1.0, 1.0),
                    num_nextn_predict_layers=1),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    # The published shape of cached rows, 512 and 64, whose form in eight bits the GPU knows.
    "v3-kv-cuda": dict(
        family="deepseek_v3", seed=19, stored="bf16", shards=1, config="published", kv_fp8=True,
        fields=dict(SHAPE, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, kv_lora_rank=512, qk_nope_head_dim=32,
                    qk_rope_head_dim=64, v_head_dim=32, num_attention_heads=4, num_hidden_layers=2, first_k_dense_replace=1,
                    q_lora_rank=48, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
                    routed_scaling_factor=1.0, norm_topk_prob=True,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0), num_nextn_predict_layers=0),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    # DeepSeek-V3.1: scales are powers of two, here stored as e8m0 for most tensors and as float32 for some.
    "v31-ue8m0": dict(
        family="deepseek_v3", seed=31, stored="fp8", scales="ue8m0", blocks=[32, 48], shards=1, config="transformers",
        fields=dict(SHAPE, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=28, n_routed_experts=8, n_shared_experts=1,
                    num_experts_per_tok=3, n_group=2, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True,
                    rope_parameters=yarn(40.0, 32, 1.0, 1.0), num_nextn_predict_layers=0),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    # Kimi-K2: V3's graph under its own name, one group, and a YaRN ramp without width (beta_fast equals beta_slow).
    "kimi-k2": dict(
        family="deepseek_v3", published_type="kimi_k2", seed=32, stored="bf16", shards=1, config="published",
        fields=dict(SHAPE, num_hidden_layers=2, first_k_dense_replace=1, q_lora_rank=28, n_routed_experts=12, n_shared_experts=1,
                    num_experts_per_tok=4, n_group=1, topk_group=1, routed_scaling_factor=2.827, norm_topk_prob=True,
                    rope_parameters=dict(yarn(32.0, 32, 1.0, 1.0), rope_theta=50000.0, beta_fast=1.0, beta_slow=1.0),
                    num_nextn_predict_layers=0),
        published=dict(scoring_func="sigmoid", topk_method="noaux_tc")),
    "qwen2": dict(
        family="qwen2", seed=16, stored="bf16", shards=2, config="published",
        fields=dict(GROUPED, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        published=NO_WINDOW),
    "qwen2-fp8": dict(
        family="qwen2", seed=17, stored="fp8", blocks=[32, 48], shards=1, config="transformers",
        fields=dict(GROUPED, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32)),
        published=NO_WINDOW),
    "llama": dict(
        family="llama", seed=18, stored="bf16", shards=1, config="transformers",
        fields=dict(GROUPED, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=36, rms_norm_eps=1e-5,
                    tie_word_embeddings=False, rope_parameters=llama3(8.0, 32)),
        published=dict(attention_bias=False, mlp_bias=False)),
    "llama-fp16": dict(
        family="llama", seed=33, stored="fp16", shards=1, config="published",
        fields=dict(GROUPED, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1, tie_word_embeddings=True,
                    rope_parameters=llama3(8.0, 32)),
        published=dict(attention_bias=False, mlp_bias=False)),
    "qwen3-fp32": dict(
        family="qwen3", seed=34, stored="fp32", shards=2, config="transformers",
        fields=dict(GROUPED, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        published=dict(NO_WINDOW, attention_bias=False)),
    "llama-tied": dict(
        family="llama", seed=19, stored="bf16", shards=1, config="published",
        fields=dict(GROUPED, num_hidden_layers=3, num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True,
                    rope_parameters=llama3(4.0, 64)),
        published=dict(attention_bias=False, mlp_bias=False)),
    "qwen3": dict(
        family="qwen3", seed=20, stored="bf16", shards=1, config="published",
        fields=dict(GROUPED, num_hidden_layers=3, num_attention_heads=18, num_key_value_heads=1, head_dim=10,
                    tie_word_embeddings=True, rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0,
                                                                   original_max_position_embeddings=32)),
        published=dict(NO_WINDOW, attention_bias=False)),
    "qwen3-moe": dict(
        family="qwen3_moe", seed=28, stored="bf16", shards=2, config="transformers",
        fields=dict(GROUPED, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, head_dim=12, num_experts=8,
                    num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[3],
                    tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        published=dict(NO_WINDOW, attention_bias=False)),
    # Head widths that the CUDA kernels take, groups of 2, 3 and 5 heads.
    "llama-cuda": dict(
        family="llama", seed=115, stored="bf16", shards=1, config="transformers",
        fields=dict(GROUPED, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=llama3(8.0, 32)),
        published=dict(attention_bias=False, mlp_bias=False)),
    "qwen2-cuda": dict(
        family="qwen2", seed=154, stored="bf16", shards=1, config="published",
        fields=dict(GROUPED, hidden_size=192, intermediate_size=88, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
                    tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        published=NO_WINDOW),
    "qwen3-cuda": dict(
        family="qwen3", seed=101, stored="bf16", shards=1, config="published",
        fields=dict(GROUPED, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=5, num_key_value_heads=1,
                    head_dim=128, tie_word_embeddings=True, rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0,
                                                                                 original_max_position_embeddings=32)),
        published=dict(NO_WINDOW, attention_bias=False)),
    "qwen3-moe-cuda": dict(
        family="qwen3_moe", seed=126, stored="bf16", shards=1, config="transformers",
        fields=dict(GROUPED, hidden_size=64, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=64, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True,
                    decoder_sparse_step=1, mlp_only_layers=[1], tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        published=dict(NO_WINDOW, attention_bias=False)),
}


def lowest_index_topk(values, k, dim=-1, largest=True, sorted=True):
    order = torch.sort(values, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((order.values.narrow(dim, 0, k), order.indices.narrow(dim, 0, k)))


DTYPES = {"bf16": (torch.bfloat16, "bfloat16"), "fp8": (torch.bfloat16, "bfloat16"), "fp16": (torch.float16, "float16"),
          "fp32": (torch.float32, "float32")}


def fill_parameter(name, p, generator, stored):
    noise = torch.randn(p.shape, generator=generator)
    if "norm" in name:
        p.copy_(1 + 0.2 * noise)
    elif name.endswith("bias"):
        p.copy_(0.5 * noise)
    elif "embed_tokens" in name:
        p.copy_(noise)
    else:
        p.copy_(noise * 1.5 / math.sqrt(p.shape[-1]))
    p.copy_(p.to(DTYPES[stored][0]).float())


def fill(model, generator, ties, stored):
    """Random weights of a spread that makes logits differ clearly; V3 biases are negative enough that all biased scores are."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            fill_parameter(name, p, generator, stored)
        for index, layer in enumerate(model.model.layers):
            gate = getattr(layer.mlp, "gate", None)
            if gate is None or not hasattr(gate, "e_score_correction_bias"):
                continue
            bias = gate.e_score_correction_bias
            bias.copy_(-1.2 + 0.1 * torch.randn(bias.shape, generator=generator))
            if ties and index == len(model.model.layers) - 1:
                # The upper half of the experts, two whole groups, are equal in score and in bias.
                half = bias.shape[0] // 2
                gate.weight[half:] = 0
                bias[half:] = -1.1


def spread(model):
    """Makes the scales of FP8 blocks differ by up to 16, so that a wrong one is no small error: gate against up, expert against
    expert, and the halves of dense rows."""
    with torch.no_grad():
        for layer in model.model.layers:
            experts = getattr(layer.mlp, "experts", None)
            if experts is None:
                layer.mlp.gate_proj.weight[:128] *= 4
                layer.mlp.up_proj.weight[:128] /= 4
                continue
            for e, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj)):
                factor = 2.0 if e % 2 else 0.5
                gate, up = both.chunk(2, dim=0)
                gate *= factor
                up /= factor
                down *= 1.5 if e < 2 else 0.5


def published_tensors(model):
    """The state dict under the names and shapes of published checkpoints."""
    tied = model.config.tie_word_embeddings
    return one_matrix_per_expert({k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not tied})


def one_matrix_per_expert(tensors):
    out = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().clone().contiguous()
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                out[f"{stem}{expert}.gate_proj.weight"] = gate.contiguous()
                out[f"{stem}{expert}.up_proj.weight"] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                out[f"{stem}{expert}.down_proj.weight"] = down.contiguous()
        else:
            out[name] = tensor
    return out


def add_mtp(tensors, model, generator):
    """A prediction layer as published checkpoints hold it, with its own copies of embedding and head."""
    layer = MtpModel(model, 1).layers[0]
    with torch.no_grad():
        for name, p in layer.named_parameters():
            fill_parameter(name, p, generator, "bf16")
        bias = layer.mtp_block.mlp.gate.e_score_correction_bias
        bias.copy_(-1.2 + 0.1 * torch.randn(bias.shape, generator=generator))
    prefix = f"model.layers.{model.config.num_hidden_layers}."
    for name, tensor in one_matrix_per_expert(layer.state_dict()).items():
        tensors[prefix + name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")] = tensor
    tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()


def is_fp8(name, tensor):
    wide = ("embed_tokens", "lm_head", "mlp.gate.", "norm", "eh_proj", "shared_head")
    return tensor.dim() == 2 and not any(part in name for part in wide)


def quantise(tensor, blocks, power_of_two=False):
    """FP8 e4m3 with one float32 multiplier per block; returns stored values, multipliers and what they stand for."""
    rows, columns = tensor.shape
    scales = torch.empty(-(-rows // blocks[0]), -(-columns // blocks[1]))
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    meant = torch.empty(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * blocks[0], (i + 1) * blocks[0]), slice(j * blocks[1], (j + 1) * blocks[1]))
            scales[i, j] = tensor[part].abs().max().clamp(min=1e-4) / 448
            if power_of_two:
                scales[i, j] = 2.0 ** math.ceil(math.log2(float(scales[i, j])))
            stored[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = stored[part].float() * scales[i, j]
    return stored, scales, meant


def store(folder, tensors, shards):
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {n: tensors[n] for n in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def configs(spec, model):
    """config.json in both forms: as transformers 5 writes it, and as published checkpoints have it."""
    new = json.loads(model.config.to_json_string(use_diff=True))
    new.pop("transformers_version", None)
    new["dtype"] = DTYPES[spec["stored"]][1]
    old = {k: v for k, v in spec["fields"].items() if k != "rope_parameters"} | spec["published"]
    old |= {"architectures": [type(model).__name__], "model_type": spec.get("published_type", spec["family"]),
            "torch_dtype": DTYPES[spec["stored"]][1], "hidden_act": "silu",
            "rope_theta": spec["fields"]["rope_parameters"]["rope_theta"]}
    if spec["family"].startswith("deepseek"):
        old["moe_layer_freq"] = 1
    rope = dict(spec["fields"]["rope_parameters"])
    rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else rope | {"rope_type" if kind == "llama3" else "type": kind}
    new["architectures"], new["model_type"] = old["architectures"], spec["family"]
    if spec["stored"] == "fp8":
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": spec["blocks"]}
        if "scales" in spec:
            quantization["scale_fmt"] = spec["scales"]
        new["quantization_config"] = old["quantization_config"] = quantization
    return {"published": old, "transformers": new}


def check_scale(model):
    config = model.config
    rope = config.rope_parameters
    latent = hasattr(config, "kv_lora_rank")
    width = config.qk_nope_head_dim + config.qk_rope_head_dim if latent else model.model.layers[0].self_attn.head_dim
    expected = width ** -0.5
    if latent and rope["rope_type"] == "yarn":
        expected *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    for layer in model.model.layers:
        assert abs(layer.self_attn.scaling - expected) < 1e-9, (layer.self_attn.scaling, expected)


class GateCheck:
    """Recomputes every expert choice with closed groups at -inf and keeps the smallest margin that is not an exact tie."""

    def __init__(self, model):
        self.margin = math.inf
        self.ties = 0
        self.negative = 0
        self.choices = []
        for layer in model.model.layers:
            gate = getattr(layer.mlp, "gate", None)
            if hasattr(gate, "top_k"):
                gate.register_forward_hook(self.check)

    def cut(self, ranked, k):
        order = ranked.sort(descending=True, stable=True).values
        if k < len(order) and torch.isfinite(order[k]):
            gap = float(order[k - 1] - order[k])
            if gap == 0:
                self.ties += 1
            else:
                self.margin = min(self.margin, gap)
        return set(lowest_index_topk(ranked, k).indices.tolist())

    def check(self, gate, args, output):
        logits, _, chosen = output
        self.choices.append(chosen.sort().values)
        bias = getattr(gate, "e_score_correction_bias", None)
        for row, found in zip(logits.float(), chosen):
            if bias is None:
                ranked = row.softmax(-1)
            else:
                ranked = row.sigmoid() + bias
                self.negative += bool((ranked < 0).all())
            groups = getattr(gate, "num_group", None) or 1
            if groups > 1 and (bias is not None or gate.topk_method == "group_limited_greedy"):
                members = ranked.view(groups, -1)
                score = members.topk(2).values.sum(-1) if bias is not None else members.max(-1).values
                kept = self.cut(score, gate.topk_group)
                ranked = members.clone()
                ranked[[g for g in range(groups) if g not in kept]] = -math.inf
                ranked = ranked.reshape(-1)
            assert self.cut(ranked, gate.top_k) == set(found.tolist()), "the reference chose other experts"


class RoundedCache(DynamicCache):
    """Keys and values as a cache in bfloat16 returns them."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.bfloat16().float(), value_states.bfloat16().float(), *args, **kwargs)


def check_rounded_cache(model, prompts, gates):
    for tokens in prompts:
        seen = []
        for cache in (DynamicCache(), RoundedCache()):
            gates.choices.clear()
            with torch.no_grad():
                model(input_ids=torch.tensor([tokens]), past_key_values=cache)
            seen.append(list(gates.choices))
        assert all(map(torch.equal, *seen)), "a rounded cache chooses other experts: choose another seed"


def fp8_cache(model, prompts):
    """Logits in float64 where every latent goes through the form that the cache keeps it in: e4m3 codes and a float32 scale
    for each 128 of them. Rotated keys are not quantised."""
    model = model.double()
    model.config._experts_implementation = "eager"  # the grouped product has no float64

    def cached(module, inputs, latent):
        groups = latent.float().unflatten(-1, (-1, 128))
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        codes = (groups / scales).to(torch.float8_e4m3fn)
        return (codes.double() * scales.double()).flatten(-2)

    hooks = [layer.self_attn.kv_a_layernorm.register_forward_hook(cached) for layer in model.model.layers]
    out = []
    with torch.no_grad():
        for tokens in prompts:
            logits = model(input_ids=torch.tensor([tokens])).logits[0]
            kept = sorted({0, len(tokens) // 2, len(tokens) - 1})
            out.append({"tokens": tokens, "positions": kept, "logits": [rounded(logits[p]) for p in kept], "greedy": []})
    for hook in hooks:
        hook.remove()
    return out


def drafts(folder, prompts, gates):
    """The prediction layer after each prompt and the token that follows it: logits at some positions, then a chain of drafts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    # The class knows the layer of the published models only.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}.*"]
    mtp = MtpModel.from_pretrained(model).float().eval()
    mtp.layers[0].mtp_block.mlp.gate.register_forward_hook(gates.check)
    assert mtp.layers[0].use_post_norm
    out = []
    with torch.no_grad():
        for tokens in prompts:
            base = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
            following = int(base.logits[0, -1].argmax())
            inputs, hidden = [*tokens[1:], following], base.hidden_states[-1]
            found = {"tokens": tokens, "following": following, "drafts": [], "draft_logits": []}
            for step in range(DRAFTS):
                places = torch.arange(1, len(inputs) + 1)[None]
                left = mtp.forward_layer(0, hidden, places, None, input_ids=torch.tensor([inputs]))
                logits = model.lm_head(left)[0]
                if step == 0:
                    kept = sorted({0, len(tokens) // 2, len(tokens) - 1})
                    found["positions"], found["logits"] = kept, [rounded(logits[p]) for p in kept]
                best = logits[-1].topk(2).values
                assert best[0] - best[1] > MARGIN_MIN, "near tie of a draft: choose another seed"
                found["drafts"].append(int(logits[-1].argmax()))
                found["draft_logits"].append(rounded(logits[-1]))
                inputs.append(found["drafts"][-1])
                hidden = torch.cat([hidden, left[:, -1:]], dim=1)
            out.append(found)
    return out


def rounded(row):
    return [float(f"{v:.8g}") for v in row.tolist()]


def vectors(model, prompts, positions, vocab, greedy):
    """Logits after some positions of each prompt, and the greedy continuation."""
    out, smallest = [], math.inf
    with torch.no_grad():
        for tokens in prompts:
            logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
            kept = [p for p in positions(len(tokens))]
            ids, continuation = list(tokens), []
            for _ in range(greedy):
                last = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                best = last.topk(2).values
                smallest = min(smallest, float(best[0] - best[1]))
                token = int(last.argmax())
                ids.append(token)
                continuation.append(token)
                if token in eos_of(model):
                    break
            rows = [rounded(logits[p]) for p in kept]
            out.append({"tokens": tokens, "positions": kept, "logits": rows, "greedy": continuation})
    assert smallest > MARGIN_MIN, f"greedy margin {smallest}: choose another seed or prompt"
    return out, smallest


def eos_of(model):
    eos = model.config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos}


def random_models(names):
    for name in names or MODELS:
        spec = MODELS[name]
        torch.manual_seed(spec["seed"])
        generator = torch.Generator().manual_seed(spec["seed"])
        config_class, model_class = FAMILIES[spec["family"]]
        config = config_class(**spec["fields"])
        config._attn_implementation = "eager"
        model = model_class(config).float().eval()
        fill(model, generator, spec.get("ties", False), spec["stored"])
        if spec.get("spread"):
            spread(model)
        tensors = published_tensors(model)
        stored = {}
        for key, tensor in tensors.items():
            if key.endswith("e_score_correction_bias"):
                stored[key] = tensor.float()
            elif spec["stored"] == "fp8" and is_fp8(key, tensor):
                ue8m0 = spec.get("scales") == "ue8m0"
                stored[key], scales, tensors[key] = quantise(tensor, spec["blocks"], ue8m0)
                as_e8m0 = ue8m0 and len(stored) % 2 == 0
                stored[key + "_scale_inv"] = scales.to(torch.float8_e8m0fnu) if as_e8m0 else scales
                assert torch.equal(stored[key + "_scale_inv"].float(), scales)
            else:
                stored[key] = tensor.to(DTYPES[spec["stored"]][0])
        if spec["stored"] == "fp8":
            put_back(model, tensors)
        if spec.get("mtp"):
            extra = dict(tensors)
            add_mtp(extra, model, torch.Generator().manual_seed(spec["seed"] + 1000))
            stored |= {k: v if k.endswith("bias") else v.bfloat16() for k, v in extra.items() if k not in tensors}
        check_scale(model)
        gates = GateCheck(model)
        vocab = spec["fields"]["vocab_size"]
        lengths = [1, 7, 33, 100]
        prompts = [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]
        found, greedy_margin = vectors(model, prompts, lambda n: sorted({0, n // 2, n - 1}), vocab, GREEDY_TOKENS)
        assert gates.margin > MARGIN_MIN / 10, f"{name}: gate margin {gates.margin}: choose another seed"
        if not spec["family"].startswith("deepseek"):  # whose cached latents never pass through the reference's cache
            check_rounded_cache(model, prompts, gates)
        if spec.get("ties"):
            assert gates.ties > 20 and gates.negative > 20, (gates.ties, gates.negative)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        store(folder, stored, spec["shards"])
        forms = configs(spec, model)
        other = "transformers" if spec["config"] == "published" else "published"
        (folder / "config.json").write_text(json.dumps(forms[spec["config"]], indent=1, sort_keys=True) + "\n")
        (folder / f"config.{other}.json").write_text(json.dumps(forms[other], indent=1, sort_keys=True) + "\n")
        (folder / "golden.json").write_text(json.dumps({"prompts": found}) + "\n")
        if spec.get("mtp"):
            drafted = drafts(folder, prompts, gates)
            (folder / "drafts.json").write_text(json.dumps({"prompts": drafted}) + "\n")
        if spec.get("kv_fp8"):
            (folder / "fp8_cache.json").write_text(json.dumps({"prompts": fp8_cache(model, prompts)}) + "\n")
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{name}: gate margin {gates.margin:.2e}, exact ties {gates.ties}, greedy margin {greedy_margin:.2e}, {size} bytes")


def put_back(model, tensors):
    """The reference computes with what the stored FP8 values stand for."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("experts.gate_up_proj"):
                stem = key.removesuffix("gate_up_proj")
                for e in range(p.shape[0]):
                    p[e] = torch.cat([tensors[f"{stem}{e}.gate_proj.weight"], tensors[f"{stem}{e}.up_proj.weight"]])
            elif key.endswith("experts.down_proj"):
                stem = key.removesuffix("down_proj")
                for e in range(p.shape[0]):
                    p[e] = tensors[f"{stem}{e}.down_proj.weight"]
            else:
                p.copy_(tensors[key])


QUESTIONS = ["What is 7 + 5?", "What is 348 + 577?", "What is 12 - 45?", "What is 37 * 6?", 'How many r in "strawberry"?',
             "What is the capital of France?"]


def trained_model(folder, name):
    from transformers import AutoTokenizer
    folder = pathlib.Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    missing = set(published_tensors(model)) - set().union(*(load_file(f) for f in folder.glob("*.safetensors")))
    assert not missing, f"not in the files: {sorted(missing)[:5]}"
    check_scale(model)
    prompts = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    found, margin = vectors(model, prompts, lambda n: [0, n - 1], model.config.vocab_size, 200)
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in sorted(folder.glob("*.safetensors")))).hexdigest()
    for prompt, question in zip(found, QUESTIONS):
        prompt["question"], prompt["answer"] = question, tokenizer.decode(prompt["greedy"])
        print(f"{question} -> {prompt['answer'][-60:]!r}")
    (HERE / f"{name}.json").write_text(json.dumps({"sha256": digest, "prompts": found}) + "\n")
    print(f"{name}: greedy margin {margin:.2e}, weights sha256 {digest}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.topk = lowest_index_topk
    match sys.argv[1:]:
        case ["random", *names]:
            random_models(names)
        case ["trained", folder, name]:
            trained_model(folder, name)
        case _:
            sys.exit(__doc__)
