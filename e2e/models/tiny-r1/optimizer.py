"""Muon for the matrices of the layers, AdamW for the rest.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, found with five Newton-Schulz steps.
All matrices of one shape, stacked experts included, are orthogonalized in one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_UPDATE_RMS = 0.2
"""Size of an update relative to the learning rate, about what AdamW gives (Liu et al., 2025), so that one rate serves both."""


def orthogonalize(batch: Tensor) -> Tensor:
    """Approximately U·Vᵀ of each matrix of the batch [count, rows, columns] with rows <= columns."""
    a, b, c = _NEWTON_SCHULZ
    x = (batch / (batch.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        square = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; parameters of two dimensions, or of three as a stack of matrices."""

    def __init__(self, weights: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                moment = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                direction = weight.grad.lerp(moment, group["momentum"])
                stack = direction.view(-1, *weight.shape[-2:])
                target = weight.view(-1, *weight.shape[-2:])
                if stack.shape[1] > stack.shape[2]:
                    stack, target = stack.transpose(1, 2), target.transpose(1, 2)
                by_shape[tuple(stack.shape[1:])].append((stack, target))
            for (_, columns), members in by_shape.items():
                update = orthogonalize(torch.cat([stack for stack, _ in members]))
                scale = -group["lr"] * _UPDATE_RMS * columns**0.5
                for part, (_, target) in zip(update.split([len(stack) for stack, _ in members]), members):
                    target.mul_(1 - group["lr"] * group["weight_decay"]).add_(part, alpha=scale)
