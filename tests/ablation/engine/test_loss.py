"""The loss change against 60 digits, also where float64 subtraction would see nothing."""

import mpmath
import pytest
import torch

from ablation.engine.loss import is_correct, loss_delta, loss_delta_and_touched, make_intact
from ablation.loss import CrossEntropy
from tests.losses import WEIGHTS, Focal


def exact_delta(z: list[float], dz: list[float], label: int) -> float:
    with mpmath.workdps(60):

        def loss(values: list[mpmath.mpf]) -> mpmath.mpf:
            return mpmath.log(mpmath.fsum(mpmath.exp(v) for v in values)) - values[label]

        before = [mpmath.mpf(v) for v in z]
        after = [a + mpmath.mpf(b) for a, b in zip(before, dz, strict=True)]
        return float(loss(after) - loss(before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-2, 0.3, 3.0, 60.0])
@pytest.mark.parametrize("margin", [0.0, 1.0, 5.0, 12.0, 25.0, 30.0])
@pytest.mark.parametrize("label", [0, 1])  # class 0 is the top one
def test_against_many_digits(margin: float, size: float, dtype: torch.dtype, label: int) -> None:
    generator = torch.Generator().manual_seed(int(margin * 7 + size * 1000) + label)
    z = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    z[:, 0] = z.amax(dim=1) + margin
    dz = (torch.randn(8, 5, generator=generator, dtype=torch.float64) * size).to(dtype)
    intact = make_intact(z, torch.full((8,), label), dtype)
    got = loss_delta(intact, torch.arange(8), dz)
    truth = torch.tensor(
        [exact_delta(a, b, label) for a, b in zip(z.tolist(), dz.double().tolist(), strict=True)], dtype=torch.float64
    )
    # The scale that rounding of the centred dz gives: sum_c q_c |dz_c - dz_y|.
    centred = (dz.double() - dz[:, label : label + 1].double()).abs()
    scale = (intact.rest * centred).sum(1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    # Where the change is large, the answer is a difference of two float64 losses.
    error = ((got - truth).abs() - 1e-14 * (1 + truth.abs())).clamp(min=0) if size >= 0.3 else (got - truth).abs()
    assert (error <= tolerance * torch.maximum(scale, truth.abs())).all(), (error / scale).max()


def exact_change(z: list[float], dz: list[float], soft_label: list[float]) -> float:
    """sum_c a_c (-log p_c), after minus before."""
    with mpmath.workdps(60):

        def loss(values: list[mpmath.mpf]) -> mpmath.mpf:
            total = mpmath.log(mpmath.fsum(mpmath.exp(v) for v in values))
            return mpmath.fsum(mpmath.mpf(a) * (total - v) for a, v in zip(soft_label, values, strict=True))

        before = [mpmath.mpf(v) for v in z]
        after = [a + mpmath.mpf(b) for a, b in zip(before, dz, strict=True)]
        return float(loss(after) - loss(before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e-2, 0.3, 3.0])
@pytest.mark.parametrize("margin", [0.0, 5.0, 30.0])
@pytest.mark.parametrize("label", [0, 1])  # class 0 is the top one
@pytest.mark.parametrize("weights", [None, WEIGHTS, (0.0, 0.0, 0.0, 3.0, 0.0)], ids=["alike", "weights", "one-class"])
@pytest.mark.parametrize("smoothing", [0.0, 1e-12, 0.1, 0.5])
def test_soft_labels_against_many_digits(
    smoothing: float, weights: tuple[float, ...] | None, margin: float, size: float, dtype: torch.dtype, label: int
) -> None:
    """Up to 1 - p_y = 1e-13, and where the smoothing is of the size of the doubt."""
    generator = torch.Generator().manual_seed(int(margin * 7 + size * 1000) + label)
    z = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    z[:, 0] = z.amax(dim=1) + margin
    dz = (torch.randn(8, 5, generator=generator, dtype=torch.float64) * size).to(dtype)
    intact = make_intact(z, torch.full((8,), label), dtype, CrossEntropy(smoothing, weights))
    got = loss_delta(intact, torch.arange(8), dz)
    if intact.is_plain:
        return  # above
    a, total, centre, rest = (getattr(intact.soft_labels, name) for name in ("a", "total", "centre", "rest"))
    pairs = zip(z.tolist(), dz.double().tolist(), a.tolist(), strict=True)
    truth = torch.tensor([exact_change(*pair) for pair in pairs], dtype=torch.float64)
    centred = (dz.double() - dz.double().gather(1, centre[:, None])).abs()
    scale = ((total[:, None] * rest + a) * centred).sum(1)
    # Where the change is large, the answer is a difference of two float64 losses.
    error = ((got - truth).abs() - 1e-13 * (size >= 0.3)).clamp(min=0)
    assert (error <= 1e-13 * torch.maximum(scale, truth.abs())).all(), (error / scale).max()


def test_a_loss_without_a_form_is_a_difference_of_its_values() -> None:
    generator = torch.Generator().manual_seed(3)
    z, dz = (torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(9) % 4
    dz[5] = 0
    intact = make_intact(z, labels, torch.float32, Focal())
    delta, touched = loss_delta_and_touched(intact, torch.arange(9), dz)
    truth = Focal().values(z + dz, labels) - Focal().values(z, labels)
    torch.testing.assert_close(delta, truth, rtol=0, atol=1e-15)
    assert delta[5] == 0
    assert touched.tolist() == [k != 5 for k in range(9)]


def test_options_that_change_nothing_are_the_plain_loss() -> None:
    generator = torch.Generator().manual_seed(4)
    z, dz = (torch.randn(9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, every = torch.arange(9) % 4, torch.arange(9)
    plain = make_intact(z, labels)
    same = make_intact(z, labels, function=CrossEntropy(label_smoothing=0.0))
    assert (same.is_plain, same.soft_labels) == (True, None)
    ones = make_intact(z, labels, function=CrossEntropy(class_weights=[1.0, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(ones.loss, plain.loss, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(
        loss_delta(ones, every, dz * 1e-3), loss_delta(plain, every, dz * 1e-3), rtol=1e-13, atol=0
    )


def test_nothing_moves_nothing_changes() -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    intact = make_intact(z, torch.tensor([0, 1, 2, 3]))
    assert (loss_delta(intact, torch.arange(4), torch.zeros(4, 6)) == 0).all()


def test_intact_loss_of_confident_examples() -> None:
    z = torch.tensor([[40.0, 0.0, -3.0]], dtype=torch.float64)
    intact = make_intact(z, torch.tensor([0]))
    with mpmath.workdps(50):
        truth = float(mpmath.log(1 + mpmath.exp(-40) + mpmath.exp(-43)))
    assert intact.loss.item() == pytest.approx(truth, rel=1e-14)
    assert intact.loss.item() > 0  # logsumexp(z) - z_y would give exactly 0


def test_top1_after_the_change() -> None:
    intact = make_intact(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    dz = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    assert is_correct(intact, torch.arange(2), dz).tolist() == [False, True]
