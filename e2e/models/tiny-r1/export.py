"""Writes a training checkpoint in the published on-disk form of DeepSeek-V3 and proves that transformers computes the same logits.

The averaged weights are rounded to bfloat16 once, here; the proof compares both programs in float32 on the rounded weights, on
held-out conversations and on one longer than the context YaRN starts from.

usage: python export.py --checkpoint FOLDER/checkpoint.pt --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

import tasks
import tokenizer
from model import Shape, TinyR1

LOGITS_RELATIVE_MAX = 1e-4


def config_json(shape: Shape) -> dict[str, object]:
    """The content of config.json, with the fields and the order of the published DeepSeek-V3 one."""
    given = {name: value for name, value in asdict(shape).items() if not name.startswith("yarn_")}
    fields = given | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions_max,
        "model_type": "deepseek_v3",
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": shape.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "pretraining_tp": 1,
        "rope_theta": int(shape.rope_theta),
        "rope_scaling": {
            "beta_fast": int(shape.yarn_beta_fast),
            "beta_slow": int(shape.yarn_beta_slow),
            "factor": int(shape.yarn_factor),
            "mscale": shape.yarn_mscale,
            "mscale_all_dim": shape.yarn_mscale,
            "original_max_position_embeddings": shape.yarn_original_positions,
            "type": "yarn",
        },
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
    }
    return dict(sorted(fields.items()))


def generation_config_json() -> dict[str, object]:
    """The content of generation_config.json: R1's recommended sampling."""
    return {
        "_from_model_config": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "transformers_version": "4.46.3",
    }


def published_tensors(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under their published names: experts one by one, all bfloat16 except the gate's correction bias."""
    for name, tensor in state.items():
        if name == "lm_head.weight":
            yield name, tensor.bfloat16()
        elif name.endswith("e_score_correction_bias"):
            yield f"model.{name}", tensor.float()
        elif name.endswith("expert_gate_up"):
            prefix = f"model.{name.removesuffix('expert_gate_up')}experts"
            for expert, matrix in enumerate(tensor.bfloat16()):
                gate, up = matrix.t().chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
        elif name.endswith("expert_down"):
            prefix = f"model.{name.removesuffix('expert_down')}experts"
            for expert, matrix in enumerate(tensor.bfloat16()):
                yield f"{prefix}.{expert}.down_proj.weight", matrix.t()
        else:
            yield f"model.{name}", tensor.bfloat16()


def write(state: dict[str, Tensor], shape: Shape, out: Path) -> None:
    """Writes weights, configs and tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in sorted(published_tensors(state))}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config_json(shape), indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation_config_json(), indent=2) + "\n")
    tokenizer.write(out)


def rounded_model(state: dict[str, Tensor], shape: Shape) -> TinyR1:
    """The lean model with the weights as they are on disk."""
    model = TinyR1(shape)
    model.load_state_dict({name: tensor if name.endswith("bias") else tensor.bfloat16().float() for name, tensor in state.items()})
    return model.eval()


@torch.no_grad()
def prove(model: TinyR1, out: Path) -> float:
    """The largest difference of logits between this program and transformers, relative to the largest logit; raises if too large."""
    from transformers import AutoModelForCausalLM

    published = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()
    encoder = Tokenizer.from_file(str(out / "tokenizer.json"))
    rng, worst = random.Random(3), 0.0
    texts = [(example := tasks.generate(form, rng, "held_out")).prompt() + example.completion() for form in tasks.Form for _ in range(4)]
    for text in [*texts, "".join(texts)]:
        ids = torch.tensor([encoder.encode(text, add_special_tokens=False).ids])
        ours, theirs = model(ids), published(input_ids=ids).logits
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    if worst > LOGITS_RELATIVE_MAX:
        raise SystemExit(f"logits differ from transformers by {worst:.2e} relative, more than {LOGITS_RELATIVE_MAX:.0e}: the lean forward is wrong")
    return worst


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)
    checkpoint = torch.load(args.checkpoint, weights_only=True)
    shape = Shape()
    write(checkpoint["average"], shape, args.out)
    worst = prove(rounded_model(checkpoint["average"], shape), args.out)
    progress = checkpoint["progress"]
    print(f"exported step {progress['step']} ({progress['seconds']:.0f} s of training); logits equal transformers' to {worst:.1e} relative")


if __name__ == "__main__":
    main()
