"""The change f(y + d) - f(y) of elementwise functions, by expressions that don't cancel for small d.

In: the intact values y and their increments d. Out: the increments of f(y). Both wings use them: the rules of
`carried/` for any operation, the paths of `responses/` for the one unit that moves.
"""

import torch
from torch import Tensor


def relu_delta(y: Tensor, d: Tensor) -> Tensor:
    """relu(y + d) - relu(y) without cancellation: max(d, -y) + min(y, 0)."""
    return torch.maximum(d, -y).add_(y.clamp(max=0))


def sigmoid_delta(dx: Tensor, x: Tensor) -> Tensor:
    """s(x + dx) - s(x), without cancellation or overflow."""
    after = x + dx
    return (
        dx.sign()
        * -torch.expm1(-dx.abs())
        * torch.sigmoid(torch.maximum(x, after))
        * torch.sigmoid(-torch.minimum(x, after))
    )


def hardsigmoid_delta(dx: Tensor, x: Tensor) -> Tensor:
    """h(x + dx) - h(x), h(x) = clip(x / 6 + 1/2, 0, 1)."""
    line = x / 6 + 0.5
    h = line.clamp(0, 1)
    outside, least, most = (each.to(dx.dtype) for each in (line - h, -h, 1 - h))
    return torch.clamp(dx / 6 + outside, least, most)
