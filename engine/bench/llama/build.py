#!/usr/bin/env python3
"""Builds llama.cpp's llama-bench and random models of the bench's shape, to be measured beside our engine: bfloat16, and
what llama-quantize makes of it.

    python3 engine/bench/llama/build.py --config engine/bench/model/config.json --out .lab/llama

llama.cpp comes from PyPI's source package of llama-cpp-python, which carries it; it is built with -march=native as its
documentation says for CPUs. Needs cmake, ninja and a C++ compiler; about five minutes on two cores, once. Nothing of it
enters this repository.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tarfile

VERSION = "0.3.36"
SOURCE = f"llama_cpp_python-{VERSION}"
QUANTISED = ["Q8_0", "Q4_K_M"]
REQUIREMENTS = ["numpy==2.4.6", "gguf==0.19.0"]


def run(*command, **options):
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def build(out):
    """llama-bench and llama-quantize under `out`, unless they are there."""
    programs = [out / "build" / "bin" / name for name in ("llama-bench", "llama-quantize")]
    if all(program.exists() for program in programs):
        return programs
    python = out / "venv" / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", out / "venv")
        run(python, "-m", "pip", "install", "--quiet", *REQUIREMENTS)
    archive = out / f"{SOURCE}.tar.gz"
    if not archive.exists():
        run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", out,
            f"llama-cpp-python=={VERSION}")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    source = out / SOURCE / "vendor" / "llama.cpp"
    run("cmake", "-S", source, "-B", out / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON",
        "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF")
    run("ninja", "-C", out / "build", "llama-bench", "llama-quantize")
    return programs


def model(config, path):
    """A deepseek2 GGUF of the shape of `config`, random bfloat16 weights (tensor names: llama.cpp, gguf-py/gguf/constants.py)."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "deepseek2")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, rank, vocabulary = config["kv_lora_rank"], config["q_lora_rank"], config["vocab_size"]
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    shared = config["n_shared_experts"] * inner
    writer.add_name("bench")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(rank)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # Token ids are all that llama-bench uses; the pieces only have to be there.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(vocabulary)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocabulary)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(1)

    def tensor(name, *shape, kind="bf16"):
        if kind == "one":
            writer.add_tensor(name, np.ones(shape, np.float32))
            return
        values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.7 / np.sqrt(shape[-1]))
        if kind == "f32":
            writer.add_tensor(name, values)
        else:
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(values, bf16), raw_dtype=bf16)

    tensor("token_embd.weight", vocabulary, hidden)
    tensor("output.weight", vocabulary, hidden)
    tensor("output_norm.weight", hidden, kind="one")
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}."
        for name, width in [("attn_norm", hidden), ("attn_q_a_norm", rank), ("attn_kv_a_norm", latent), ("ffn_norm", hidden)]:
            tensor(f"{at}{name}.weight", width, kind="one")
        tensor(at + "attn_q_a.weight", rank, hidden)
        tensor(at + "attn_q_b.weight", heads * (nope + rope), rank)
        tensor(at + "attn_kv_a_mqa.weight", latent + rope, hidden)
        tensor(at + "attn_k_b.weight", heads, latent, nope)
        tensor(at + "attn_v_b.weight", heads, value, latent)
        tensor(at + "attn_output.weight", hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            width = config["intermediate_size"]
            tensor(at + "ffn_gate.weight", width, hidden)
            tensor(at + "ffn_up.weight", width, hidden)
            tensor(at + "ffn_down.weight", hidden, width)
            continue
        tensor(at + "ffn_gate_inp.weight", experts, hidden, kind="f32")
        tensor(at + "exp_probs_b.bias", experts, kind="f32")
        tensor(at + "ffn_gate_exps.weight", experts, inner, hidden)
        tensor(at + "ffn_up_exps.weight", experts, inner, hidden)
        tensor(at + "ffn_down_exps.weight", experts, hidden, inner)
        tensor(at + "ffn_gate_shexp.weight", shared, hidden)
        tensor(at + "ffn_up_shexp.weight", shared, hidden)
        tensor(at + "ffn_down_shexp.weight", hidden, shared)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--model-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    path = out / "model-bf16.gguf"
    if arguments.model_only:
        model(json.loads(arguments.config.read_text()), path)
        return
    out.mkdir(parents=True, exist_ok=True)
    program, quantise = build(out)
    if not path.exists():
        run(out / "venv" / "bin" / "python", __file__, "--config", arguments.config.resolve(), "--out", out, "--model-only")
    for kind in QUANTISED:
        quantised = out / f"model-{kind.lower()}.gguf"
        if not quantised.exists():
            run(quantise, path, quantised, kind)
    print(program)


if __name__ == "__main__":
    main()
