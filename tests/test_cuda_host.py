"""The device functions of the CUDA backend as host C++: every bit is that of the scalar reference."""

import subprocess
from pathlib import Path

import pytest
from test_kernels_cross import OPTIONS, SANITIZERS

from kernel_programs import GGML, REFERENCE, compile_search
from llamabuild.shell import run
from llamabuild.toolchain import find_compilers
from programs import ROOT

pytestmark = pytest.mark.build

HERE = Path(__file__).parent / "kernels/cuda"
OURS = ROOT / "vendor/llama.cpp-patch/files/ggml/src"

# the tiles of mmq have one layout for dp4a and one for tensor cores
LAYOUTS = {"dp4a": (), "mma": ("-DTURING_MMA_AVAILABLE",)}


def check(folder: Path, layout: str, options: tuple[str, ...], kernels: Path = OURS / "ggml-cuda") -> tuple[int, str]:
    """Compile and run the checks of these kernels; return the exit status and what is printed."""
    if not GGML.is_dir():
        pytest.skip(f"{GGML} is missing: make build")
    compilers = find_compilers()
    folders = [HERE, kernels, OURS, OURS / "ggml-cpu", GGML / "src", GGML / "src/ggml-cpu", GGML / "include"]
    flags = [*OPTIONS, *options, "-w", *(f"-I{path}" for path in folders)]
    reference, program = folder / "ggml-trit.o", folder / "check"
    run([*compilers.c, "-std=gnu11", *flags, "-c", REFERENCE, "-o", reference])
    objects = [reference, compile_search(compilers.c, folder)]
    run([*compilers.cxx, "-std=c++17", *flags, *LAYOUTS[layout], HERE / "check.cpp", *objects, "-o", program])
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_device_functions(layout: str, tmp_path: Path) -> None:
    assert check(tmp_path, layout, SANITIZERS) == (0, "")


# what is wrong then, and the two lines
SIGNS = {
    "dot product": ("return trit_anchor<depth>(k)*(", "return -trit_anchor<depth>(k)*("),
    "dot product of one half": ("+ __low2float(y[1].ds)*sumi[1]", "- __low2float(y[1].ds)*sumi[1]"),
    "weights": ("v.y = (anchor*", "v.y = -(anchor*"),
    "tile row 0: code": ("= trit_signed_bytes<depth>(", "= -trit_signed_bytes<depth>("),
    "tile row 0: scale": ("= anchor*trit_ratio(", "= -anchor*trit_ratio("),
}


@pytest.mark.parametrize("wrong", SIGNS)
def test_a_wrong_sign_is_found(wrong: str, tmp_path: Path) -> None:
    before, after = SIGNS[wrong]
    planted = 0
    for path in (OURS / "ggml-cuda").glob("*.cuh"):
        text = path.read_text(encoding="utf-8")
        planted += text.count(before)
        (tmp_path / path.name).write_text(text.replace(before, after), encoding="utf-8")
    assert planted == 1
    status, output = check(tmp_path, "mma", (), tmp_path)
    assert status == 1
    assert wrong.removesuffix(" of one half") in output
