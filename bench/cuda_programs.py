"""The units of the CUDA backend that the TRIT types touch, compiled with the options of ggml's CMakeLists.txt."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from kernel_programs import GGML
from programs import ROOT
from tritcore.errors import TritError

ARCHITECTURES = ("75", "80", "86", "89", "90")  # Turing, A100, other Ampere, Ada, Hopper

_PATCHES = ROOT / "vendor/llama.cpp-patch"
_CUDA = Path("ggml/src/ggml-cuda")
# Behind all other folders: some packages of the toolkit come without cuBLAS.
_STAND_IN = ROOT / "tests/kernels/cuda/toolkit"

_DEFINITIONS = (
    "-DNDEBUG",
    "-D_GNU_SOURCE",
    "-D_XOPEN_SOURCE=600",
    "-DGGML_CUDA_PEER_MAX_BATCH_SIZE=128",
    "-DGGML_CUDA_USE_GRAPHS",
    "-DGGML_SCHED_MAX_COPIES=4",
)
_OPTIONS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-Xcompiler", "-fPIC")


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if not GGML.is_dir():
        return f"{GGML} is missing: make build"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH, so no CUDA code is compiled: install the CUDA toolkit"
    return None


def touched() -> list[str]:
    """The translation units that our files and patches add or change, relative to the folder of the CUDA backend."""
    added = {path.relative_to(_PATCHES / "files") for path in (_PATCHES / "files" / _CUDA).rglob("*.cu")}
    changed = {
        Path(name)
        for patch in (_PATCHES / "patches/llama.cpp").glob("*.patch")
        for name in re.findall(r"^\+\+\+ b/(.+\.cu)$", patch.read_text(encoding="utf-8"), re.M)
    }
    return sorted(path.relative_to(_CUDA).as_posix() for path in added | changed)


def source(name: str) -> Path:
    """A file of the CUDA backend in the patched source tree."""
    return GGML / "src/ggml-cuda" / name


def compile_object(unit: Path, made: Path, architectures: Iterable[str] = ARCHITECTURES) -> None:
    """Compile one file for these architectures, as many at once as there are CPUs.

    Raises:
        TritError: an error of the compiler.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    folders = [f"-I{folder}" for folder in (GGML / "include", GGML / "src", GGML / "src/ggml-cuda")]
    command = ["nvcc", *_OPTIONS, *_DEFINITIONS, *folders, "-Xcompiler", f"-idirafter,{_STAND_IN}", *targets]
    command += ["--threads", str(len(os.sched_getaffinity(0))), "-c", str(unit), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        output = done.stderr + done.stdout
        first = next((line for line in output.splitlines() if "error" in line or "fatal" in line), output[:200])
        raise TritError(f"{unit.name} cannot be compiled: {first}")
