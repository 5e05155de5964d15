"""Find the compilers, and find out which instruction sets this machine really executes."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .shell import BuildError, run

PROBES = Path(__file__).resolve().parent.parent / "probes"

ISA_MACROS = {
    "__SSE4_2__": "sse4.2",
    "__AVX__": "avx",
    "__AVX2__": "avx2",
    "__FMA__": "fma",
    "__F16C__": "f16c",
    "__BMI2__": "bmi2",
    "__AVXVNNI__": "avx-vnni",
    "__AVX512F__": "avx512f",
    "__AVX512BW__": "avx512bw",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VNNI__": "avx512vnni",
    "__AVX512BF16__": "avx512bf16",
    "__AMX_TILE__": "amx-tile",
    "__AMX_INT8__": "amx-int8",
    "__AMX_BF16__": "amx-bf16",
    "__ARM_NEON": "neon",
    "__ARM_FEATURE_DOTPROD": "dotprod",
    "__ARM_FEATURE_MATMUL_INT8": "i8mm",
    "__ARM_FEATURE_SVE": "sve",
}
"""Compiler macro -> short name, of the instruction sets that ggml's CPU kernels use."""

NATIVE = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"

NO_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")


@dataclass(frozen=True)
class Compilers:
    """The C and C++ compiler, each as the words of a command (``CC`` may hold flags)."""

    c: tuple[str, ...]
    cxx: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """What a build is for.

    Attributes:
        name: of the architecture, as the tags of wheels have it.
        compilers: that make code for it.
        cmake: CMake's -D arguments, for another machine than this one.
    """

    name: str
    compilers: Compilers
    cmake: tuple[str, ...] = ()

    def strip(self, files: Sequence[Path]) -> None:
        """Take from binaries what only debuggers read; on Windows that is in files of its own."""
        if os.name == "nt":
            return
        program = run([*self.compilers.c, "-print-prog-name=strip"]).strip()
        run([program, "-x" if platform.system() == "Darwin" else "--strip-unneeded", *files])

    @property
    def environment(self) -> dict[str, str]:
        """What pip and auditwheel must be told of another machine than this one."""
        if not self.cmake:
            return {}
        libraries = Path(run([*self.compilers.c, "-print-file-name=libgomp.so.1"]).strip()).parent
        return {"_PYTHON_HOST_PLATFORM": f"linux-{self.name}", "LD_LIBRARY_PATH": str(libraries)}


def this_machine() -> Machine:
    """Return the machine that runs this. Raises BuildError, as `find_compilers` does."""
    return Machine(platform.machine().lower(), find_compilers())


def cross(name: str) -> Machine:
    """Return a Linux machine of another architecture, with the cross compilers that Debian has for it.

    Raises:
        BuildError: they are missing.
    """
    prefix = f"{name}-linux-gnu-"
    for program in (f"{prefix}gcc", f"{prefix}g++"):
        if shutil.which(program) is None:
            raise BuildError(f"{program} not found on PATH; install it (Debian: apt install g++-{name}-linux-gnu)")
    cmake = ("-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_SYSTEM_PROCESSOR={name}")
    return Machine(name, Compilers((f"{prefix}gcc",), (f"{prefix}g++",)), cmake)


def find_compilers() -> Compilers:
    """Return the compilers of CC and CXX, or the first of the usual names on PATH.

    Raises:
        BuildError: there is no C or no C++ compiler.
    """
    return Compilers(
        c=_find_compiler("C", "CC", ("cc", "gcc", "clang")),
        cxx=_find_compiler("C++", "CXX", ("c++", "g++", "clang++")),
    )


def _find_compiler(language: str, variable: str, names: tuple[str, ...]) -> tuple[str, ...]:
    chosen = os.environ.get(variable)
    for command in [shlex.split(chosen)] if chosen else [[name] for name in names]:
        if command and shutil.which(command[0]):
            return tuple(command)
    looked_for = f"{variable}={chosen}" if chosen else ", ".join(names)
    raise BuildError(
        f"no {language} compiler found (looked for {looked_for}); "
        "install one (Debian: apt install build-essential, macOS: xcode-select --install)"
    )


@dataclass(frozen=True)
class InstructionSets:
    """What ``native`` gives on this machine.

    Attributes:
        announced: short names of the instruction sets that the compiler turns on.
        extra_flags: flags that turn off what does not run.
    """

    announced: tuple[str, ...]
    extra_flags: tuple[str, ...]


def probe(cc: tuple[str, ...]) -> InstructionSets:
    """Ask the compiler what this machine has, and execute what machines are known to announce wrongly."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.c"
        empty.touch()
        macros = _macros(cc, empty)
        announced = tuple(name for macro, name in ISA_MACROS.items() if macro in macros)
        faulty = "amx-tile" in announced and not _runs(cc, PROBES / "amx.c", Path(folder))
    return InstructionSets(announced, NO_AMX if faulty else ())


def _macros(cc: tuple[str, ...], empty: Path) -> set[str]:
    try:
        text = run([*cc, NATIVE, "-dM", "-E", empty])
    except BuildError as error:
        raise BuildError(f"{cc[0]} does not take {NATIVE}: {error}; use --cpu all") from None
    return set(re.findall(r"^#define (\w+)", text, re.MULTILINE))


def _runs(cc: tuple[str, ...], source: Path, folder: Path) -> bool:
    """Return whether a probe, compiled for this machine, runs to its end in a process of its own."""
    program = folder / source.stem
    try:
        run([*cc, NATIVE, "-O1", "-o", program, source])
    except BuildError:
        return False  # a compiler that cannot build AMX code must not be asked to
    return subprocess.run([program], stdin=subprocess.DEVNULL).returncode == 0
