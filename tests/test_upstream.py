"""Upstream's own tests, which the build leaves in build/cmake/bin, on every variant of the CPU code that runs here.

`make test` runs all of test-backend-ops on the best variant. Here the other variants take the cases with TRIT types.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ggml
import pytest

from tritcore.format import DEPTHS
from tritrun import variants
from tritrun.machine import physical_cores

pytestmark = pytest.mark.build

PROGRAMS = Path(__file__).resolve().parent.parent / "build" / "cmake" / "bin"
TRIT_CASES = ["-o", "MUL_MAT,MUL_MAT_ID,GET_ROWS,SET_ROWS,CPY", "-p", "trit"]


def run(variant: str, program: str, *arguments: str) -> str:
    """Run a program that must succeed, on one variant; return its output."""
    environment = os.environ | variants.environment(variant)
    done = subprocess.run([PROGRAMS / program, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, variant + done.stdout + done.stderr
    assert variant == variants.NATIVE or f"libggml-cpu-{variant}.so" in done.stderr
    return done.stdout


@pytest.mark.slow
def test_quantize_fns() -> None:
    """All variants, as many at once as there are cores: each takes a core for 15 seconds."""
    with ThreadPoolExecutor(physical_cores()) as pool:
        list(pool.map(lambda variant: run(variant, "test-quantize-fns"), variants.runnable()))


@pytest.mark.parametrize("variant", ggml.runnable())
def test_backend_ops(variant: str) -> None:
    output = run(variant, "test-backend-ops", "test", "-b", "CPU", *TRIT_CASES)
    for depth in DEPTHS:
        assert f"MUL_MAT(type_a=trit{depth}," in output
