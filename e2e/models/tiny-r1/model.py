"""A lean PyTorch forward of the DeepSeek-V3 architecture, for training tiny-r1 on a CPU.

It computes what `DeepseekV3ForCausalLM` of transformers computes (`export.py` asserts equal logits), but sorts the tokens by expert
once, so that each expert multiplies one contiguous block of rows; an expert's weight is applied before the down projection, which
is the same product in another order. 

A batch is flat: only attention sees the rectangles it is made of, one for each bucket of similar length, so that conversations of all
lengths share an update with little padding. Rectangles are padded on the right; causality then makes a mask for padding unnecessary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


Buckets = list[tuple[int, int]]
"""How a flat batch is cut into rectangles: (rows, length) of each, in order."""


ROWS_MULTIPLE = 32
"""Each expert's block of rows is padded to a multiple of this: oneDNN compiles a program for every new shape, so they must repeat."""


@dataclass(frozen=True)
class Shape:
    """The dimensions and constants of the model; names as in the published config.json."""

    vocab_size: int = 544
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn_factor: float = 4.0
    yarn_original_positions: int = 512
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    initializer_range: float = 0.02

    @property
    def positions_max(self) -> int:
        """The longest context, `max_position_embeddings`."""
        return int(self.yarn_factor * self.yarn_original_positions)

    @property
    def qk_head_dim(self) -> int:
        """The width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(width) times YaRN's mscale squared."""
        mscale = 0.1 * self.yarn_mscale * math.log(self.yarn_factor) + 1.0
        return self.qk_head_dim**-0.5 * mscale * mscale


