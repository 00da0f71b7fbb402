"""The kernels for CUDA devices: their numbers, in Triton's interpreter; and that they compile, for a device not here.

The interpreter must be chosen before Triton is imported, so the comparisons (`interpreted.py`) run in another process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[5]

pytest.importorskip("triton", reason="this torch comes without Triton")


def run_comparisons(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        "tests/ablation/engine/responses/loops/interpreted.py",
    ]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_the_kernels_equal_the_compiled_loops_in_the_interpreter() -> None:
    run = run_comparisons(TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout[-8000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_kernels_equal_the_compiled_loops_on_a_gpu() -> None:
    run = run_comparisons()
    assert run.returncode == 0, run.stdout[-8000:]


LISTS = {"units", "labels", "rows", "examples", "far_starts"}  # int64; `examples` of far ones
WIDE = {  # float64
    *("y", "largest", "largest_x", "spread", "reach", "of_others", "bounds", "z", "loss", "far_losses"),
    *("delta", "delta_squared", "class_delta", "class_delta_squared", "within", "by_run"),
}
NARROW = {"q", "columns", "moments", "c", "ts", "low", "high", "step", "x"}  # float32
COMPILED: list[tuple[str, dict[str, Any], int]] = [
    ("_list_pairs", {"HAS_RELU": True, "BLOCK": 512}, 4),
    ("_moments", {"CLASSES": 256}, 1),
    ("_series", {"IS_LOGIT": False, "BLOCK": 128}, 4),
    ("_series", {"IS_LOGIT": True, "BLOCK": 128}, 4),
    ("_far_losses", {"IS_LOGIT": False, "FARS": 4, "CLASSES": 256}, 4),
    ("_far_losses", {"IS_LOGIT": True, "FARS": 4, "CLASSES": 256}, 4),
    ("_add_rows", {"TILE": 1024, "HAS_FAR": False, "HAS_SQUARES": True, "HAS_RUNS": False, "PER_CLASS": 0}, 4),
    ("_add_rows", {"TILE": 1024, "HAS_FAR": True, "HAS_SQUARES": True, "HAS_RUNS": True, "PER_CLASS": 50}, 4),
    ("_count_activated", {"TILE": 1024}, 4),
]


def type_of(name: str) -> str:
    if name.startswith("n_") and name != "n_candidates":
        return "i32"
    kinds = {"*fp64": WIDE, "*fp32": NARROW, "*i64": LISTS, "*fp16": {"opened"}}
    return next((kind for kind, names in kinds.items() if name in names), "*i32")


@pytest.mark.parametrize(
    ("name", "constants", "n_warps"), COMPILED, ids=[f"{k}-{row[0]}" for k, row in enumerate(COMPILED)]
)
def test_the_kernels_compile_for_a_device_that_is_not_here(name: str, constants: dict[str, Any], n_warps: int) -> None:
    """For the H100 and H200, to machine code: types, shapes and what an interpreter takes but a compiler doesn't."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ablation.engine.responses.loops import triton_rows

    kernel = getattr(triton_rows, name)
    names = kernel.arg_names
    signature = {each: "constexpr" if each in constants else type_of(each) for each in names}
    given = {(names.index(each),): value for each, value in constants.items()}
    # As when rows and pointers are multiples of 16 bytes, which is what makes it fast.
    even = {(k,): [["tt.divisibility", 16]] for k, each in enumerate(names) if signature[each][0] == "*"}
    source = ASTSource(kernel, signature, given, even)
    options = {"num_warps": n_warps, **triton_rows.LAUNCH_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert "atom" not in compiled.asm["ptx"]  # the same bytes, however programs are scheduled
    if name == "_add_rows":
        assert "fma.rn.f32" in compiled.asm["ptx"]
        assert ".local" not in compiled.asm["ptx"]
