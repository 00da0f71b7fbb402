"""The sum over classes in the loss change of each pair (`loss.py`), as a compiled loop.

In: the changes of logits of many (ablation, example) pairs, float32 on the CPU. Out: sum_c q_c expm1(dz_c - dz_y) of
each pair in float64, and whether any of its logits moves.

Numerics: float32, summed over runs of 256 classes that are added in float64. NaN and infinity propagate.
"""

from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ablation.engine.compiled import inlined, kernel
from ablation.engine.threads import over_rows

CLASSES = 256  # classes that are summed in float32; these sums are added in float64


def expm1_sums(
    dz: Float32[Tensor, "pairs classes"],
    rest: Float[Tensor, "examples classes"],
    labels: Int64[Tensor, " examples"],
    examples: Int64[Tensor, " pairs"],
) -> tuple[Float64[Tensor, " pairs"], Bool[Tensor, " pairs"]]:
    """sum_c q_c expm1(dz_c - dz_y) of each pair, q = `rest`; and whether any of its dz is not 0.

    Numerics: within 3e-7 (1 + |dz|) of sum_c q_c |expm1(dz_c - dz_y)|.
    """
    sums, moves = np.empty(len(dz)), np.empty(len(dz), np.bool_)
    args = (dz.contiguous().numpy(), rest.float().numpy(), labels.numpy(), examples.numpy(), sums, moves)
    over_rows(_expm1_sums, len(dz), dz.numel(), *args)
    return torch.from_numpy(sums), torch.from_numpy(moves)


@inlined
@no_type_check
def _expm1(z):
    """With z = n log 2 + r: 2^n expm1(r) + (2^n - 1), expm1(r) by its series. Infinite or NaN above 88.3."""
    z = min(max(z, np.float32(-87)), np.float32(88.8))
    n = np.floor(z * np.float32(1.4426950408889634) + np.float32(0.5))
    r = z - n * np.float32(0.6931471805599453)
    t = np.float32(1 / 5040) + r * np.float32(1 / 40320)
    t = np.float32(1 / 720) + r * t
    t = np.float32(1 / 120) + r * t
    t = np.float32(1 / 24) + r * t
    t = np.float32(1 / 6) + r * t
    t = np.float32(1 / 2) + r * t
    power = np.int32((n + np.float32(127)) * np.float32(1 << 23)).view(np.float32)
    return power * (r + r * r * t) + (power - np.float32(1))


@kernel
@no_type_check
def _expm1_sums(first, last, dz, rest, labels, examples, sums, moves):
    for pair in range(first, last):
        logits, weights = dz[pair], rest[examples[pair]]
        of_label = logits[labels[examples[pair]]]
        bits = np.int32(0)
        for number in logits.view(np.int32):
            bits |= number
        moves[pair] = (bits & np.int32(0x7FFFFFFF)) != 0  # ignores the sign
        total = 0.0
        for begin in range(0, len(logits) if moves[pair] else 0, CLASSES):
            some, their = logits[begin : begin + CLASSES], weights[begin : begin + CLASSES]
            part = np.float32(0)
            for c in range(len(some)):
                part += their[c] * _expm1(some[c] - of_label)
            total += part
        sums[pair] = total
