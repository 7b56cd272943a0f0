"""What PyTorch says, as JSON: this card's rates, PyTorch's times for the same work, and transformers' logits.

    python3 torch_side.py names                              the cases that PyTorch is timed for at true widths
    python3 torch_side.py bounds DEVICE WIDTHS               a line of JSON for each thing that was measured
    python3 torch_side.py logits DEVICE WIDTHS FOLDER        writes models there, and runs gpu-check beside this file on them

DEVICE is cuda or cpu, WIDTHS true or small: small ones on a processor try this program, and their times mean nothing.
"""

import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

# Bytes that the copies of what is read should exceed, so that no cache holds them: as the kernels' own times are taken.
COLD_BYTES = 128e6
COPIES_MAX = 24

GROUPED_HEADS = ((32, 4, 128), (32, 8, 128), (14, 2, 64))
WIDTHS = {
    "true": {
        "copy_bytes": 1 << 30, "square": 8192, "rows": (1, 16, 64, 4096), "bf16": ((3072, 2048), (21888, 2048)),
        "fp8": ((24576, 1536), (7168, 16384), (2112, 7168)), "tokens": (1, 16, 64, 1024, 4096),
        "grouped_bf16": (64, 6, 2816, 2048), "grouped_fp8": (64, 8, 4096, 7168), "decode": ((1, 4096), (64, 4096)),
        "heads": (16, 128), "chunk": (128, 4096), "prefill": (1024, 4096), "prefill_heads": 16, "norm_rows": (1, 64, 4096),
        "hidden": 7168, "inner": 2048,
    },
    "small": {
        "copy_bytes": 1 << 20, "square": 128, "rows": (1, 20), "bf16": ((192, 128),), "fp8": ((192, 256),), "tokens": (3,),
        "grouped_bf16": (8, 2, 96, 128), "grouped_fp8": (8, 2, 128, 256), "decode": ((2, 70),), "heads": (3,), "chunk": (5, 70),
        "prefill": (33,), "prefill_heads": 2, "norm_rows": (1, 7), "hidden": 256, "inner": 384,
    },
}


class Bench:
    """Times work on one device; `torch` is imported by whoever makes one."""

    def __init__(self, torch, device):
        self.torch, self.device = torch, device
        self.is_cuda = device == "cuda"

    def randn(self, *shape):
        return self.torch.randn(*shape, device=self.device, dtype=self.torch.bfloat16)

    def codes(self, *shape):
        return self.torch.randn(*shape, device=self.device, dtype=self.torch.bfloat16).to(self.torch.float8_e4m3fn)

    def ones(self, *shape):
        return self.torch.ones(*shape, device=self.device, dtype=self.torch.float32)

    def cold(self, size, make):
        """As many of what `make` makes, of so many bytes, as no cache holds."""
        count = max(1, min(COPIES_MAX, int(COLD_BYTES / size) + 1)) if self.is_cuda else 1
        return [make() for _ in range(count)]

    def replay(self, work, launches=24, replays=7):
        """Median milliseconds of one call of `work`, by events over replays of a CUDA graph."""
        if not self.is_cuda:
            begin = time.perf_counter()
            work(0)
            return 1e3 * (time.perf_counter() - begin)
        torch = self.torch
        for _ in range(3):
            work(0)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work(0)
        end.record()
        torch.cuda.synchronize()
        # Long work gains nothing from many launches in a graph, and the time on a device is short.
        launches = max(1, min(launches, int(20 / max(begin.elapsed_time(end), 1e-3))))
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


def linear(m, n, k):
    def build(b):
        weights, x = b.cold(2 * n * k, lambda: b.randn(n, k)), b.randn(m, k)
        return lambda i: b.torch.nn.functional.linear(x, weights[i % len(weights)])
    return build


