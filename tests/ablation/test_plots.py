"""Figures: every site is drawn or counted, nothing global is touched, and every edge case draws."""

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from ablation.plots import MAX_POINTS, make_figure
from tests.ablation.tables import heavy_deltas, table_of
from tests.ablation.test_statistics import EDGES


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def n_drawn(axes) -> int:
    return sum(len(points.get_offsets()) for points in axes.collections)


def test_a_panel_per_split_and_one_for_both() -> None:
    train, test = heavy_deltas(300, 40, seed=1), heavy_deltas(300, 30, seed=2)
    assert len(make_figure(table_of({"test": test})).axes) == 1
    figure = make_figure(table_of({"train": train, "test": test}))
    assert [axes.get_title().split(":")[0].split("\n")[0] for axes in figure.axes] == [
        "train",
        "test",
        "train with test",
    ]
    dead = (train == 0).all(axis=1), (test == 0).all(axis=1)
    for axes, untouched in zip(figure.axes, dead, strict=False):
        assert axes.get_yscale() == "symlog"
        assert labels(axes) == [f"provably without effect: {untouched.sum()}", f"touched: {300 - untouched.sum()}"]
    assert labels(figure.axes[2]) == [
        f"without effect on both: {(dead[0] & dead[1]).sum()}",
        f"touched on one: {(dead[0] ^ dead[1]).sum()}",
        f"touched on both: {(~dead[0] & ~dead[1]).sum()}",
    ]
    assert [n_drawn(axes) for axes in figure.axes] == [300, 300, 300]


def test_every_point_is_within_the_axes() -> None:
    table = table_of({"train": heavy_deltas(300, 40, seed=1), "test": heavy_deltas(300, 30, seed=2)})
    for axes in make_figure(table).axes:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for points in axes.collections:
            x, y = np.asarray(points.get_offsets()).T
            assert left <= x.min() <= x.max() <= right
            assert bottom < y.min() <= y.max() < top


def test_equal_scales_where_train_meets_test() -> None:
    table = table_of({"train": heavy_deltas(300, 40), "test": 1e-3 * heavy_deltas(300, 30, seed=2)})
    axes = make_figure(table).axes[2]
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.xaxis.get_transform().linthresh == axes.yaxis.get_transform().linthresh  # type: ignore[attr-defined]


def test_of_many_sites_the_largest_are_drawn_and_the_title_says_how_many() -> None:
    n = MAX_POINTS + 5000
    deltas = heavy_deltas(n, 3)
    deltas[777] = -1.0
    figure = make_figure(table_of({"test": deltas}, shape=(n, 2)))
    drawn = n_drawn(figure.axes[0])
    assert MAX_POINTS - 100 <= drawn <= MAX_POINTS
    assert f"{n:,} of {2 * n:,} weights; drawn are {drawn:,}" in figure.get_suptitle()
    assert sum(int(label.split(": ")[1].replace(",", "")) for label in labels(figure.axes[0])) == n
    assert min(np.asarray(points.get_offsets())[:, 1].min() for points in figure.axes[0].collections) == -1.0


def test_sites_that_were_not_run_are_counted() -> None:
    figure = make_figure(EDGES["some not run"])
    for axes in figure.axes:
        assert "not run, not drawn: 10" in labels(axes)


@pytest.mark.parametrize("name", EDGES)
def test_edges_draw_without_a_warning(name: str) -> None:
    assert png(make_figure(EDGES[name])).startswith(b"\x89PNG")


def test_no_screen_and_no_global_state() -> None:
    code = "import sys, ablation.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
