"""Trains a prediction layer (multi-token prediction) for tiny-r1, whose own weights stay as they are.

The layer is transformers' MtpModel: from the trunk's last hidden state and the next token to the token after it. It starts as a copy
of the trunk's last layer and is trained on the same generated questions; trunk, embedding and head are frozen. The result is one
file with the tensors of layer 4 under their published names, to be put beside model.safetensors under an index.

usage: python train_prediction.py --out prediction/layer.safetensors --minutes 6
Needs torch 2.11 and transformers 5.23.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

import tasks
import tokenizer
from tasks import Form
from train import BASE_SHARES, IGNORED, collate, encode

HERE = Path(__file__).parent


def load_trunk() -> torch.nn.Module:
    """tiny-r1 in float32, frozen."""
    config = AutoConfig.from_pretrained(HERE)
    config.num_nextn_predict_layers = 1
    trunk = AutoModelForCausalLM.from_pretrained(HERE, config=config, dtype=torch.float32, attn_implementation="eager").eval()
    return trunk.requires_grad_(False)


def new_layer(trunk: torch.nn.Module) -> MtpModel:
    """A prediction layer that starts as the trunk's last layer over the sum of both inputs."""
    mtp = MtpModel(trunk, 1).float()
    layer, hidden = mtp.layers[0], trunk.config.hidden_size
    layer.mtp_block.load_state_dict(trunk.model.layers[-1].state_dict())
    layer.post_norm.load_state_dict(trunk.model.norm.state_dict())
    with torch.no_grad():
        layer.eh_proj.weight.copy_(torch.cat([torch.eye(hidden), torch.eye(hidden)], dim=1) * 0.5)
    layer.requires_grad_(True)
    # Routing stays as copied: its bias is a buffer, and the gate learns like any weight.
    return mtp


def predictions(trunk: torch.nn.Module, mtp: MtpModel, inputs: Tensor) -> Tensor:
    """Logits of the token after the next one, for every position but the last."""
    with torch.no_grad():
        hidden = trunk.model(input_ids=inputs).last_hidden_state[:, :-1]
    places = torch.arange(1, inputs.shape[1])[None]
    return trunk.lm_head(mtp.forward_layer(0, hidden, places, None, input_ids=inputs[:, 1:]))


def draw(encoder: Tokenizer, rng: random.Random, count: int, split: str) -> tuple[Tensor, Tensor]:
    """Conversations, and at each position but the last the token after the next one where that is part of the answer."""
    shares = [BASE_SHARES[form] for form in Form]
    inputs, labels = collate(encode([tasks.generate(form, rng, split) for form in rng.choices(list(Form), shares, k=count)], encoder))
    return inputs, labels[:, 1:]


@torch.no_grad()
def right(trunk: torch.nn.Module, mtp: MtpModel, encoder: Tokenizer, count: int = 200) -> float:
    """The share of held-out answer tokens that the layer foresees."""
    mtp.eval()
    inputs, labels = draw(encoder, random.Random("prediction:held_out"), count, "held_out")
    found = predictions(trunk, mtp, inputs).argmax(-1)
    mtp.train()
    wanted = labels != IGNORED
    return float((found == labels)[wanted].float().mean())


def published(trunk: torch.nn.Module, mtp: MtpModel) -> dict[str, Tensor]:
    """The layer's tensors as a published checkpoint has them: bfloat16, one matrix per expert."""
    prefix, out = f"model.layers.{trunk.config.num_hidden_layers}.", {}
    for name, tensor in mtp.layers[0].state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        tensor = tensor.float() if name.endswith("e_score_correction_bias") else tensor.bfloat16()
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2, dim=0)
                stem = f"{prefix}mlp.experts.{expert}."
                out[f"{stem}gate_proj.weight"], out[f"{stem}up_proj.weight"] = gate.clone(), up.clone()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                out[f"{prefix}mlp.experts.{expert}.down_proj.weight"] = down.clone()
        else:
            out[prefix + name] = tensor.contiguous().clone()
    return out


def train(args: argparse.Namespace) -> None:
    """Trains for the planned time and writes the layer."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    encoder = Tokenizer.from_str(json.dumps(tokenizer.tokenizer_json()))
    trunk = load_trunk()
    mtp = new_layer(trunk)
    optimizer = torch.optim.AdamW(mtp.layers[0].parameters(), lr=args.peak, betas=(0.9, 0.98), weight_decay=0.0)
    planned, started, step = args.minutes * 60, time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < planned and step < args.steps:
        rate = args.peak * min(1.0, (step + 1) / 50) * (0.98 * 0.5 * (1 + math.cos(math.pi * min(elapsed / planned, 1.0))) + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, labels = draw(encoder, random.Random(f"prediction:{args.seed}:{step}"), args.batch, "train")
        loss = F.cross_entropy(predictions(trunk, mtp, inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mtp.layers[0].parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % args.print_every == 0:
            share = right(trunk, mtp, encoder)
            print(f"step {step} {elapsed:.0f} s loss {loss.item():.4f} foreseen {share:.3f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(published(trunk, mtp), args.out, metadata={"format": "pt"})
    args.out.chmod(0o644)
    print(f"{args.out}: {step} steps, foreseen {right(trunk, mtp, encoder):.3f} of held-out answer tokens", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file for the layer")
    parser.add_argument("--minutes", type=float, default=6.0, help="planned training time")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after this many steps at the latest")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--print-every", type=int, default=50, help="steps between lines")
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments())
