"""What a job costs: flops and numbers of a layer -> seconds, by a fixed table.

In: facts of a model and a layer, and how the job is cut. Out: seconds on the machine that the table was measured on
(an AMD EPYC of 2025), on as many threads. The cut of a job uses these as they are, so that it is the same everywhere;
the estimate that people see divides them by the pace of the machine that will run it (`machine.py`). Torch-free.
"""

from typing import Literal

from ablation.inputs.catalog import LayerFacts, ModelFacts

Path = Literal["direct", "response", "finite", "rerun", "reference"]

# Seconds of one thread, but for those of a call.
FLOP_S = {"float32": 1 / 130e9, "float64": 1 / 56e9}  # in products and convolutions
VALUE_S = 0.4e-9  # one number that a plain pass computes
DELTA_S = 0.9e-9  # one number of a delta that is carried through one operation
FLAT_SHARE = 0.2  # of the flops of Linears on flat features, whose closed units take no part
CALL_S = 2e-3  # one run of the rest of a model, beside its flops
REPLAY_S = 2e-2  # the same with deltas
PAIR_S = 1.5e-9  # one (site, example): finding out whether it moves
MOVED_SHARE = 0.1  # of the pairs
CLASS_S = 1e-10  # one class of a pair that moves
POSITION_S = 3e-9  # one position of a convolution's output, for one (site, example)
UNIT_S = 2e-7  # response functions: one (unit, example), beside
UNIT_CLASS_S = 1e-10  # each of its classes
ROW_PAIR_S = 6e-11  # and each of its weights, at each position of a convolution's output
DEEP_SHARE = 0.3  # of the (unit, example)s that move, one Linear deeper
DEEP_S = 3e-5  # each of them, beside a product over the open units
OPEN_SHARE = 0.25  # of these
PROVED_WHOLE = 4  # examples of a split that a proof runs the whole network on in float64
PROOF_FLOP_S = 1 / 21e9  # of the reference, whose convolutions in float64 have no library of their own
START_S = 0.2  # looking at the model, checking that it is the same in every batch composition


def pass_s(facts: ModelFacts, threads: int) -> float:
    """One example of one plain float32 pass."""
    n_values = max((layer.values_spread for layer in facts.layers), default=0)
    return (max(facts.flops, 1e6) * FLOP_S["float32"] + n_values * VALUE_S) / threads


def carried_flops(layer: LayerFacts) -> float:
    """What one (site, example) takes from where more than one unit moves on."""
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
    """All sites on one split."""
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


def proof_s(n_examples: int, n_splits: int, n_sites: int, facts: ModelFacts, layer: LayerFacts, threads: int) -> float:
    """The reference, twice: in float64 from the layer on, and of a few examples the whole network."""
    one_s = facts.flops * FLOP_S["float32"] + min(facts.flops, layer.flops_after) * PROOF_FLOP_S
    whole_s = facts.flops * PROOF_FLOP_S
    return (n_sites + 1) * (n_examples * one_s + min(n_examples, n_splits * PROVED_WHOLE) * whole_s) / threads


def _n_positions(layer: LayerFacts) -> float:
    """Of a convolution's output: what each of its weights takes part in. 0 for a Linear."""
    return layer.flops_after / (2 * layer.n_weights) if len(layer.shape) > 2 else 0


def _units_s(facts: ModelFacts, layer: LayerFacts) -> float:
    """The response functions of all units on one example."""
    n_units = layer.shape[0]
    if layer.path != "direct":  # one Linear deeper
        product_s = OPEN_SHARE * layer.flops_spread * FLOP_S["float32"]
        return n_units * DEEP_SHARE * (product_s + DEEP_S)
    return n_units * (UNIT_S + facts.n_classes * UNIT_CLASS_S)


def _row_pair_s(layer: LayerFacts) -> float:
    return ROW_PAIR_S * max(1.0, _n_positions(layer))
