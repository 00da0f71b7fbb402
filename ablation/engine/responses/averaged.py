"""Convolutions whose channel is averaged before the last Linear: sampled weights, or all weights of a channel.

In: a batch. Out: the intact network, and the deltas of single weights (path `direct`) or their sums over the batch for
whole channels (path `response`). The loops are in `averaged.py`; on other devices they run on the host, since all that
they need of a batch is the layer's input and one number per position.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ablation.engine.deltas import Deltas, Runs
from ablation.engine.interface import Setup
from ablation.engine.loss import Intact, make_intact
from ablation.engine.responses.loops import averaged, curved
from ablation.engine.responses.loops.activations import find_function
from ablation.engine.responses.way import RELUS, Tail
from ablation.engine.threads import run_ranges
from ablation.errors import ModelError
from ablation.precision import FromTargetOn, as_found, run_with
from ablation.sites import EveryWeight, Sites

PAIRS_AT_ONCE = 1 << 20  # (site, example) pairs held together: 8 MB a float64 matrix


@dataclass(frozen=True)
class TailBatch:
    """What the intact network computes of one batch, as the tail needs it."""

    x: Float[Tensor, "examples inputs height width"]  # the convolution's input
    y: Float[Tensor, "examples channels positions"]  # before f: of the target's channels alone
    scale: Float[Tensor, " channels"]  # what BatchNorm multiplies them by
    first: int  # where they lie among the last Linear's inputs
    logits: Float[Tensor, "examples classes"]


class OpenTail:
    """A tail with its model."""

    def __init__(self, model: torch.nn.Module, tail: Tail, dtype: torch.dtype) -> None:
        self.model = model
        self.tail = tail
        self.weight = model.get_parameter(tail.weight).detach().to(dtype)

    def run(self, inputs: Tensor) -> TailBatch:
        """The intact network on one batch."""
        watch = _Watch(self.weight, self.tail)
        with as_found(self.model):
            logits = run_with(self.model, self.tail.weight, self.weight, inputs, mode=watch)
        assert watch.x is not None
        assert watch.y is not None
        return TailBatch(watch.x, watch.y, watch.scale, watch.first, logits)


class _Watch(FromTargetOn):
    """Follows the target's channels from call to call, and keeps what goes in on both ends."""

    def __init__(self, target: Tensor, tail: Tail) -> None:
        super().__init__(target)
        self.tail = tail
        self.x: Tensor | None = None
        self.y: Tensor | None = None
        self.scale = target.new_ones(len(target))
        self.first = 0
        self._value: Tensor = target
        self._position = 0

    def __torch_function__(
        self, call: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = getattr(call, "__name__", "")
        if not any(leaf is self._value for leaf in leaves) or name == "__get__":
            return super().__torch_function__(call, types, args, kwargs)
        is_pool = self._position == self.tail.pool
        if self._position == 0:
            self.x = leaves[0].clone()
        elif name == "batch_norm":
            given = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {})).arguments
            self._scale(given)
        elif name == "cat":
            self.first = 0
            for leaf in leaves[: [leaf is self._value for leaf in leaves].index(True)]:
                self.first += leaf.shape[1]
        elif self.y is None and (is_pool or name in RELUS or find_function(name, args, kwargs or {}) is not None):
            self.y = self._value[:, self._own].flatten(2).clone()
        result = super().__torch_function__(call, types, args, kwargs)
        if isinstance(result, Tensor):
            self._value = result
            self._position += 1
        return result

    @property
    def _own(self) -> slice:
        """The target's channels among those of the value that is followed."""
        return slice(self.first, self.first + len(self.scale))

    def _scale(self, given: dict[str, Any]) -> None:
        own = self._own
        scale = (given["running_var"][own].to(self.scale.dtype) + given.get("eps", 1e-5)).rsqrt()
        if given.get("weight") is not None:
            scale = scale * given["weight"][own].to(self.scale.dtype)
        self.scale = self.scale * scale


