"""The table of paths, how each is made ready, and which of them a parameter can take.

In: a path's name and a `Setup`, or the recorded calls of a forward pass. Out: an `EnginePath` ready for one shard, or
the names of paths. Which of them a job takes is chosen by cost in `plan.py`.
"""

from collections.abc import Callable
from typing import get_args

from torch import Tensor

from ablation.cost import Path
from ablation.engine.calls import Calls, record_calls
from ablation.engine.carried.finite import Finite
from ablation.engine.interface import EnginePath, Setup
from ablation.engine.reference import Reference
from ablation.engine.rerun import Rerun
from ablation.engine.responses.averaged import AveragedChannels
from ablation.engine.responses.direct import Direct
from ablation.engine.responses.rows import HeadRows
from ablation.engine.responses.three_linears import ThreeLinears
from ablation.engine.responses.way import AveragedConvolution, DeepHead, Head, find_straight_way
from ablation.errors import ModelError, SpecError
from ablation.loss import is_plain


def find_paths(calls: Calls, parameter: str) -> tuple[Path, ...]:
    """The paths that a parameter can take, from the fastest to the slowest.

    `direct`: one number per example reaches the last Linear, so single weights are computed one by one. `response`: the
    loss depends on one number per (example, unit), by functions that the compiled loops have, so all weights of a unit
    are computed at once. `finite`, `rerun` and `reference` take any parameter.
    """
    way = find_straight_way(calls, parameter)
    is_unknown = way is None or (isinstance(way, Head) and (way.is_bias or way.function is None))
    can_take = {"direct": isinstance(way, Head | AveragedConvolution), "response": not is_unknown}
    return tuple(path for path in get_args(Path) if can_take.get(path, True))


def open_path(path: str, setup: Setup, example: Tensor) -> EnginePath:
    """Make the path of this name ready for one shard.

    `example`, a small batch, is run once by the paths `direct` and `response`, to find the way from the layer to the
    loss.

    Raises:
        SpecError: there is no path of this name.
        ModelError: the layer can't take this path.
    """
    if path not in PATHS:
        raise SpecError("path", path, f"one of {', '.join(PATHS)}")
    return PATHS[path](setup, example)


def _open_direct(setup: Setup, example: Tensor) -> EnginePath:
    way = find_straight_way(record_calls(setup.model, example), setup.parameter)
    if isinstance(way, AveragedConvolution):
        _require_plain(setup, "direct")
        return AveragedChannels(setup, way)
    return Direct(setup, _require_head(way, setup.parameter))


def _open_response(setup: Setup, example: Tensor) -> EnginePath:
    _require_plain(setup, "response")
    way = find_straight_way(record_calls(setup.model, example), setup.parameter)
    if isinstance(way, AveragedConvolution):
        return AveragedChannels(setup, way)
    if isinstance(way, DeepHead):
        return ThreeLinears(setup, way)
    return HeadRows(setup, _require_head(way, setup.parameter))


def _require_plain(setup: Setup, path: str) -> None:
    if not is_plain(setup.loss):
        raise ModelError(
            f"the path {path!r} takes {setup.parameter} with plain cross-entropy only, without label smoothing or "
            "class weights; use engine='finite'."
        )


def _require_head(way: Head | DeepHead | None, parameter: str) -> Head:
    if not isinstance(way, Head):
        raise ModelError(f"{parameter} is not part of a classifier head on this data; use engine='finite'.")
    return way


PATHS: dict[str, Callable[[Setup, Tensor], EnginePath]] = {
    "direct": _open_direct,
    "response": _open_response,
    "finite": lambda setup, example: Finite(setup),
    "rerun": lambda setup, example: Rerun(setup),
    "reference": lambda setup, example: Reference(setup),
}
