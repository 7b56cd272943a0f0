"""What PyTorch says, as JSON: this card's rates, PyTorch's times for the same work, and transformers' logits.

    python3 torch_side.py bounds
    python3 torch_side.py logits FOLDER      writes models there, and runs gpu-check beside this file on them
"""

import json
import pathlib
import shutil
import statistics
import subprocess
import sys


def replay(torch, work, launches=24, replays=11):
    """Median milliseconds of one call of `work`, by events over replays of a CUDA graph."""
    for _ in range(3):
        work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            work(index)
    times = []
    for _ in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / launches)
    return statistics.median(times[2:])


def bounds():
    import torch
    import torch.nn.functional as F

    torch.manual_seed(1)
    device = {"device": "cuda", "dtype": torch.bfloat16}
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / replay(torch, lambda _: target.copy_(source), 4) / 1e6
    del source, target
    a, b = (torch.randn(8192, 8192, **device) for _ in range(2))
    out = torch.empty(8192, 8192, **device)
    product = 2 * 8192**3 / replay(torch, lambda _: torch.mm(a, b, out=out), 4) / 1e9
    del a, b, out
    theirs = {}

    def gemm(m, n, k):
        copies = max(1, min(24, int(128e6 / (2 * n * k)) + 1))
        weights = [torch.randn(n, k, **device) for _ in range(copies)]
        x = torch.randn(m, k, **device)
        theirs[f"gemm Bf16 {m}x{n}x{k}"] = replay(torch, lambda i: F.linear(x, weights[i % copies]))

    for m in (1, 16, 64, 4096):
        for n, k in ((3072, 2048), (21888, 2048)):
            gemm(m, n, k)
    for rows in (1, 64, 4096):
        x, w = torch.randn(rows, 7168, **device), torch.randn(7168, **device)
        theirs[f"rms_norm Bf16 {rows}x7168"] = replay(torch, lambda _: F.rms_norm(x + x, (7168,), w, 1e-6))
        g = torch.randn(rows, 2, 2048, **device)
        theirs[f"swiglu Bf16 {rows}x2048"] = replay(torch, lambda _: F.silu(g[:, 0]) * g[:, 1])
    for rows in (1, 64):
        # Contiguous keys and values, where ours are paged.
        for heads, kv_heads, width in ((32, 4, 128), (32, 8, 128), (14, 2, 64)):
            q = torch.randn(rows, heads, 1, width, **device)
            k, v = (torch.randn(rows, kv_heads, 4096, width, **device) for _ in range(2))
            name = f"gqa_decode {rows}x4096, {heads}/{kv_heads}x{width}"
            theirs[name] = replay(torch, lambda _: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
            del q, k, v
    for heads, kv_heads, width in ((32, 4, 128), (32, 8, 128), (14, 2, 64)):
        q = torch.randn(1, heads, 128, width, **device)
        k, v = (torch.randn(1, kv_heads, 4096, width, **device) for _ in range(2))
        name = f"gqa_prefill chunk 128x4096, {heads}/{kv_heads}x{width}"
        theirs[name] = replay(torch, lambda _: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
        del q, k, v
    for length in (1024, 4096):
        q, k = (torch.randn(1, 16, length, 192, **device) for _ in range(2))
        v = torch.randn(1, 16, length, 128, **device)
        name = f"mla_prefill {length}, 16 heads"
        theirs[name] = replay(torch, lambda _: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return {"ok": True, "torch_version": torch.__version__, "device": torch.cuda.get_device_name(), "copy_gb_per_s": round(copy, 1),
            "bf16_tflop_per_s": round(product, 1), "torch": theirs}


COMMON = {"vocab_size": 4096, "num_hidden_layers": 2, "first_k_dense_replace": 1, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
          "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "bos_token_id": 0,
          "eos_token_id": 1, "tie_word_embeddings": False, "attention_bias": False,
          "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
# Slices of the published shapes: their widths and heads, two layers, and of V3 sixteen of its experts.
SLICES = {
    "v2-lite": ("DeepseekV2", {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                               "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
                               "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
                               "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False}),
    "v3": ("DeepseekV3", {"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                          "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 16,
                          "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                          "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_nextn_predict_layers": 0}),
}
# As the CUDA backend's own tests allow; a near tie of a gate may become another expert and move a row further.
MEDIAN_MAX = 5e-2


def logits(folder, ours):
    import torch
    import transformers

    found, bad = {}, []
    for name, (family, fields) in SLICES.items():
        place = folder / name
        try:
            config = getattr(transformers, family + "Config")(**COMMON, **fields)
            torch.manual_seed(7)
            with torch.device("cuda"):
                model = getattr(transformers, family + "ForCausalLM")(config).bfloat16().eval()
            for key, value in model.named_parameters():
                torch.nn.init.ones_(value) if "norm" in key else torch.nn.init.normal_(value, std=value.shape[-1] ** -0.5)
            write(place, model, config, family)
            prompts = [torch.randint(2, 4096, (n,)).tolist() for n in (1, 9, 100, 333)]
            (place / "prompts.json").write_text(json.dumps(prompts))
            errors = []
            with torch.no_grad():
                wanted = [model(torch.tensor([tokens], device="cuda")).logits[0, -1].float().cpu() for tokens in prompts]
            del model
            torch.cuda.empty_cache()
            for row, expected in zip(ours(place, place / "prompts.json")["logits"], wanted):
                errors.append(float((torch.tensor(row) - expected).abs().max() / expected.abs().max()))
            found[name] = {"relative_errors": errors}
            bad += [name] * (statistics.median(errors) > MEDIAN_MAX)
        except Exception as error:  # noqa: BLE001: the other slice must run
            found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            bad.append(name)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            torch.cuda.empty_cache()
    return {"ok": not bad, "models": found, "error": ", ".join(bad) or None}


def write(place, model, config, family):
    """config.json and safetensors under the published names: a matrix for each expert."""
    from safetensors.torch import save_file

    place.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                tensors[key.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate.contiguous()
                tensors[key.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up.contiguous()
        elif key.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[key.replace("down_proj", f"{expert}.down_proj.weight")] = down.contiguous()
        else:
            tensors[key] = tensor.float() if key.endswith("e_score_correction_bias") else tensor.contiguous()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads(config.to_json_string(use_diff=True))
    fields |= {"architectures": [family + "ForCausalLM"], "model_type": "deepseek_" + family[-2:].lower(), "dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(fields))


def backend(folder, prompts):
    """The CUDA backend's logits."""
    program = pathlib.Path(__file__).resolve().parent / "gpu-check"
    done = subprocess.run([program, "logits", folder, prompts], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return json.loads(done.stdout)


def main():
    match sys.argv[1:]:
        case ["bounds"]:
            found = bounds()
        case ["logits", folder]:
            found = logits(pathlib.Path(folder), backend)
        case _:
            sys.exit(__doc__)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
