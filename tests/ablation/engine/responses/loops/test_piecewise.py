"""F, piece by piece, is brute force in float64: any network behind, small moves and large, kinks anywhere."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from ablation.engine.responses.loops.piecewise import INPUTS, PAIRS, Units, add_rows, make_units
from ablation.engine.responses.loops.records import Batch

N_EXAMPLES, N_INPUTS, N_UNITS, N_SECOND, N_CLASSES = 67, 69, 9, 71, 131


@dataclass
class Network:
    """W1, b1, W2, b2, V, c in float64, of numbers that float32 has too."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    v: np.ndarray
    c: np.ndarray

    def tail(self, y1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What follows the target: (y2, logits)."""
        y2 = product(np.maximum(y1, 0), self.w2.T) + self.b2
        return y2, product(np.maximum(y2, 0), self.v.T) + self.c


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """By torch, which the tests here run on one thread."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def draw_network(
    seed: int, *, spread: float = 1.0, sureness: float = 1.0, n_inputs: int = N_INPUTS, n_units: int = N_UNITS
) -> Network:
    """Signals of size 1, weights of the target `spread` times as large as that takes, logits `sureness` times."""
    random = np.random.default_rng(seed)

    def draw(*shape: int, size: float) -> np.ndarray:
        return (size * random.normal(size=shape)).astype(np.float32).astype(np.float64)

    return Network(
        draw(n_units, n_inputs, size=spread * n_inputs**-0.5),
        draw(n_units, size=0.5),
        draw(N_SECOND, n_units, size=n_units**-0.5),
        draw(N_SECOND, size=0.5),
        draw(N_CLASSES, N_SECOND, size=sureness * N_SECOND**-0.5),
        draw(N_CLASSES, size=0.5 * sureness),
    )


def draw_inputs(seed: int, n_inputs: int = N_INPUTS) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, most of them 0, and labels; of float32's numbers."""
    random = np.random.default_rng(seed)
    inputs = np.maximum(random.normal(size=(N_EXAMPLES, n_inputs)) - 0.3, 0).astype(np.float32)
    return inputs, random.integers(N_CLASSES, size=N_EXAMPLES)


def prepare(network: Network, inputs: np.ndarray, labels: np.ndarray, value: float = 0.0) -> tuple[Units, Batch]:
    change = (value - network.w1).astype(np.float32)
    rows = make_units(change, network.w2.T.astype(np.float32), network.v.T.astype(np.float32))
    y1 = product(inputs.astype(np.float64), network.w1.T) + network.b1
    second, logits = network.tail(y1)
    unused = np.zeros(logits.shape, np.float32)
    return rows, Batch(inputs, np.ascontiguousarray(y1.T), unused, logits, labels, second)


