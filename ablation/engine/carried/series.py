"""The loss change as a power series in one number: where a pair's logits move along one column of the last Linear.

With dz = t v, v a column of the last Linear, u_c = v_c - v_y and q as in `loss.py`:

    delta_l = log1p( S(t) ),   S(t) = sum_c q_c expm1(t u_c) = sum_k M_k t^k / k!,   M_k = sum_c q_c u_c^k

The moments M_k of all examples and columns come out of a few products q @ V^k in float64, shifted from v to v - v_y
binomially; each pair then costs a short polynomial, however many classes there are (docs/03-engine.md). All terms
are of the size of q, so the series is as accurate for confident examples as for others.

The rest of the series after order K is at most t^2 M_2 * 2 x^(K-1) e^x / (K+1)! for x = |t| max |u|: with K = 10 and
x <= 1/2, 2e-10 of the quadratic term. Pairs beyond that go the direct way.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ablation.engine.deltas import VALUES_AT_ONCE
from ablation.engine.loss import LARGE, Intact, loss_delta

ORDER = 10
REACH = 0.5  # largest |t| max |u| that the series is used for


class LossSeries:
    """The columns of a last Linear (units, classes), and the powers of them that the series needs for every batch."""

    def __init__(self, columns: Float[Tensor, "units classes"]) -> None:
        self.columns = columns
        self.is_live = (columns != 0).any(dim=1)
        wide = columns.double()
        self.u_range = wide.amax(dim=1) - wide.amin(dim=1)  # |u| is at most this
        self.powers = torch.cumprod(torch.stack([torch.ones_like(wide), *[wide] * ORDER]), dim=0)

    def moments(self, intact: Intact) -> Float[Tensor, "orders units examples"]:
        """M_k / k! for k = 1 to ORDER."""
        raw = self.powers @ intact.rest.double().T
        shift = -self.columns.double()[:, intact.labels]  # -v_y: (units, examples)
        powers = [torch.ones_like(shift), shift]
        while len(powers) <= ORDER:
            powers.append(powers[-1] * shift)
        moments = []
        for k in range(1, ORDER + 1):
            total = raw[k] / math.factorial(k)
            for j in range(k):
                total.addcmul_(raw[j], powers[k - j], value=math.comb(k, j) / math.factorial(k))
            moments.append(total)
        return torch.stack(moments)

    def loss_delta(
        self,
        intact: Intact,
        t: Float[Tensor, "sites examples"],
        unit: Int64[Tensor, " sites"],
        moved: Bool[Tensor, "sites examples"],
    ) -> Float[Tensor, "sites examples"]:
        """Every pair's change of loss when its logits change by t times the column of its unit, in nats, as float64.

        Numerics: relative error about that of t; truncation 2e-10 of the quadratic term (tested).
        """
        wide = t.double()
        moments = self.moments(intact).index_select(1, unit)
        total = torch.zeros_like(wide)
        for moment in moments.flip(0):
            total = (total + moment).mul_(wide)
        delta = torch.log1p(total)
        direct = moved & ~((wide.abs() * self.u_range[unit, None] <= REACH) & (total.abs() <= LARGE))
        for pairs in direct.nonzero().split(max(1, VALUES_AT_ONCE // self.columns.shape[1])):
            row, example = pairs.unbind(1)
            dz = self.columns[unit[row]] * t[row, example, None]
            delta[row, example] = loss_delta(intact, example, dz)
        return delta.masked_fill_(~moved, 0.0)
