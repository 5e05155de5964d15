"""nvcc compiles every translation unit of the CUDA backend that the TRIT types touch."""

from pathlib import Path

import pytest

import cuda_programs

pytestmark = pytest.mark.build


def test_touched_units() -> None:
    units = cuda_programs.touched()
    assert {"convert.cu", "getrows.cu", "mmvq.cu", "template-instances/mmq-instance-trit2.cu"} <= set(units)


def _compile(unit: str, folder: Path, architectures: tuple[str, ...]) -> None:
    if reason := cuda_programs.unavailable():
        pytest.skip(reason)
    cuda_programs.compile_object(cuda_programs.source(unit), folder / "unit.o", architectures)


@pytest.mark.slow
@pytest.mark.parametrize("unit", cuda_programs.touched())
def test_compiles(unit: str, tmp_path: Path) -> None:
    _compile(unit, tmp_path, ("86",))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("unit", cuda_programs.touched())
def test_compiles_for_every_architecture(unit: str, tmp_path: Path) -> None:
    _compile(unit, tmp_path, cuda_programs.ARCHITECTURES)
