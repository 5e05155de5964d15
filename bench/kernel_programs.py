"""C programs that are linked with ggml's TRIT kernels and little else, for an instruction set of one's choice.

AArch64 programs are cross-compiled and run under qemu where this machine is something else.
"""

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from programs import BUILD, ROOT, cpu_flags
from tritcore.errors import TritError

QEMU = "qemu-aarch64"

_CROSS_COMPILER = "aarch64-linux-gnu-gcc"
_PACKAGES = {
    _CROSS_COMPILER: "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    QEMU: "qemu-user",
    "clang": "clang",
    "clang++": "clang",
}
_MACHINES = {"arm": ("aarch64", "arm64"), "x86": ("x86_64", "AMD64")}

_OURS = ROOT / "vendor/llama.cpp-patch/files/ggml/src"
GGML = BUILD / "src/vendor/llama.cpp/ggml"
REFERENCE = _OURS / "ggml-trit.c"

_FOLDERS = tuple(f"-I{folder}" for folder in (_OURS, GGML / "src", GGML / "include"))


@dataclass(frozen=True)
class Target:
    """An instruction set that the kernels are compiled for.

    Attributes:
        arch: the folder of ggml-cpu/arch.
        flags: the compiler's.
        needs: what /proc/cpuinfo must announce to run the program without qemu.
        by_clang: whether clang compiles it, as on a Mac, whatever CC says.
    """

    name: str
    arch: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]
    by_clang: bool = False

    @property
    def is_native(self) -> bool:
        """Whether this machine is of the same architecture."""
        return platform.machine() in _MACHINES[self.arch]

    @property
    def compiler(self) -> list[str]:
        """The command that compiles."""
        if self.is_native:
            return ["clang"] if self.by_clang else shlex.split(os.environ.get("CC", "cc"))
        return [*(("clang", "--target=aarch64-linux-gnu") if self.by_clang else (_CROSS_COMPILER,)), "-static"]

    @property
    def runner(self) -> list[str]:
        """What a program's command line begins with."""
        return [] if self.is_native else [QEMU, "-cpu", "max"]

    def unavailable(self) -> str | None:
        """Why programs cannot be built or run here, and what to install; None if they can."""
        if not GGML.is_dir():
            return f"{GGML} is missing: make build"
        clang = ("clang",) if self.by_clang else ()
        if self.is_native:
            missing = [flag for flag in self.needs if flag not in cpu_flags()]
            if missing:
                return f"this CPU lacks {', '.join(missing)}"
            return missing_programs(clang)
        if self.arch != "arm":
            return f"{self.name} needs an x86-64 machine"
        # clang takes the libraries of GCC
        return missing_programs((*clang, _CROSS_COMPILER, QEMU))

    def build(self, source: Path, program: Path, options: Sequence[str], others: Iterable[Path] = ()) -> None:
        """Compile `source` and the kernels, and `others`, to `program`.

        Raises:
            TritError: an error of the compiler.
        """
        kernels = [REFERENCE, _OURS / "ggml-cpu/trit.c"]
        kernels += [_OURS / "ggml-cpu/arch" / self.arch / name for name in ("trit.c", "trit-gemm.c")]
        search = compile_search(self.compiler, program.parent)
        command = [*self.compiler, "-std=gnu11", "-w", *self.flags, *options, *_FOLDERS]
        command += [f"-I{folder}" for folder in (_OURS / "ggml-cpu", GGML / "src/ggml-cpu")]
        command += [str(path) for path in (source, *kernels, search, *others)]
        _compile([*command, "-o", str(program), "-lm"], f"{source.name} for {self.name}")


NEON = (
    Target("neon", "arm", ("-march=armv8-a",), ("asimd",)),
    Target("dotprod", "arm", ("-march=armv8.2-a+dotprod+fp16",), ("asimddp", "asimdhp")),
    Target("i8mm", "arm", ("-march=armv8.6-a+dotprod+i8mm",), ("asimddp", "i8mm")),
)

NEON_BY_CLANG = tuple(replace(target, name=f"{target.name} by clang", by_clang=True) for target in NEON)

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl")

X86 = (
    Target("sse4.1", "x86", ("-msse4.1",), ("sse4_1",)),
    Target("avx", "x86", ("-mavx",), ("avx",)),
    Target("avx2", "x86", _AVX2, ("avx2", "fma", "f16c")),
    Target("avxvnni", "x86", (*_AVX2, "-mavxvnni"), ("avx_vnni",)),
    Target("avx512bw", "x86", _AVX512, ("avx512bw", "avx512vl")),
    Target("avx512vnni", "x86", (*_AVX512, "-mavx512vnni"), ("avx512_vnni", "avx512vl")),
    Target(
        "zen4",
        "x86",
        (*_AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16"),
        ("avx512_vnni", "avx512vbmi", "avx512_bf16"),
    ),
)


def compile_search(compiler: Sequence[str], folder: Path) -> Path:
    """The object file of the vector kernels that `REFERENCE` searches with.

    It is made without sanitizers: with them it takes minutes, and programs that check other kernels search nothing.

    Raises:
        TritError: an error of the compiler.
    """
    made = folder / "ggml-trit-tile.o"
    options = ("-std=gnu11", "-w", "-O1", "-ffp-contract=off", *_FOLDERS)
    _compile([*compiler, *options, "-c", str(_OURS / "ggml-trit-tile.c"), "-o", str(made)], made.name)
    return made


def _compile(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise TritError(f"{what} cannot be built: {first}")


def missing_programs(names: Iterable[str]) -> str | None:
    """Which of these programs are not installed, and how to mend it; None if all are."""
    missing = [name for name in names if shutil.which(name) is None]
    if not missing:
        return None
    packages = " ".join(_PACKAGES[name] for name in missing)
    return f"{' and '.join(missing)} not found: apt-get install {packages}"