def brute_force(
    network: Network, inputs: np.ndarray, labels: np.ndarray, value: float = 0.0, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every weight set, one after the other: the loss deltas (units, inputs, examples), and whether logits move.

    Or those `chosen`: (weights, examples).
    """
    x = inputs.astype(np.float64)
    y1 = product(x, network.w1.T) + network.b1
    _, logits = network.tail(y1)
    q = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    q[np.arange(len(labels)), labels] = 0
    weights = np.argwhere(np.ones(network.w1.shape)) if chosen is None else chosen
    deltas = np.empty((len(weights), len(labels)))
    moves = np.empty(deltas.shape, bool)
    for k, (i, j) in enumerate(weights):
        ablated = y1.copy()
        ablated[:, i] += np.float64(np.float32(value - network.w1[i, j])) * x[:, j]
        dz = network.tail(ablated)[1] - logits
        moves[k] = np.abs(dz).max(axis=1) > 1e-14 * (1 + np.abs(logits).max())
        deltas[k] = loss_deltas(logits, labels, q, dz)
    shape = (*network.w1.shape, len(labels)) if chosen is None else deltas.shape
    return deltas.reshape(shape), moves.reshape(shape)


def loss_deltas(logits: np.ndarray, labels: np.ndarray, q: np.ndarray, dz: np.ndarray) -> np.ndarray:
    """Without cancellation where they are small, as a difference of losses where they are not."""
    every = np.arange(len(labels))
    centred = dz - dz[every, labels][:, None]
    small = np.log1p((q * np.expm1(np.clip(centred, -0.5, 0.5))).sum(axis=1))
    before, after = (z - z[every, labels][:, None] for z in (logits, logits + dz))
    large = np.logaddexp.reduce(after, axis=1) - np.logaddexp.reduce(before, axis=1)
    return np.where((np.abs(centred).max(axis=1) < 0.5) & (np.abs(large) < 0.4), small, large)


def run(rows: Units, examples: Batch, chosen: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    shape = rows.change.shape
    sums, squares, touched = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int32)
    deltas, moved = add_rows(rows, examples, sums, squares, touched, np.zeros(shape[0]), chosen)
    return sums, squares, touched, deltas, moved


def error_of(sums: np.ndarray, truth: np.ndarray) -> float:
    """The largest error of a sum over examples, against the sum of the deltas' sizes, or 0.01 of that where larger."""
    size = np.abs(truth).sum(axis=2)
    return float((np.abs(sums - truth.sum(axis=2)) / np.maximum(size, 0.01 * size.max())).max())


def contract_error(sums: np.ndarray, truth: np.ndarray) -> float:
    """Compare in units of max(|u|, 0.01 rms(u)), as docs/02-exactness.md has it."""
    utility = truth.sum(axis=2)
    size = np.abs(utility).max()  # of 1e38, squares would overflow
    scale = np.maximum(np.abs(utility) / size, 0.01 * np.sqrt(np.mean((utility / size) ** 2)))
    return float((np.abs(sums - utility) / size / scale).max())


NETWORKS = {
    "plain": (draw_network(1), 0.0),
    "small moves": (draw_network(2, spread=0.01), 0.0),
    "large moves": (draw_network(3, spread=10.0), 0.0),
    "unsure": (draw_network(4, sureness=1e-3), 0.0),
    "sure": (draw_network(5, sureness=30.0), 0.0),
    "very sure": (draw_network(6, sureness=300.0), 0.0),
    "set to 3": (draw_network(7), 3.0),
    "beyond all pieces": (draw_network(8), 1e3),
    "beyond float32": (draw_network(9), 3e38),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_brute_force(name: str) -> None:
    network, value = NETWORKS[name]
    inputs, labels = draw_inputs(2)
    rows, examples = prepare(network, inputs, labels, value)
    sums, squares, touched, *_ = run(rows, examples)
    truth, moves = brute_force(network, inputs, labels, value)
    assert error_of(sums, truth) <= 1e-6, error_of(sums, truth)
    assert contract_error(sums, truth) <= 1e-4, contract_error(sums, truth)
    assert error_of(squares, truth**2) <= 2e-6, error_of(squares, truth**2)
    np.testing.assert_array_equal(touched, moves.sum(axis=2))


@pytest.mark.parametrize("name", NETWORKS)
def test_chosen_weights_one_example_at_a_time(name: str) -> None:
    network, value = NETWORKS[name]
    inputs, labels = draw_inputs(3)
    rows, examples = prepare(network, inputs, labels, value)
    chosen = np.stack([np.arange(40) * 5 % N_UNITS, np.arange(40) * 7 % N_INPUTS], axis=1)
    sums, _, touched, deltas, moved = run(rows, examples, chosen)
    truth, truth_moves = brute_force(network, inputs, labels, value, chosen)
    assert deltas.shape == truth.shape
    np.testing.assert_array_equal(moved, truth_moves)
    np.testing.assert_array_equal(moved.sum(axis=1), touched[chosen[:, 0], chosen[:, 1]])
    np.testing.assert_allclose(deltas, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).mean())
    mine = sums[chosen[:, 0], chosen[:, 1]]
    np.testing.assert_allclose(deltas.sum(axis=1), mine, rtol=1e-6, atol=1e-7 * np.abs(truth).sum(axis=1).max())


def test_more_inputs_and_units_than_one_call_takes() -> None:
    n_inputs, n_units = 2 * INPUTS + 301, PAIRS + 13
    network = draw_network(11, spread=6.0, n_inputs=n_inputs, n_units=n_units)
    network.b1 += 1
    inputs, labels = draw_inputs(8, n_inputs)
    rows, examples = prepare(network, inputs, labels)
    chosen = np.stack([np.arange(97) % n_units, np.arange(97) * 37 % n_inputs], axis=1)
    sums, squares, touched, deltas, _ = run(rows, examples, chosen)
    truth, moves = brute_force(network, inputs, labels, chosen=chosen)
    here = chosen[:, 0], chosen[:, 1]
    size = np.abs(truth).sum(axis=1)
    assert (np.abs(sums[here] - truth.sum(axis=1)) <= 1e-6 * np.maximum(size, 0.01 * size.max())).all()
    np.testing.assert_allclose(squares[here], (truth**2).sum(axis=1), rtol=1e-5, atol=1e-7 * (truth**2).sum(1).max())
    np.testing.assert_array_equal(touched[here], moves.sum(axis=1))
    np.testing.assert_allclose(deltas, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).mean())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_the_bound_is_more_than_the_series_leaves_out(share: float) -> None:
    """One weight that moves its unit by a share of the piece at 0, before a second layer in which nothing flips."""
    network = draw_network(12, sureness=0.1, n_inputs=1, n_units=1)
    network.b1[:], network.b2[:], network.w1[:] = 3.0, network.b2 + 50, -1.0
    inputs, labels = np.ones((1, 1), np.float32), np.array([5])
    _, logits = network.tail(product(inputs.astype(np.float64), network.w1.T) + network.b1)
    p = np.exp(logits[0] - np.logaddexp.reduce(logits[0]))
    u = network.v @ network.w2[:, 0]
    network.w1[:] = -np.float32(share * 0.17 / np.ptp(u))
    network.b1[:] -= 1 + network.w1[0]  # y1, and all behind it, as before
    t, central = -network.w1[0, 0], u - p @ u
    m = {k: p @ central**k for k in range(2, 7)}
    cumulants = [m[2], m[3], m[4] - 3 * m[2] ** 2, m[5] - 10 * m[3] * m[2],
                 m[6] - 15 * m[4] * m[2] - 10 * m[3] ** 2 + 30 * m[2] ** 3]  # fmt: skip
    series = sum(kappa * t**k / math.factorial(k) for k, kappa in enumerate(cumulants, 2))
    left_out = abs(np.log1p(p @ np.expm1(central * t)) - series)
    rows, examples = prepare(network, inputs, labels)
    bounds = np.zeros(1)
    add_rows(rows, examples, *np.zeros((2, 1, 1)), np.zeros((1, 1), np.int32), bounds)
    assert left_out < bounds[0] < 1e-6 * m[2] * t**2
    x = t * np.ptp(u)
    assert bounds[0] == pytest.approx(28.125 / 5040 * x**5 * math.exp(x) * m[2] * t**2, rel=1e-3)


