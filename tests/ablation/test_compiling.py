"""A compilation is told when it begins; a loop that is compiled already, or found on disk, is not."""

from pathlib import Path

import numba
import pytest

from ablation.compiling import compiling_told


def test_a_compilation_is_told_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def double(x: float) -> float:
        return 2 * x

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    with compiling_told(lambda: told.append("compiling")):
        loop = numba.njit(cache=True)(double)
        assert told == []
        assert loop(1.5) == 3
        assert told == ["compiling"]
        loop(2.5)
        again = numba.njit(cache=True)(double)
        assert again(1.5) == 3  # from disk
        assert told == ["compiling"]
    loop(1)
    assert told == ["compiling"]