@dataclass(frozen=True)
class Form:
    """What of a tail is the same in every batch."""

    tail: Tail
    shape: tuple[int, ...]  # of the weight
    columns: Float32[np.ndarray, "units classes"]  # of the last Linear; (1, 1) where there is none
    device: torch.device

    @property
    def is_logit(self) -> bool:
        """Whether the mean is a logit."""
        return self.tail.last is None

    def offsets(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Into the padded positions, height x width: where each output position begins, and each kernel's shift."""
        (down, right), (dy, dx), (kh, kw) = self.tail.stride, self.tail.dilation, self.shape[2:]
        rows = np.arange((height - dy * (kh - 1) - 1) // down + 1) * down
        columns = np.arange((width - dx * (kw - 1) - 1) // right + 1) * right
        shifts = (np.arange(kh) * dy)[:, None] * width + np.arange(kw) * dx
        return (rows[:, None] * width + columns).flatten(), shifts.flatten()


@dataclass(frozen=True)
class Given:
    """One batch, as the loops take it."""

    form: Form
    inputs: Float[Tensor, "examples inputs height width"]  # padded
    y: np.ndarray  # (examples, channels, positions)
    scale: Float64[np.ndarray, " channels"]
    units: Int64[np.ndarray, " channels"]
    q: np.ndarray
    z: np.ndarray
    labels: np.ndarray

    @cached_property
    def by_input(self) -> np.ndarray:
        """(examples, inputs, positions): for single weights."""
        return self.inputs.flatten(2).contiguous().numpy()

    @cached_property
    def by_position(self) -> np.ndarray:
        """(examples, positions, inputs): for whole channels."""
        return self.inputs.flatten(2).transpose(1, 2).contiguous().numpy()

    @cached_property
    def largest(self) -> np.ndarray:
        """Input of each example, in size."""
        return self.inputs.flatten(1).abs().amax(dim=1).double().numpy()

    @cached_property
    def largest_at(self) -> np.ndarray:
        """Input of each (example, position), in size."""
        return self.inputs.abs().amax(dim=1).flatten(1).double().numpy()

    @property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """Of output positions and of kernel positions."""
        return self.form.offsets(self.inputs.shape[2], self.inputs.shape[3])

    def of_examples(self, chosen: np.ndarray) -> "Given":
        """Some of the examples."""
        return replace(
            self,
            inputs=self.inputs[torch.from_numpy(chosen)],
            y=self.y[chosen], q=self.q[chosen], z=self.z[chosen], labels=self.labels[chosen],
        )  # fmt: skip

    def joined(self, others: Sequence["Given"]) -> "Given":
        """These examples, and then those of others."""
        parts = [self, *others]
        names = ("y", "q", "z", "labels")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return replace(self, inputs=torch.cat([part.inputs for part in parts]), **joined)

    def score(self, sites: Sites) -> tuple[Tensor, Tensor]:
        """The loss delta of every (site, example), in nats, and whether any logit moves."""
        n_inputs, n_kernel = self.form.shape[1], int(np.prod(self.form.shape[2:]))
        indices = sites.indices.cpu().numpy()
        order = np.argsort(indices // (n_inputs * n_kernel), kind="stable")
        where, sources = indices // (n_inputs * n_kernel), indices // n_kernel % n_inputs
        at, shifts = self.offsets
        steps = sites.steps.cpu().numpy() * self.scale[where]
        args = [each[order] for each in (where, sources, shifts[indices % n_kernel], steps)]
        delta = np.empty((len(indices), len(self.labels)))
        touched = np.empty(delta.shape, np.bool_)

        def run(first: int, last: int) -> None:
            part = slice(first, last)
            where = *(each[part] for each in args), self.units, self.by_input, at, self.y
            given = self.q, self.z, self.labels, self.form.columns, self.form.is_logit, delta[part], touched[part]
            if self.form.tail.function is None:
                averaged.score_weights(*where, self.form.tail.has_relu, *given)
            else:
                curved.score_curved_weights(*where, self.form.tail.function, *given)

        run_ranges(run, len(indices))
        back = np.argsort(order)
        return torch.from_numpy(delta[back]), torch.from_numpy(touched[back])


@dataclass(frozen=True)
class ChannelResponses:
    """Whole channels on one batch, ready to be summed over its examples: see `whole.Responses`."""

    batch: Given
    sites: EveryWeight

    @property
    def rows(self) -> slice:
        """Of the table: all of the shard's."""
        return slice(0, len(self.sites))

    @property
    def n_units(self) -> int:
        """How many channels."""
        return len(self.sites) // int(np.prod(self.batch.form.shape[1:]))

    def add(self, sums: dict[str, np.ndarray], runs: Runs, bounds: np.ndarray) -> None:
        """Add the sums over the batch to those given, each (sites)."""
        n_inputs, *kernel = self.batch.form.shape[1:]
        shape = self.n_units, n_inputs, int(np.prod(kernel))
        first_channel = self.sites.first // (shape[1] * shape[2])
        batch, form = self.batch, self.batch.form
        at, shifts = batch.offsets

        def taken(name: str, part: slice, dtype: type = np.float64) -> np.ndarray:
            if name in sums:
                return sums[name].reshape(shape)[part]
            return np.zeros((part.stop - part.start, *shape[1:]), dtype)

        def run(first: int, last: int) -> None:
            part, of_class = slice(first, last), slice(first, last if runs.per_class else first)
            own = self.sites[first * shape[1] * shape[2] : last * shape[1] * shape[2]]
            steps = own.steps.cpu().numpy().reshape(last - first, *shape[1:])
            steps = steps * batch.scale[first_channel + first : first_channel + last, None, None]
            where = (
                np.arange(first_channel + first, first_channel + last),
                np.ascontiguousarray(steps.transpose(0, 2, 1).astype(np.float32)),
                batch.units, batch.by_position,
            )  # fmt: skip
            given = (
                batch.q, batch.z, batch.labels, form.columns, form.is_logit, runs.ends, runs.closes, runs.per_class,
                taken("delta", part), taken("delta_squared", part), taken("touched", part, np.int32),
                taken("open", of_class), taken("open_squared", of_class), taken("within", of_class), bounds[part],
            )  # fmt: skip
            if form.tail.function is None:
                averaged.add_channels(*where, batch.largest, at, shifts, batch.y, form.tail.has_relu, *given)
            else:
                curved.add_curved_channels(*where, batch.largest_at, at, shifts, batch.y, form.tail.function, *given)

        run_ranges(run, self.n_units)

    def of_examples(self, chosen: np.ndarray) -> "ChannelResponses":
        """Of some of the examples."""
        return replace(self, batch=self.batch.of_examples(chosen))

    def joined(self, others: Sequence["ChannelResponses"]) -> "ChannelResponses":
        """See `Responses`."""
        return replace(self, batch=self.batch.joined([other.batch for other in others]))

    def deltas_of(self, rows: Int64[np.ndarray, " rows"], intact: Intact) -> Deltas:
        """Example by example, of some rows of the table."""
        delta, touched = self.batch.score(self.sites.pick(rows))
        return Deltas(slice(0, len(rows)), delta, touched, intact.correct.expand(delta.shape))


class Pooled:
    """The path of one job: holds the model, the tail's numbers, and the sites."""

    def __init__(self, setup: Setup, tail: Tail) -> None:
        if setup.precision == "float64" or setup.top1:
            raise ModelError(
                "engine='direct' and 'response' take a convolution's weights in 'mixed' or 'float32', without top1; "
                "use engine='finite'."
            )
        self.open_tail = OpenTail(setup.model, tail, setup.base_dtype)
        self.sites = setup.sites
        last = None if tail.last is None else setup.model.get_parameter(tail.last).detach().float().cpu()
        self.form = Form(
            tail,
            tuple(self.open_tail.weight.shape),
            np.zeros((1, 1), np.float32) if last is None else last.T.contiguous().numpy(),
            self.open_tail.weight.device,
        )

    def run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> tuple[Intact, Iterator[Any]]:
        """One batch: the intact network, and the deltas or the sums of all sites."""
        batch = self.open_tail.run(inputs)
        intact = make_intact(batch.logits, labels, torch.float32)
        given = self._given(batch, intact)
        if isinstance(self.sites, EveryWeight):
            return intact, iter([ChannelResponses(given, self.sites)])
        return intact, self._deltas(given, intact)

    def _deltas(self, given: Given, intact: Intact) -> Iterator[Deltas]:
        at_once = max(1, PAIRS_AT_ONCE // len(intact.labels))
        for first in range(0, len(self.sites), at_once):
            rows = slice(first, min(first + at_once, len(self.sites)))
            delta, touched = (each.to(self.form.device) for each in given.score(self.sites[rows]))
            yield Deltas(rows, delta, touched, intact.correct.expand(touched.shape))

    def _given(self, batch: TailBatch, intact: Intact) -> Given:
        down, right = self.form.tail.padding
        return Given(
            form=self.form,
            inputs=F.pad(batch.x.cpu().float(), (right, right, down, down)),
            y=batch.y.cpu().double().contiguous().numpy(),
            scale=batch.scale.cpu().double().numpy(),
            units=np.arange(len(batch.scale)) + batch.first,
            q=intact.rest.cpu().float().contiguous().numpy(),
            z=intact.logits.cpu().double().contiguous().numpy(),
            labels=intact.labels.cpu().numpy(),
        )