def test_bounds_add_up_over_examples_and_pieces() -> None:
    network = draw_network(3, spread=3.0)
    inputs, labels = draw_inputs(2)
    sizes = []
    for given in (inputs, np.concatenate([inputs, inputs]), inputs / 100):
        rows, examples = prepare(network, given, np.resize(labels, len(given)))
        bounds, unused = np.zeros(N_UNITS), np.zeros((2, *rows.change.shape))
        add_rows(rows, examples, *unused, np.zeros(rows.change.shape, np.int32), bounds)
        sizes.append(bounds)
    assert (np.isfinite(sizes[0]) & (sizes[0] > 0)).all()
    np.testing.assert_allclose(sizes[1], 2 * sizes[0], rtol=1e-9)
    assert (sizes[2] < sizes[0]).all()


def test_without_kinks_it_is_wrong() -> None:
    """The control: a second layer in which no unit is ever seen to flip."""
    network, _ = NETWORKS["plain"]
    inputs, labels = draw_inputs(2)
    rows, examples = prepare(network, inputs, labels)
    truth, _ = brute_force(network, inputs, labels)
    straight = rows._replace(steepest=np.zeros_like(rows.steepest))
    assert error_of(run(straight, examples)[0], truth) > 1e-3


def test_kinks_at_zero_and_silence_up_to_the_first() -> None:
    """Second-layer units at exactly 0 are activated on one side; where none is active, nothing moves until one is."""
    network = draw_network(10, spread=4.0)
    network.b1 = np.full_like(network.b1, -0.5)
    network.b2 = np.where(np.arange(N_SECOND) % 3 == 0, 0.0, -0.25)
    inputs, labels = draw_inputs(4)
    inputs *= np.arange(N_EXAMPLES)[:, None] % 2  # no unit is active, and y2 = b2, on every other example
    inputs[::2, :9] = 3.0
    inputs[::4, :9] = 0.5
    rows, examples = prepare(network, inputs, labels)
    assert (examples.second == 0).any()
    sums, _, touched, *_ = run(rows, examples)
    truth, moves = brute_force(network, inputs, labels)
    assert error_of(sums, truth) <= 1e-6
    np.testing.assert_array_equal(touched, moves.sum(axis=2))
    only_behind = draw_network(10)
    only_behind.b2 = np.full(N_SECOND, -0.5)
    only_behind.w2[:, :] = np.abs(only_behind.w2)
    only_behind.b1[:] = -0.1
    rows, examples = prepare(only_behind, inputs, labels)
    assert (examples.second.max(axis=1) < 0).any()
    _, _, touched, *_ = run(rows, examples)
    np.testing.assert_array_equal(touched, brute_force(only_behind, inputs, labels)[1].sum(axis=2))


