"""One function with deltas put into its arguments by hand: what the engine carries to its result, and the truth."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ablation.engine.carried.dispatch import Carry, Rule
from ablation.engine.carried.products import RULES
from ablation.engine.carried.representations import Block
from ablation.engine.carried.tape import Player, Tape
from ablation.precision import FromTargetOn, Lifts
from ablation.sites import Sites

N = 5  # ablations, as no other axis in these tests
STILL = 1  # the one of them that moves nothing


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_carry(rules: Mapping[Any, Rule] = RULES, dtype: torch.dtype = torch.float64, n: int = N) -> Carry:
    """The engine's mode over a target that nobody uses."""
    target = torch.zeros(n, dtype=torch.float64)
    mode = FromTargetOn(target)
    return Carry(
        target,
        Sites(torch.arange(n), target, target, torch.zeros(n, dtype=torch.bool)),
        rules,
        dtype,
        Lifts(),
        Player(Tape(mode), mode),
    )


def make_dense(x: Tensor, scale: float = 0.3, seed: int = 1) -> Tensor:
    """A delta of every entry; the second ablation moves nothing."""
    delta = scale * draw(N, *x.shape, seed=seed)
    delta[STILL] = 0
    return delta


def make_block(x: Tensor, axis: int, scale: float = 0.3, seed: int = 2) -> Block:
    """One unit moves, for each ablation another; the second moves nothing."""
    shape = list(x.shape)
    shape[axis] = 1
    first = (torch.arange(N) * 2 + 1) % x.shape[axis]
    numbers = scale * draw(N, *shape, seed=seed)
    numbers[STILL] = 0
    return Block(axis, first, numbers, x.shape[axis])


def written_out(move: Tensor | Block) -> Tensor:
    return move.dense() if isinstance(move, Block) else move


def carry_through(
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    moves: Mapping[int, Tensor | Block],
    *,
    rules: Mapping[Any, Rule] = RULES,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The delta of each floating result of `function(*inputs)`, where `moves` holds those of some of its arguments."""
    carry = make_carry(rules, dtype)
    for place, move in moves.items():
        carry.shadows.put(inputs[place], move)
    with torch.no_grad(), carry:
        results = function(*inputs)
    results = results if isinstance(results, tuple | list) else (results,)
    kept = [result for result in results if result.is_floating_point()]
    deltas = [carry.shadows.delta(result) for result in kept]
    return [
        torch.zeros(N, *result.shape, dtype=dtype) if delta is None else delta
        for result, delta in zip(kept, deltas, strict=True)
    ]


def compute_again(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], moves: Mapping[int, Tensor | Block]
) -> list[Tensor]:
    """The truth: the function once more for each ablation, on base + delta in float64, minus the function as it is."""

    def results(ablation: int | None) -> list[Tensor]:
        given = [
            x + written_out(moves[place])[ablation].double() if ablation is not None and place in moves else x.clone()
            for place, x in enumerate(inputs)
        ]
        found = function(*given)
        found = found if isinstance(found, tuple | list) else (found,)
        return [each for each in found if each.is_floating_point()]

    with torch.no_grad():
        intact = results(None)
        ablated = [results(ablation) for ablation in range(N)]
    return [torch.stack([each[k] for each in ablated]) - intact[k] for k in range(len(intact))]


def largest_error(carried: Tensor, truth: Tensor, size: Tensor | float = 0.0) -> float:
    """The largest difference, over the largest number of the truth or `size`."""
    scale = max(float(truth.abs().max()), float(torch.as_tensor(size).abs().max()), 1e-300)
    return float((carried.double() - truth).abs().max()) / scale


class Seen(TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        self.operations.add(getattr(torch.ops.aten, name, func.overloadpacket))
        return func(*args, **(kwargs or {}))
