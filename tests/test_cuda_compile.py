"""nvcc compiles every translation unit of the CUDA backend that the TRIT types touch, for every architecture."""

from pathlib import Path

import pytest

import cuda_programs


def test_touched_units() -> None:
    units = cuda_programs.touched()
    assert {"convert.cu", "getrows.cu", "mmvq.cu", "template-instances/mmq-instance-trit2.cu"} <= set(units)


@pytest.mark.slow
@pytest.mark.parametrize("unit", cuda_programs.touched())
def test_compiles(unit: str, tmp_path: Path) -> None:
    if reason := cuda_programs.unavailable():
        pytest.skip(reason)
    cuda_programs.compile_object(cuda_programs.source(unit), tmp_path / "unit.o")