def test_logits_that_move_together_count_as_touched() -> None:
    network, _ = NETWORKS["plain"]
    network = replace(network, v=np.repeat(network.v[:1], N_CLASSES, axis=0))
    inputs, labels = draw_inputs(5)
    chosen = np.stack([np.arange(40) * 5 % N_UNITS, np.arange(40) * 7 % N_INPUTS], axis=1)
    sums, squares, touched, deltas, moved = run(*prepare(network, inputs, labels), chosen)
    _, moves = brute_force(network, inputs, labels)
    assert (sums == 0).all()
    assert (squares == 0).all()
    assert (deltas == 0).all()
    np.testing.assert_array_equal(touched, moves.sum(axis=2))
    np.testing.assert_array_equal(moved, moves[chosen[:, 0], chosen[:, 1]])


def test_what_can_not_move_stays_exactly_zero() -> None:
    network, _ = NETWORKS["plain"]
    inputs, labels = draw_inputs(6)
    inputs[:, 5] = 0
    network = replace(network, w2=network.w2 * (np.arange(N_UNITS) != 3))
    sums, squares, touched, *_ = run(*prepare(network, inputs, labels))
    for total in (sums, squares, touched):
        assert (total[:, 5] == 0).all()
        assert (total[3] == 0).all()
        assert (total[4, :5] != 0).all()
    rows, examples = prepare(replace(network, w1=np.zeros_like(network.w1)), inputs, labels)
    assert not any(total.any() for total in run(rows, examples)[:3])


def test_any_cut_and_any_number_of_threads() -> None:
    """Threads and cuts along units change no bit; cuts along examples only the order of float64 additions."""
    network, _ = NETWORKS["large moves"]
    inputs, labels = draw_inputs(7)
    rows, examples = prepare(network, inputs, labels)
    whole = run(rows, examples)[:3]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for mine, theirs in zip(run(rows, examples)[:3], whole, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    finally:
        torch.set_num_threads(threads)
    for part in (slice(0, 4), slice(4, N_UNITS)):
        some = make_units(rows.change[part], rows.columns[part], rows.last)
        for mine, theirs in zip(run(some, examples._replace(y=examples.y[part]))[:3], whole, strict=True):
            np.testing.assert_array_equal(mine, theirs[part])
    parts = []
    for part in (slice(0, 11), slice(11, N_EXAMPLES)):
        parts.append(run(rows, examples.of_examples(np.arange(N_EXAMPLES)[part]))[:3])
    for first, second, theirs in zip(*parts, whole, strict=True):
        np.testing.assert_allclose(first + second, theirs, rtol=1e-12, atol=1e-15)
