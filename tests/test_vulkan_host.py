"""The arithmetic of the Vulkan shaders as host C++: every bit is that of the scalar reference."""

import shutil
import subprocess
from pathlib import Path

import pytest
from test_kernels_cross import OPTIONS, SANITIZERS

import spirv
from kernel_programs import GGML, REFERENCE, compile_search
from llamabuild.shell import run
from llamabuild.toolchain import find_compilers
from programs import ROOT
from tritcore.format import DEPTHS

pytestmark = pytest.mark.build

HERE = Path(__file__).parent / "kernels/vulkan"
OURS = ROOT / "vendor/llama.cpp-patch/files/ggml/src"
SHADERS = Path("ggml-vulkan/vulkan-shaders")

# products with vectors of floats, and of Q8_1 for integer dot products
VECTORS = {"floats": (), "q8_1": ("-DTRIT_Q8_1",)}


def check(folder: Path, depth: int, vectors: str, options: tuple[str, ...], ours: Path = OURS) -> tuple[int, str]:
    """Compile and run the checks of the shaders below `ours`; return the exit status and what is printed."""
    if not GGML.is_dir():
        pytest.skip(f"{GGML} is missing: make build")
    compilers = find_compilers()
    folders = [HERE, ours / SHADERS, OURS, OURS / "ggml-cpu", GGML / "src", GGML / "src/ggml-cpu", GGML / "include"]
    flags = [*OPTIONS, *options, "-w", *(f"-I{path}" for path in folders)]
    reference, program = folder / "ggml-trit.o", folder / "check"
    run([*compilers.c, "-std=gnu11", *flags, "-c", REFERENCE, "-o", reference])
    objects = [reference, compile_search(compilers.c, folder)]
    chosen = (f"-DDATA_A_TRIT{depth}", *VECTORS[vectors])
    run([*compilers.cxx, "-std=c++17", *flags, *chosen, HERE / "check.cpp", *objects, "-o", program])
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("vectors", VECTORS)
def test_arithmetic(vectors: str, depth: int, tmp_path: Path) -> None:
    assert check(tmp_path, depth, vectors, SANITIZERS) == (0, "")


# what is found, with which vectors, and the two lines
MISTAKES = {
    "weight 0": ("floats", "weights = scale*(", "weights = -scale*("),
    "tile: code": ("floats", "trit_signed_bytes(TRIT_DEPTH, trit_pack(", "-trit_signed_bytes(TRIT_DEPTH, trit_pack("),
    "tile: scales": ("floats", "scales = trit_anchor(", "scales = -trit_anchor("),
    "the product": ("floats", "anchor*dot(ratios", "-anchor*dot(ratios"),
    "block 0: the product": ("q8_1", "anchor*(float(", "-anchor*(float("),
    "are read": ("floats", "[first + TRIT_N_PAIRS - 1 + odd]", "[first + TRIT_N_PAIRS]"),
}


@pytest.mark.parametrize("found", MISTAKES)
def test_a_mistake_is_found(found: str, tmp_path: Path) -> None:
    vectors, before, after = MISTAKES[found]
    (tmp_path / SHADERS).mkdir(parents=True)
    shutil.copy2(OURS / "ggml-trit-common.h", tmp_path)
    planted = 0
    for path in (OURS / SHADERS).glob("*.glsl"):
        text = path.read_text(encoding="utf-8")
        planted += text.count(before)
        (tmp_path / SHADERS / path.name).write_text(text.replace(before, after), encoding="utf-8")
    assert planted == 1
    status, output = check(tmp_path, 3, vectors, (), tmp_path)
    assert status == 1
    assert found in output


def test_operations(tmp_path: Path) -> None:
    """For a token, TRIT2 takes no more operations than Q4_K, the type that most files have."""
    if reason := spirv.unavailable():
        pytest.skip(reason)
    (q4_k,) = (shader for shader in spirv.OTHERS if shader.name == "Q4_K")
    trit2, other = (
        sum(spirv.per_weight(shader, spirv.count(shader, tmp_path))[:3]) for shader in (spirv.TRIT[2], q4_k)
    )
    assert trit2 <= other