def scaled(m, n, k, scales):
    """An fp8 product with scales for blocks of 128, as ours has, for rows, or one for all."""
    def build(b):
        a, weights = b.codes(m, k), b.cold(n * k, lambda: b.codes(n, k))
        blocks = -(-k // 128)
        of_a, of_b = {"blocks of 128": lambda: (b.ones(blocks, m).t(), b.ones(-(-n // 128), blocks).t()),
                      "rows": lambda: (b.ones(m, 1), b.ones(1, n)), "all": lambda: (b.ones(()), b.ones(()))}[scales]()
        return lambda i: b.torch._scaled_mm(a, weights[i % len(weights)].t(), scale_a=of_a, scale_b=of_b,
                                            out_dtype=b.torch.bfloat16)
    return build


def ends(b, rows, experts):
    """The last row of each expert, all about as many."""
    return b.torch.tensor([rows * (e + 1) // experts for e in range(experts)], device=b.device, dtype=b.torch.int32)


def grouped(tokens, shape):
    experts, top_k, n, k = shape

    def build(b):
        rows = tokens * top_k
        x, weights, offsets = b.randn(rows, k), b.randn(experts, n, k).transpose(1, 2), ends(b, rows, experts)
        return lambda _: b.torch._grouped_mm(x, weights, offs=offsets)
    return build


def scaled_grouped(tokens, shape):
    experts, top_k, n, k = shape

    def build(b):
        rows = tokens * top_k
        x, offsets = b.codes(rows, k), ends(b, rows, experts)
        # An expert at a time: the bf16 form of all would be gigabytes.
        weights = b.torch.stack([b.codes(n, k) for _ in range(experts)]).transpose(1, 2)
        of_x, of_weights = b.ones(rows), b.ones(experts, n)
        return lambda _: b.torch._scaled_grouped_mm(x, weights, of_x, of_weights, offs=offsets, out_dtype=b.torch.bfloat16)
    return build


def attention(queries, keys, value_width, **options):
    """Of shapes `[batch, heads, length, width]`; keys and values are contiguous, where ours are paged. Values are the first
    part of the keys, as in a latent cache, where they are narrower and their heads are as many."""
    def build(b):
        q, k = b.randn(*queries), b.randn(*keys)
        v = k[..., :value_width] if options.get("latent") else b.randn(*keys[:3], value_width)
        rest = {name: value for name, value in options.items() if name != "latent"}
        return lambda _: b.torch.nn.functional.scaled_dot_product_attention(q, k, v, **rest)
    return build


def rows_of(compiled, function, *shapes):
    """A function of rows, as written or compiled, on a GPU to one kernel of Triton."""
    def build(b):
        size = 2 * sum(math.prod(shape) for shape in shapes)
        inputs = b.cold(size, lambda: [b.randn(*shape) for shape in shapes])
        work = lambda *tensors: function(b.torch, *tensors)  # noqa: E731
        if compiled:
            work = b.torch.compile(work, dynamic=False, backend="inductor" if b.is_cuda else "aot_eager")
        return lambda i: work(*inputs[i % len(inputs)])
    return build


def norm(torch, x, residual, weight):
    total = x + residual
    return total, torch.nn.functional.rms_norm(total, (total.shape[-1],), weight, 1e-6)


def swiglu(torch, x):
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def comparisons(w):
    """Names of our cases, and for each the ways that PyTorch may do it in, best first: the first that runs is timed. What is
    compiled comes last, for it takes seconds."""
    for m in w["rows"]:
        for n, k in w["bf16"]:
            yield f"gemm Bf16 {m}x{n}x{k}", [("F.linear", linear(m, n, k))]
        for n, k in w["fp8"]:
            yield f"gemm Fp8 {m}x{n}x{k}", [(f"_scaled_mm, scales of {scales}", scaled(m, n, k, scales))
                                            for scales in ("blocks of 128", "rows", "all")]
    for rows, context in w["decode"]:
        for heads in w["heads"]:
            # All heads read the one latent, so that they are queries of one head.
            yield (f"mla_decode Bf16 {rows}x{context}, {heads} heads",
                   [("SDPA", attention((rows, 1, heads, 576), (rows, 1, context, 576), 512, latent=True))])
        for heads, kv_heads, width in GROUPED_HEADS:
            yield (f"gqa_decode {rows}x{context}, {heads}/{kv_heads}x{width}",
                   [("SDPA", attention((rows, heads, 1, width), (rows, kv_heads, context, width), width, enable_gqa=True))])
    rows, context = w["chunk"]
    for heads in w["heads"]:
        yield (f"hopper_mla_decode chunk {rows}x{context}, {heads} heads",
               [("SDPA", attention((1, 1, rows * heads, 576), (1, 1, context, 576), 512, latent=True))])
    for heads, kv_heads, width in GROUPED_HEADS:
        yield (f"gqa_prefill chunk {rows}x{context}, {heads}/{kv_heads}x{width}",
               [("SDPA", attention((1, heads, rows, width), (1, kv_heads, context, width), width, enable_gqa=True))])
    for length in w["prefill"]:
        heads = w["prefill_heads"]
        yield (f"mla_prefill {length}, {heads} heads",
               [("SDPA", attention((1, heads, length, 192), (1, heads, length, 192), 128, is_causal=True))])
    for form, way in (("bf16", ("_grouped_mm", grouped)), ("fp8", ("_scaled_grouped_mm, scales of rows", scaled_grouped))):
        shape = w[f"grouped_{form}"]
        experts, top_k, n, k = shape
        for tokens in w["tokens"]:
            yield f"grouped_gemm {form.capitalize()} {tokens}x{top_k} of {experts}x{n}x{k}", [(way[0], way[1](tokens, shape))]
    for rows in w["norm_rows"]:
        hidden, inner = w["hidden"], w["inner"]
        for name, function, shapes in ((f"rms_norm Bf16 {rows}x{hidden}", norm, ((rows, hidden), (rows, hidden), (hidden,))),
                                       (f"swiglu Bf16 {rows}x{inner}", swiglu, ((rows, 2 * inner),))):
            yield name, [("torch.compile", rows_of(True, function, *shapes)), ("as written", rows_of(False, function, *shapes))]


def say(**part):
    short = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in part.items()}
    print(json.dumps(short), flush=True)


def rates(b, w):
    """What the card does at best: bytes of a copy, read and written; products of large squares."""
    torch = b.torch
    source = torch.empty(w["copy_bytes"], dtype=torch.uint8, device=b.device).random_()
    target = torch.empty_like(source)
    say(copy_gb_per_s=2 * source.numel() / b.replay(lambda _: target.copy_(source), 4) / 1e6)
    del source, target
    side = w["square"]
    x, y, out = (b.randn(side, side) for _ in range(3))
    say(bf16_tflop_per_s=2 * side**3 / b.replay(lambda _: torch.mm(x, y, out=out), 4) / 1e9)
    del x, y, out
    try:
        say(fp8_tflop_per_s=2 * side**3 / b.replay(scaled(side, side, side, "all")(b), 4) / 1e9)
    except Exception as error:  # noqa: BLE001: PyTorch may lack it
        say(absent={"fp8 rate": f"{type(error).__name__}: {error}"[:200]})


def bounds(device, widths):
    import torch

    torch.manual_seed(1)
    b, w = Bench(torch, device), WIDTHS[widths]
    say(torch_version=torch.__version__, torch_device=torch.cuda.get_device_name() if b.is_cuda else device)
    rates(b, w)
    for name, ways in comparisons(w):
        reasons = []
        for how, build in ways:
            try:
                with torch.no_grad():
                    milliseconds = b.replay(build(b))
            except Exception as error:  # noqa: BLE001: what one cannot do the next one may
                reasons.append(f"{how}: {type(error).__name__}: {error}"[:200])
            else:
                say(torch={name: milliseconds}, by={name: how}, passed_over={name: "; ".join(reasons)} if reasons else {})
                break
            finally:
                if b.is_cuda:
                    torch.cuda.empty_cache()
        else:
            say(absent={name: "; ".join(reasons)})


COMMON = {"vocab_size": 4096, "num_hidden_layers": 2, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6,
          "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
          "attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
HEADS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SMALL_HEADS = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
# Slices of the published shapes: their widths and heads, two layers, and of V3 sixteen of its experts.
SLICES = {
    "v2-lite": ("DeepseekV2", {**HEADS, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                               "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
                               "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
                               "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False}),
    "v3": ("DeepseekV3", {**HEADS, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
                          "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 16,
                          "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                          "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_nextn_predict_layers": 0}),
}
SMALL = {**SMALL_HEADS, "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 32,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
PROMPTS = {"true": (1, 9, 100, 333), "small": (1, 9)}
# As the CUDA backend's own tests allow; a near tie of a gate may become another expert and move a row further.
MEDIAN_MAX = 5e-2


def fields_of(name, widths):
    family, fields = SLICES[name]
    fields = {**COMMON, **fields}
    if widths == "small":
        fields |= SMALL | ({"q_lora_rank": 48} if fields["q_lora_rank"] else {})
    return family, fields


def random_model(name, device, widths):
    """A model whose weights are bf16, to be computed with in float32; matrices keep the spread of what they multiply."""
    import torch
    import transformers

    family, fields = fields_of(name, widths)
    config = getattr(transformers, family + "Config")(**fields)
    with torch.device(device):
        model = getattr(transformers, family + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            torch.nn.init.ones_(value) if "norm" in key else torch.nn.init.normal_(value, std=value.shape[-1] ** -0.5)
            value.copy_(value.bfloat16())
    return model, config, family


def logits(device, widths, folder, ours):
    import torch

    found, bad = {}, []
    for name in SLICES:
        place = folder / name
        try:
            torch.manual_seed(7)
            model, config, family = random_model(name, device, widths)
            write(place, model, config, family)
            vocabulary = fields_of(name, widths)[1]["vocab_size"]
            prompts = [torch.randint(2, vocabulary, (n,)).tolist() for n in PROMPTS[widths]]
            (place / "prompts.json").write_text(json.dumps(prompts))
            with torch.no_grad():
                wanted = [model(torch.tensor([tokens], device=device)).logits[0, -1].float().cpu() for tokens in prompts]
            del model
            if device == "cuda":
                torch.cuda.empty_cache()
            answer = ours(place, place / "prompts.json")
            errors = [float((torch.tensor(row) - expected).abs().max() / expected.abs().max())
                      for row, expected in zip(answer["logits"], wanted, strict=True)]
            found[name] = {"relative_errors": errors, "choices": answer.get("choices")}
            # A NaN is no error that is small enough.
            bad += [name] * (not all(error == error for error in errors) or not statistics.median(errors) <= MEDIAN_MAX)
        except Exception as error:  # noqa: BLE001: the other slice must run
            found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            bad.append(name)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    return {"ok": not bad, "models": found, "error": ", ".join(bad) or None}


def write(place, model, config, family):
    """config.json and safetensors under the published names: a matrix for each expert."""
    from safetensors.torch import save_file

    place.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, tensor in model.state_dict().items():
        tensor = tensor if key.endswith("e_score_correction_bias") else tensor.bfloat16()
        if key.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                tensors[key.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate.contiguous()
                tensors[key.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up.contiguous()
        elif key.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                tensors[key.replace("down_proj", f"{expert}.down_proj.weight")] = down.contiguous()
        else:
            tensors[key] = tensor.contiguous()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    # Every field, not only those that differ from the library's defaults: ours are others.
    fields = json.loads(config.to_json_string(use_diff=False))
    fields |= {"architectures": [family + "ForCausalLM"], "model_type": "deepseek_" + family[-2:].lower(), "dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(fields))


def backend(folder, prompts):
    """The CUDA backend's logits."""
    program = os.environ.get("GPU_CHECK_PROGRAM") or pathlib.Path(__file__).resolve().parent / "gpu-check"
    done = subprocess.run([program, "logits", folder, prompts], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return json.loads(done.stdout)


def main():
    match sys.argv[1:]:
        case ["names"]:
            print(json.dumps([name for name, _ in comparisons(WIDTHS["true"])]))
        case ["bounds", ("cuda" | "cpu") as device, ("true" | "small") as widths]:
            bounds(device, widths)
        case ["logits", ("cuda" | "cpu") as device, ("true" | "small") as widths, folder]:
            print(json.dumps(logits(device, widths, pathlib.Path(folder), backend)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
