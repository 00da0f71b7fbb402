"""The cost of a job in seconds, from flops and numbers of a layer and a fixed table.

In: facts of a model and a layer, and how the job is cut. Out: seconds on the machine that the table was measured on
(an AMD EPYC of 2025), on as many threads. Plans use them as they are, so that a job is cut alike everywhere; the
estimate that users see divides them by the pace of the machine that will run it (`machine.py`). Torch-free.
"""

from typing import Literal

from ablation.inputs.catalog import LayerFacts, ModelFacts

Path = Literal["direct", "response", "finite", "rerun", "reference"]

# Seconds of one thread, except those of a call.
FLOP_S = {"float32": 1 / 130e9, "float64": 1 / 56e9}  # in products and convolutions
VALUE_S = 0.4e-9  # one value that a plain pass computes
DELTA_S = 0.9e-9  # one value of a delta that is carried through one operation
FLAT_SHARE = 0.2  # share of the flops of Linears on flat features, where inactive units are skipped
CALL_S = 2e-3  # one run of the rest of a model, beside its flops
REPLAY_S = 2e-2  # one such run with deltas
PAIR_S = 1.5e-9  # one (site, example): finding whether its delta is 0
MOVED_SHARE = 0.1  # share of the pairs whose delta is not 0
CLASS_S = 1e-10  # one class of such a pair
POSITION_S = 3e-9  # one position of a convolution's output, for one (site, example)
UNIT_S = 2e-7  # response functions: one (unit, example), plus
UNIT_CLASS_S = 1e-10  # each of its classes
ROW_PAIR_S = 6e-11  # and each of the unit's weights, at each position of a convolution's output
DEEP_SHARE = 0.3  # one Linear deeper: share of the (unit, example)s that move
DEEP_S = 3e-5  # each of them, plus a product over the active units
ACTIVE_SHARE = 0.25  # share of active units
PROVED_WHOLE = 4  # examples per split on which a proof runs the whole network in float64
PROOF_FLOP_S = 1 / 21e9  # the reference, whose float64 convolutions have no optimised library
PREPARE_S = 0.2  # recording the model's calls and checking it in another batch composition


def pass_s(facts: ModelFacts, threads: int) -> float:
    """Seconds of one plain float32 pass over one example."""
    n_values = max((layer.values_spread for layer in facts.layers), default=0)
    return (max(facts.flops, 1e6) * FLOP_S["float32"] + n_values * VALUE_S) / threads


def carried_flops(layer: LayerFacts) -> float:
    """Flops of one (site, example) from the place on where more than one unit moves."""
    return layer.flops_spread - (1 - FLAT_SHARE) * layer.flops_flat


def split_s(
    n_examples: int,
    facts: ModelFacts,
    layer: LayerFacts,
    path: Path,
    *,
    n_sites: int,
    batch_size: int,
    lanes: int,
    threads: int,
) -> float:
    """Seconds of all sites on one split."""
    n, n_batches = n_examples, -(-n_examples // batch_size)
    base_s = n * (pass_s(facts, threads) + layer.flops_after * FLOP_S["float64"] / threads)
    if path == "direct":
        score_s = PAIR_S + _n_positions(layer) * POSITION_S + MOVED_SHARE * facts.n_classes * CLASS_S
        return base_s + n * n_sites * score_s / threads
    if path == "response":
        return base_s + n * (_units_s(facts, layer) + n_sites * _row_pair_s(layer)) / threads
    if path == "finite":
        n_replays = -(-n_sites // lanes)
        replay_s = n * layer.flops_after * FLOP_S["float64"] / threads + n_batches * REPLAY_S
        pair_s = (
            carried_flops(layer) * FLOP_S["float32"]
            + layer.values_spread * DELTA_S
            + PAIR_S
            + facts.n_classes * 10 * CLASS_S
        )
        return base_s + n_replays * replay_s + n * n_sites * pair_s / threads
    flops = layer.flops_after if path == "rerun" else facts.flops
    return base_s + n_sites * (n * flops * FLOP_S["float64"] / threads + n_batches * CALL_S)


def gradient_s(n_examples: int, facts: ModelFacts, layer: LayerFacts, threads: int) -> float:
    """One forward pass, and back through all that depends on the layer: twice its flops, in float64 as it is."""
    return n_examples * (pass_s(facts, threads) + 3 * layer.flops_after * FLOP_S["float64"] / threads)


def proof_s(n_examples: int, n_splits: int, n_sites: int, facts: ModelFacts, layer: LayerFacts, threads: int) -> float:
    """Seconds of the reference: in float64 from the layer on, and for a few examples of the whole network."""
    one_s = facts.flops * FLOP_S["float32"] + min(facts.flops, layer.flops_after) * PROOF_FLOP_S
    whole_s = facts.flops * PROOF_FLOP_S
    return (n_sites + 1) * (n_examples * one_s + min(n_examples, n_splits * PROVED_WHOLE) * whole_s) / threads


def _n_positions(layer: LayerFacts) -> float:
    """Number of positions of a convolution's output, each of which every weight takes part in; 0 for a Linear."""
    return layer.flops_after / (2 * layer.n_weights) if len(layer.shape) > 2 else 0


def _units_s(facts: ModelFacts, layer: LayerFacts) -> float:
    """Seconds of the response functions of all units on one example."""
    n_units = layer.shape[0]
    if layer.path != "direct":  # one Linear deeper
        product_s = ACTIVE_SHARE * layer.flops_spread * FLOP_S["float32"]
        return n_units * DEEP_SHARE * (product_s + DEEP_S)
    return n_units * (UNIT_S + facts.n_classes * UNIT_CLASS_S)


def _row_pair_s(layer: LayerFacts) -> float:
    return ROW_PAIR_S * max(1.0, _n_positions(layer))
