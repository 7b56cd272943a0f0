#!/usr/bin/env python3
"""Logits of models of this folder by llama.cpp, a second implementation that shares no code with transformers.

    python make_llama_cpp.py        # -> llama.cpp.json

Needs llama-cpp-python 0.3.36 (which carries llama.cpp), gguf 0.19.0 and numpy; no torch. Each model is written as a GGUF
file in float32 from its committed weights, FP8 values times their scales, and evaluated with a float32 cache. Prompts and
positions are those of golden.json. A second run writes the same bytes on the same machine.

Tensor names and keys: llama.cpp, gguf-py/gguf/constants.py. The up-projection of the latent is stored in two parts, its
key half transposed.
"""

import json
import math
import pathlib
import struct
import tempfile

import gguf
import llama_cpp
import numpy as np

HERE = pathlib.Path(__file__).parent
MODELS = ["v3-fp8", "v31-ue8m0", "qwen2", "llama"]


def e4m3():
    """What each of the 256 bytes of FP8 e4m3fn stands for."""
    table = np.zeros(256, np.float32)
    for byte in range(256):
        sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table[byte] = math.nan if byte & 127 == 127 else (-value if sign else value)
    return table


def decode(kind, raw, shape):
    if kind == "F8_E4M3":
        values = e4m3()[np.frombuffer(raw, np.uint8)]
    elif kind == "F8_E8M0":
        values = np.ldexp(np.float32(1), np.frombuffer(raw, np.uint8).astype(np.int32) - 127)
    elif kind == "BF16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, {"F32": np.float32, "F16": np.float16}[kind])
    return values.astype(np.float32).reshape(shape)


def weights(folder, config):
    """All tensors in float32, scales applied."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = decode(entry["dtype"], data[begin:end], entry["shape"])
    for name in [name for name in found if name.endswith("_scale_inv")]:
        rows, columns = config["quantization_config"]["weight_block_size"]
        matrix = found[name.removesuffix("_scale_inv")]
        scales = found.pop(name).repeat(rows, 0).repeat(columns, 1)
        matrix *= scales[: matrix.shape[0], : matrix.shape[1]]
    return found


def rope_of(config):
    """Kind, base and parameters of the rotation, in either form of a config."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta", config.get("rope_theta")), rope


def common(writer, config, architecture):
    kind, theta, rope = rope_of(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        # llama.cpp's converter writes a tenth of mscale_all_dim; the graph multiplies the scale by its square.
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    # Only ids are used; the pieces have to be there.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def deepseek2(writer, config, tensors, put):
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, heads = config["kv_lora_rank"], config["num_attention_heads"]
    experts = config["n_routed_experts"]
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    for layer in range(config["num_hidden_layers"]):
        at, to = f"model.layers.{layer}.", f"blk.{layer}."
        for ours, theirs in {"q_a_proj": "attn_q_a", "q_a_layernorm": "attn_q_a_norm", "q_b_proj": "attn_q_b",
                             "kv_a_proj_with_mqa": "attn_kv_a_mqa", "kv_a_layernorm": "attn_kv_a_norm",
                             "o_proj": "attn_output"}.items():
            put(f"{to}{theirs}.weight", tensors[f"{at}self_attn.{ours}.weight"])
        both = tensors[at + "self_attn.kv_b_proj.weight"].reshape(heads, nope + value, latent)
        put(to + "attn_k_b.weight", both[:, :nope].transpose(0, 2, 1))
        put(to + "attn_v_b.weight", both[:, nope:])
        if layer < config["first_k_dense_replace"]:
            for part in ("gate", "up", "down"):
                put(f"{to}ffn_{part}.weight", tensors[f"{at}mlp.{part}_proj.weight"])
            continue
        put(to + "ffn_gate_inp.weight", tensors[at + "mlp.gate.weight"])
        put(to + "exp_probs_b.bias", tensors[at + "mlp.gate.e_score_correction_bias"])
        for part in ("gate", "up", "down"):
            matrices = [tensors[f"{at}mlp.experts.{expert}.{part}_proj.weight"] for expert in range(experts)]
            put(f"{to}ffn_{part}_exps.weight", np.stack(matrices))
            put(f"{to}ffn_{part}_shexp.weight", tensors[f"{at}mlp.shared_experts.{part}_proj.weight"])


def interleave(matrix, heads):
    """Rows of llama.cpp's llama: pairs that are rotated together lie side by side instead of half a head apart."""
    shape = matrix.shape
    return matrix.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def grouped(writer, config, tensors, put):
    heads, pairs = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_head_count_kv(pairs)
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    kind, theta, rope = rope_of(config)
    is_llama = config["model_type"] == "llama"
    if kind == "llama3":
        # Hugging Face's rule: long waves are slowed down, those between two lengths in part.
        frequencies = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        waves, original = 2 * math.pi / frequencies, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (original / waves - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors = np.where(waves > original / low, rope["factor"], np.where(waves < original / high, 1.0, between))
        put("rope_freqs.weight", factors)
    for layer in range(config["num_hidden_layers"]):
        at, to = f"model.layers.{layer}.", f"blk.{layer}."
        for part, count in {"q": heads, "k": pairs, "v": 0, "o": 0}.items():
            theirs = to + ("attn_output" if part == "o" else f"attn_{part}")
            for end in ("weight", "bias"):
                tensor = tensors.get(f"{at}self_attn.{part}_proj.{end}")
                if tensor is not None:
                    put(f"{theirs}.{end}", interleave(tensor, count) if is_llama and count else tensor)
        for part in ("gate", "up", "down"):
            put(f"{to}ffn_{part}.weight", tensors[f"{at}mlp.{part}_proj.weight"])


def write(name, path):
    folder = HERE / name
    config = json.loads((folder / "config.published.json" if (folder / "config.published.json").exists() else
                         folder / "config.json").read_text())
    tensors = weights(folder, config)
    latent = "kv_lora_rank" in config
    architecture = "deepseek2" if latent else config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)

    def put(name, tensor):
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))

    writer.add_name(name)
    common(writer, config, architecture)
    (deepseek2 if latent else grouped)(writer, config, tensors, put)
    put("token_embd.weight", tensors["model.embed_tokens.weight"])
    put("output_norm.weight", tensors["model.norm.weight"])
    if not config["tie_word_embeddings"]:
        put("output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        put(f"blk.{layer}.attn_norm.weight", tensors[f"model.layers.{layer}.input_layernorm.weight"])
        put(f"blk.{layer}.ffn_norm.weight", tensors[f"model.layers.{layer}.post_attention_layernorm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def evaluate(name, path):
    model = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, flash_attn=False,
                            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, verbose=False)
    golden, prompts = json.loads((HERE / name / "golden.json").read_text()), []
    for prompt in golden["prompts"]:
        model.reset()
        model.eval(prompt["tokens"])
        logits = model.scores[: len(prompt["tokens"])]
        rows = [[float(f"{value:.8g}") for value in logits[position]] for position in prompt["positions"]]
        theirs = np.array(prompt["logits"])
        error = np.abs(np.array(rows) - theirs).max() / np.abs(theirs).max()
        print(f"{name}: {len(prompt['tokens'])} tokens, {error:.1e} from transformers")
        prompts.append({"tokens": prompt["tokens"], "positions": prompt["positions"], "logits": rows})
    return prompts


def main():
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in MODELS:
            path = pathlib.Path(scratch) / f"{name}.gguf"
            write(name, path)
            found[name] = evaluate(name, path)
    (HERE / "llama.cpp.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
