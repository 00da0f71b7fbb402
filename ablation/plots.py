"""Figures of a table: utility against magnitude, and train against test.

In: an `ImportanceTable`. Out: a matplotlib `Figure`, without pyplot, global state or a screen.

Utilities span many decades on both sides of 0, and many are exactly 0: symmetric-log axes show them all. Where there
are more sites than can be told apart, the largest are drawn and a random part of the others, and the title says how
many; the counts in the legends are always those of the whole table.
"""

import math

import numpy as np
from jaxtyping import Bool, Float64, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablation.statistics import compare_magnitude, compare_splits
from ablation.table import ImportanceTable

MAX_POINTS = 20_000
N_LARGEST = 100  # always drawn, so that the tails are complete
MAX_DECADES = 5  # on each side of 0; smaller values are on the linear part in the middle
SMALLEST_SCALE = 1e-30  # nats; matplotlib's own arithmetic fails near the end of float64's range
BLUE, ORANGE, PURPLE, GREY = "#2b6cb0", "#c05621", "#6b46c1", "#8a8a8a"


def make_figure(table: ImportanceTable) -> Figure:
    """Utility against |w|, one panel per split; and where both splits exist, utility on train against test."""
    splits = list(table.about["baseline"])
    n_panels = len(splits) + (len(splits) == 2)
    figure = Figure(figsize=(5.2 * n_panels, 5.8), layout="constrained", dpi=110)
    panels = figure.subplots(1, n_panels, squeeze=False)[0]
    rows = _choose_rows(table, splits)
    for panel, split in zip(panels, splits, strict=False):
        _draw_magnitude(panel, table, split, rows)
    if len(splits) == 2:
        _draw_splits(panels[-1], table, rows)
    plan, n_all = table.about["plan"], len(table)
    drawn = "" if len(rows) == n_all else f"; drawn are {len(rows):,}: the {N_LARGEST:,} largest and a random part"
    figure.suptitle(f"{plan['parameter']}: {n_all:,} of {math.prod(plan['shape']):,} weights{drawn}", fontsize=11)
    return figure


def _choose_rows(table: ImportanceTable, splits: list[str]) -> Int64[np.ndarray, " rows"]:
    """The rows to draw: all, or those with the largest |utility| and a random part of the others."""
    if len(table) <= MAX_POINTS:
        return np.arange(len(table))
    size = np.max([np.nan_to_num(np.abs(table.columns[f"utility_{split}"])) for split in splits], axis=0)
    largest = np.argpartition(-size, N_LARGEST)[:N_LARGEST]
    return np.union1d(largest, np.random.default_rng(0).choice(len(table), MAX_POINTS - N_LARGEST, replace=False))


def _draw_magnitude(axes: Axes, table: ImportanceTable, split: str, rows: Int64[np.ndarray, " rows"]) -> None:
    magnitude, utility = table.columns["magnitude"], table.columns[f"utility_{split}"]
    touched, run = table.columns[f"touched_{split}"] > 0, np.isfinite(utility)
    _scatter(axes, magnitude, utility, ~touched, rows, GREY, "provably without effect")
    _scatter(axes, magnitude, utility, touched & run, rows, BLUE, "touched")
    _scatter(axes, magnitude, utility, ~run, rows, ORANGE, "not run, not drawn")
    _scale(axes, "y", utility)
    axes.axhline(0, color="black", linewidth=0.6, zorder=0)
    axes.set(xlabel="|w|", ylabel=f"utility on {split}, nats (above 0: the weight helps)", xlim=(0, None))
    found = compare_magnitude(table, split)
    r, rank = _say(found["pearson_touched"]), _say(found["spearman_touched"])
    axes.set_title(f"{split}: |utility| with |w|, touched alone\nPearson {r}, Spearman {rank}", fontsize=10)
    _legend(axes)


def _draw_splits(axes: Axes, table: ImportanceTable, rows: Int64[np.ndarray, " rows"]) -> None:
    train, test = (table.columns[f"utility_{split}"] for split in ("train", "test"))
    in_train, in_test = (table.columns[f"touched_{split}"] > 0 for split in ("train", "test"))
    run = np.isfinite(train) & np.isfinite(test)
    _scatter(axes, train, test, ~in_train & ~in_test, rows, GREY, "without effect on both")
    _scatter(axes, train, test, (in_train ^ in_test) & run, rows, PURPLE, "touched on one")
    _scatter(axes, train, test, in_train & in_test & run, rows, BLUE, "touched on both")
    _scatter(axes, train, test, ~run, rows, ORANGE, "not run, not drawn")
    for which in ("x", "y"):  # the same scale on both, so that equal utilities lie on a straight line
        _scale(axes, which, np.concatenate([train, test]))
    axes.axline((0, 0), (1, 1), color="black", linewidth=0.6, zorder=0)
    axes.tick_params(axis="x", labelrotation=90)
    axes.set(xlabel="utility on train, nats", ylabel="utility on test, nats")
    found = compare_splits(table)
    r, ceiling = _say(found["pearson"]), _say(found["ceiling"])
    axes.set_title(f"train with test\nPearson {r}, noise ceiling {ceiling}", fontsize=10)
    _legend(axes)


def _scatter(
    axes: Axes,
    x: Float64[np.ndarray, " sites"],
    y: Float64[np.ndarray, " sites"],
    kind: Bool[np.ndarray, " sites"],
    rows: Int64[np.ndarray, " rows"],
    color: str,
    label: str,
) -> None:
    """Draw the chosen rows of one kind, if there are any; the legend counts all sites of that kind."""
    if kind.any():
        shown = rows[kind[rows]]
        axes.scatter(x[shown], y[shown], s=7, alpha=0.5, color=color, linewidths=0, label=f"{label}: {kind.sum():,}")


def _scale(axes: Axes, which: str, utility: Float64[np.ndarray, " sites"]) -> None:
    """Set a symmetric-log axis that holds every utility: logarithmic down to a decade below nearly all nonzero ones."""
    size = np.abs(utility[np.isfinite(utility) & (utility != 0)])
    largest = max(size.max(), SMALLEST_SCALE) if len(size) else 1e-9
    smallest = max(np.quantile(size, 0.05), largest * 10.0**-MAX_DECADES) if len(size) else largest
    set_scale, set_limits = (axes.set_xscale, axes.set_xlim) if which == "x" else (axes.set_yscale, axes.set_ylim)
    set_scale("symlog", linthresh=10.0 ** math.floor(math.log10(smallest)))
    set_limits(-2 * largest, 2 * largest)


def _legend(axes: Axes) -> None:
    """Place the legend below the axes, where it hides nothing."""
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9, markerscale=2, frameon=False)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)


def _say(r: float | None) -> str:
    return "undefined" if r is None else f"{r:.2f}"