def yarn_frequencies(shape: Shape) -> Tensor:
    """Rotation per position of each pair of rope dimensions, [qk_rope_head_dim / 2] (DeepSeek-V3 inference/model.py)."""
    dim, theta = shape.qk_rope_head_dim, shape.rope_theta

    def correction(rotations: float) -> float:
        return dim * math.log(shape.yarn_original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(shape.yarn_beta_fast)), 0)
    high = min(math.ceil(correction(shape.yarn_beta_slow)), dim - 1)
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / shape.yarn_factor * ramp + plain * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs (2i, 2i+1) of the last dimension; the result holds all first halves, then all second halves."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head latent attention, keys and values re-expanded."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        heads = shape.num_attention_heads
        self.q_a_proj = nn.Linear(shape.hidden_size, shape.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(shape.q_lora_rank, shape.rms_norm_eps)
        self.q_b_proj = nn.Linear(shape.q_lora_rank, heads * shape.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(shape.hidden_size, shape.kv_lora_rank + shape.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(shape.kv_lora_rank, shape.rms_norm_eps)
        self.kv_b_proj = nn.Linear(shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * shape.v_head_dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, buckets: Buckets, cos: Tensor, sin: Tensor) -> Tensor:
        shape = self.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((shape.kv_lora_rank, shape.qk_rope_head_dim), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        sizes = [rows * length for rows, length in buckets]
        parts = zip(buckets, q.split(sizes), k_rope.split(sizes), kv.split(sizes))
        return self.o_proj(torch.cat([self._attend(bucket, *part, cos, sin) for bucket, *part in parts]))

    def _attend(self, bucket: tuple[int, int], q: Tensor, k_rope: Tensor, kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape, (rows, length), heads = self.shape, bucket, self.shape.num_attention_heads
        nope, cos, sin = shape.qk_nope_head_dim, cos[:length], sin[:length]
        q = q.view(rows, length, heads, -1).transpose(1, 2)
        kv = kv.view(rows, length, heads, -1).transpose(1, 2)
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), dim=-1)
        k_rope = rotate(k_rope.view(rows, 1, length, -1), cos, sin).expand(-1, heads, -1, -1)
        k = torch.cat((kv[..., :nope], k_rope), dim=-1)
        mask = torch.full((length, length), float("-inf")).triu(1)
        weights = torch.softmax((q * shape.softmax_scale) @ k.transpose(-1, -2) + mask, dim=-1)
        return (weights @ kv[..., nope:]).transpose(1, 2).reshape(rows * length, -1)


class DenseMLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Sigmoid gate with a correction bias that takes part in the choice only, never in the weights."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape.n_routed_experts, shape.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert indices and weights, both [tokens, num_experts_per_tok], for x [tokens, hidden]."""
        shape = self.shape
        scores = torch.sigmoid(F.linear(x, self.weight))
        with torch.no_grad():
            biased = (scores + self.e_score_correction_bias).view(-1, shape.n_group, shape.n_routed_experts // shape.n_group)
            groups = biased.topk(2, dim=-1).values.sum(-1).topk(shape.topk_group, dim=-1, sorted=False).indices
            closed = torch.ones(biased.shape[:2], dtype=torch.bool).scatter_(1, groups, False)
            open_scores = biased.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(1)
            chosen = open_scores.topk(shape.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * shape.routed_scaling_factor


class GroupedProduct(torch.autograd.Function):
    """Rows sorted by expert, each group times its expert's matrix: [rows, in] x [experts, in, out] to [rows, out]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
        ctx.save_for_backward(rows, matrices)
        ctx.ends = ends
        out = rows.new_empty(rows.shape[0], matrices.shape[2])
        for expert, (begin, end) in enumerate(zip([0, *ends], ends)):
            torch.mm(rows[begin:end], matrices[expert], out=out[begin:end])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, matrices = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows, grad_matrices = torch.empty_like(rows), torch.empty_like(matrices)
        for expert, (begin, end) in enumerate(zip([0, *ctx.ends], ctx.ends)):
            torch.mm(grad[begin:end], matrices[expert].t(), out=grad_rows[begin:end])
            torch.mm(rows[begin:end].t(), grad[begin:end], out=grad_matrices[expert])
        return grad_rows, grad_matrices, None


def grouped_product(rows: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
    """`GroupedProduct` in the precision autocast asks for."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        rows, matrices = rows.to(dtype), matrices.to(dtype)
    return GroupedProduct.apply(rows, matrices, ends)


class MoE(nn.Module):
    """Routed experts beside one shared expert. Expert weights are stacked; `export.py` writes them one by one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        experts, hidden, inner = shape.n_routed_experts, shape.hidden_size, shape.moe_intermediate_size
        self.gate = Gate(shape)
        self.expert_gate_up = nn.Parameter(torch.empty(experts, hidden, 2 * inner))
        self.expert_down = nn.Parameter(torch.empty(experts, inner, hidden))
        self.shared_experts = DenseMLP(hidden, inner * shape.n_shared_experts)
        self.load = torch.zeros(experts)

    def forward(self, x: Tensor) -> Tensor:
        picks = self.shape.num_experts_per_tok
        with torch.autocast("cpu", enabled=False):
            chosen, weights = self.gate(x.float())
        expert_of_slot, slots = torch.sort(chosen.flatten(), stable=True)
        self.load = torch.bincount(expert_of_slot, minlength=self.shape.n_routed_experts)
        padded = (self.load + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE
        ends = padded.cumsum(0)
        gap = (ends - padded) - (self.load.cumsum(0) - self.load)
        place = torch.arange(len(slots)) + gap[expert_of_slot]
        ends_list = ends.tolist()
        # Rows that only pad hold the first token with weight zero.
        token_at = torch.zeros(ends_list[-1], dtype=torch.long).index_copy_(0, place, slots // picks)
        weight_at = weights.new_zeros(ends_list[-1]).index_copy(0, place, weights.flatten().index_select(0, slots)).unsqueeze(-1)
        gated, up = grouped_product(x.index_select(0, token_at), self.expert_gate_up, ends_list).chunk(2, dim=-1)
        out = grouped_product(F.silu(gated) * up * weight_at, self.expert_down, ends_list)
        return self.shared_experts(x).index_add(0, token_at, out)


class Layer(nn.Module):
    def __init__(self, shape: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        dense = index < shape.first_k_dense_replace
        self.mlp: nn.Module = DenseMLP(shape.hidden_size, shape.intermediate_size) if dense else MoE(shape)

    def forward(self, x: Tensor, buckets: Buckets, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), buckets, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyR1(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        angles = torch.arange(shape.positions_max, dtype=torch.float32).unsqueeze(1) * yarn_frequencies(shape)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "expert_down"))
                depth = math.sqrt(2 * shape.num_hidden_layers) if residual else 1.0
                nn.init.normal_(weight, std=shape.initializer_range / depth)

    def moe_layers(self) -> list[MoE]:
        """The layers with routed experts, in order."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def hidden(self, ids: Tensor, buckets: Buckets) -> Tensor:
        """The normed output of the last layer, [tokens, hidden], for a flat batch of ids."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, buckets, self.cos, self.sin)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [rows, length, vocabulary] of a rectangle of ids."""
        return self.lm_head(self.hidden(ids.flatten(), [tuple(ids.shape)])).view(*ids.shape, -1)

    def balance(self, speed: float) -> None:
        """Moves each correction bias one step towards equal load (auxiliary-loss-free balancing, DeepSeek-V3 report 2.1.2)."""
        for moe in self.moe_layers():
            load = moe.load.float()
            moe.gate.e_score_correction_bias += speed * torch.sign(load.mean() - load)
