"""The Metal kernels on an emulated GPU, under upstream's own code for the host, equal the CPU reference."""

import re
import subprocess
from pathlib import Path

import metal_host
import pytest

from tritcore.format import DEPTHS

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where things are built; skips where they cannot be."""
    if reason := metal_host.unavailable():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("metal")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, str]:
    """The kernels."""
    return metal_host.embed(folder / "sources")


@pytest.fixture(scope="module")
def host(folder: Path) -> list[Path]:
    """Everything else of the program, compiled. The registration of the types is part of it."""
    return metal_host.compile_host(folder)


@pytest.fixture(scope="module")
def program(folder: Path, sources: dict[str, str], host: list[Path]) -> Path:
    """The program that checks the kernels."""
    return metal_host.build(host, sources, folder)


@pytest.fixture(scope="module")
def tensor_program(folder: Path, sources: dict[str, str], host: list[Path]) -> Path:
    """The same with the kernels for GPUs with tensor units."""
    made = folder / "tensor"
    made.mkdir()
    # descriptors of products are template arguments, which C++17 does not know
    options = ("-std=c++20", "-DGGML_METAL_HAS_TENSOR")
    return metal_host.build(host, {"mul_mm": sources["mul_mm"]}, made, options)


def _check(program: Path, depth: int, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([str(program), str(depth), *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_kernels(program: Path, depth: int) -> None:
    # -11: an access behind the end of memory; -4: undefined behaviour
    assert _check(program, depth) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("depth", DEPTHS)
def test_tensor_kernels(tensor_program: Path, depth: int) -> None:
    assert _check(tensor_program, depth, "tensor") == (0, "")


# what each of two lines is part of
SIGNS = {
    ("sumf[row] += dot(trit_scales", "sumf[row] -= dot(trit_scales"): {"mul_mv", "mul_mv_id"},
    ("reg_f[i] = d*trit_column", "reg_f[i] = -d*trit_column"): {"get_rows", "mul_mv_ext", "mul_mm", "mul_mm_id"},
}


@pytest.mark.slow
def test_wrong_signs_are_found(sources: dict[str, str], host: list[Path], tmp_path: Path) -> None:
    planted = sources
    for right, wrong in SIGNS:
        assert any(right in source for source in sources.values())
        planted = {name: source.replace(right, wrong) for name, source in planted.items()}
    status, output = _check(metal_host.build(host, planted, tmp_path), 1)
    assert status == 1
    found = re.findall(r"^kernel_(\w+)_trit1\w*: \d+ failures$", output, re.M)
    assert set(found) == set().union(*SIGNS.values())
