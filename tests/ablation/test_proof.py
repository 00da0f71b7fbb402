"""The job's own check notices what it is there for: wrong deltas, wrong rows, wrong examples."""

import numpy as np
import pytest

from ablation.errors import ProofError
from ablation.proof import Compared, choose_rows, make_proof, rms

RANDOM = np.random.default_rng(0)
DELTAS = RANDOM.standard_normal((5, 12)) * 1e-6


def compared(engine=DELTAS, continued=DELTAS, whole=DELTAS, sums=None) -> dict[str, Compared]:
    sums = continued.sum(axis=1) if sums is None else sums
    return {"test": Compared(engine, continued, whole, sums, float(np.sqrt((DELTAS.mean(1) ** 2).mean())), 1.2e-14)}


@pytest.mark.parametrize("precision", ["mixed", "float64", "float32"])
def test_agreement_passes_and_is_reported(precision: str) -> None:
    proof = make_proof(compared(), precision)
    assert proof["arithmetic_error"] == 0
    assert proof["n_sites"] == 5
    assert proof["n_examples"] == 12


def test_deltas_whose_squares_overflow_are_still_proven() -> None:
    assert rms(np.array([3e300, -4e300])) == pytest.approx(12.5**0.5 * 1e300)
    assert [rms(np.array(values)) for values in ([0.0, 0.0], [1.0, np.inf])] == [0, np.inf]
    huge = DELTAS * 1e300
    assert make_proof(compared(huge, huge, huge), "mixed")["sum_error"] == 0
    with pytest.raises(ProofError, match="sums"):
        make_proof(compared(huge, huge, huge, sums=huge.sum(1) * 2), "mixed")


def test_an_arithmetic_error_fails_the_job_with_both_numbers() -> None:
    wrong = DELTAS.copy()
    wrong[3] *= 1.01
    with pytest.raises(ProofError, match=r"allowed is 0\.0001"):
        make_proof(compared(engine=wrong), "mixed")
    with pytest.raises(ProofError, match="allowed is 1e-09"):
        make_proof(compared(engine=DELTAS * (1 + 1e-6)), "float64")
    proof = make_proof(compared(engine=wrong), "float32")  # promises nothing beyond what it reports
    assert proof["arithmetic_error"] > 1e-3


def test_a_mixed_delta_that_is_nothing_beside_the_others_may_be_off_by_more_of_itself() -> None:
    truth = DELTAS.copy()
    truth[3] *= 1e-5
    engine = truth.copy()
    engine[3] *= 1.001
    assert make_proof(compared(engine, truth, truth), "mixed")["arithmetic_error"] < 1e-5
    with pytest.raises(ProofError, match="allowed is 1e-09"):
        make_proof(compared(engine, truth, truth), "float64")
    engine[3] += 1e-3 * np.abs(DELTAS).mean()
    with pytest.raises(ProofError, match=r"allowed is 0\.0001"):
        make_proof(compared(engine, truth, truth), "mixed")


@pytest.mark.parametrize(
    "sums", [np.roll(DELTAS, 1, axis=0).sum(1), DELTAS[:, 1:].sum(1), -DELTAS.sum(1), DELTAS.sum(1) * 2]
)
def test_sums_of_other_rows_or_examples_fail_the_job(sums: np.ndarray) -> None:
    with pytest.raises(ProofError, match="the table's sums"):
        make_proof(compared(sums=sums), "mixed")


def test_a_delta_where_the_reference_has_none_fails() -> None:
    engine, truth = DELTAS.copy(), DELTAS.copy()
    truth[2] = 0
    engine[2] = 1e-9
    with pytest.raises(ProofError):
        make_proof(compared(engine=engine, continued=truth, whole=truth), "float64")


def test_nothing_moves_anywhere() -> None:
    zero = np.zeros((3, 4))
    proof = make_proof({"test": Compared(zero, zero, zero, np.zeros(3), 0.0, 1.2e-14)}, "mixed")
    assert proof["arithmetic_error"] == proof["sum_error"] == proof["model_rounding_p99"] == 0


def test_rows_are_the_largest_and_touched_ones() -> None:
    utility = np.array([[0.0, 5.0, -9.0, 1.0, 0.0, 0.5], [0.0, 1.0, 0.0, 7.0, 0.0, 0.0]])
    touched = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 1, 1, 0, 0]])
    rows = choose_rows(utility, touched, 4)
    assert {2, 3} <= set(rows.tolist()) <= {1, 2, 3, 5}
    assert len(rows) == 4
    assert choose_rows(utility, touched, 6).tolist() == [0, 1, 2, 3, 4, 5]
