"""Numbers as people say them, and progress where there is no terminal."""

import pytest

from ablation.cli.display import progress_bar, say_bytes, say_number, say_seconds


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "0.0123 s"),
        (90, "90 s"),
        (120, "2 min"),
        (3 * 3600, "3 h"),
        (182.5 * 86400, "182 days"),
        (50_300 * 86400, "50,300 days"),
    ],
)
def test_seconds(seconds: float, said: str) -> None:
    assert say_seconds(seconds) == said


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [(17, "17 B"), (4096, "4.1 kB"), (999_700, "1 MB"), (4.3e9, "4.3 GB"), (5e12, "5,000 GB")],
)
def test_bytes(n_bytes: float, said: str) -> None:
    assert say_bytes(n_bytes) == said


@pytest.mark.parametrize(("value", "said"), [(1.573e6, "1,570,000"), (0, "0"), (12.34, "12.3"), (1e-6, "0.000001")])
def test_numbers_have_no_exponents(value: float, said: str) -> None:
    assert say_number(value) == said


def test_progress_in_a_log_file_is_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("starting") as update:
        for step in range(1001):
            update(step / 1000, "examples")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].split() == ["0%", "examples"]
    assert lines[-1].split() == ["100%", "examples"]
    assert len(lines) < 5
