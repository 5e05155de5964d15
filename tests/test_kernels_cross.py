"""The kernels of every instruction set that runs here, those of AArch64 under qemu, against plain arithmetic in C."""

import subprocess
from pathlib import Path

import pytest

import neon_instructions
from kernel_programs import NEON, NEON_BY_CLANG, X86, Target

pytestmark = pytest.mark.build

CHECK = Path(__file__).parent / "kernels" / "check.c"
# Without optimization the intrinsics that take constants do not compile; without contraction the expected sums
# are rounded as written.
OPTIONS = ("-O1", "-ffp-contract=off")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover")


@pytest.mark.parametrize("target", [*NEON, *NEON_BY_CLANG, *X86], ids=lambda target: target.name)
def test_kernels(target: Target, tmp_path: Path) -> None:
    if reason := target.unavailable():
        pytest.skip(reason)
    program = tmp_path / "check"
    # qemu has no room for the sanitizers' shadow memory
    target.build(CHECK, program, (*OPTIONS, *(SANITIZERS if target.is_native else ())))
    done = subprocess.run([*target.runner, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", [NEON[1], NEON_BY_CLANG[1]], ids=lambda target: target.name)
def test_executed_instructions(target: Target, tmp_path: Path) -> None:
    """For a token, TRIT2 takes fewer instructions than Q3_K, which has about its size."""
    if reason := neon_instructions.unavailable(target):
        pytest.skip(reason)
    trit2, q3_k = "TRIT2 strip, 1 column", "Q3_K row"
    counts = neon_instructions.count(target, tmp_path / "count", only=(trit2, q3_k))
    assert 10 < counts[trit2] < counts[q3_k]
