"""The final rows: one per site, importance beside magnitude; and what is known of the whole job.

In: sites and merged partials. Out: a frozen `ImportanceTable`. Statistics, plots and export read it and nothing else.
Torch-free: the API streams tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

COORDINATES = {
    1: ("out",),
    2: ("out", "in"),
    3: ("out", "in", "k"),
    4: ("out", "in", "kh", "kw"),
    5: ("out", "in", "kd", "kh", "kw"),
}


@dataclass(frozen=True)
class ImportanceTable:
    """Columns in the order of DESIGN.md section 4, and `about`: what the job was and what it found as a whole.

    `about` is plain JSON: `spec`, `plan` (without its shards), `baseline` {split: {n_examples, loss, accuracy}},
    `proof` (or None where verify = 0), `n_not_finite` (sites whose replacement was not finite), `seconds`, `versions`.
    """

    columns: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns["index"])
