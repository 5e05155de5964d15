"""Configure and build llama.cpp with CMake and Ninja, out of tree."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from .page import NPM
from .shell import BuildError, error_line, find_tool, first_on_path, outside_git, run
from .toolchain import Compilers

LIBRARIES = ("llama", "mtmd")  # ggml and its backends with them
TOOLS = (
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
    "llama-bench",
    "llama-cli",
    "llama-server",
    "ggml-rpc-server",
)
TESTS = ("test-backend-ops", "test-quantize-fns")
TARGETS = (*LIBRARIES, *TOOLS, *TESTS)

PIP_HINT = "pip install cmake ninja"


def options(
    *,
    all_variants: bool,
    cuda: bool,
    commit: str,
    cuda_architectures: str = "",
    vulkan: bool = False,
    ui: bool = False,
) -> list[str]:
    """Return CMake's -D arguments.

    Args:
        all_variants: compile the CPU code once for each family of CPUs, as modules that ggml chooses from when it
            is loaded; otherwise once, for this machine's instruction sets.
        cuda: build ggml's CUDA backend too.
        commit: what the tools print as their commit.
        cuda_architectures: what it is compiled for, as CMAKE_CUDA_ARCHITECTURES has it; empty for ggml's own choice.
        vulkan: build ggml's Vulkan backend too.
        ui: let npm build llama-server's web page.
    """
    origin = "@loader_path" if platform.system() == "Darwin" else "$ORIGIN"
    values = {
        "CMAKE_BUILD_TYPE": "Release",
        # One plain file a library: wheels hold no symbolic links.
        "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
        # Libraries find one another beside them, tools find them in ../lib: the llama_cpp package's layout.
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": f"{origin};{origin}/../lib",
        "GGML_NATIVE": "OFF" if all_variants else "ON",
        "GGML_BACKEND_DL": "ON" if all_variants else "OFF",
        "GGML_CPU_ALL_VARIANTS": "ON" if all_variants else "OFF",
        "GGML_CUDA": "ON" if cuda else "OFF",
        "GGML_VULKAN": "ON" if vulkan else "OFF",
        "GGML_RPC": "ON",
        "GGML_RPC_RDMA": "OFF",  # else libibverbs, where the build finds it, would have to be everywhere
        "LLAMA_BUILD_NUMBER": "0",
        "LLAMA_BUILD_COMMIT": commit,
        "LLAMA_BUILD_TESTS": "ON",
        "LLAMA_BUILD_TOOLS": "ON",
        "LLAMA_BUILD_SERVER": "ON",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        # Nothing but npm may reach for the network, neither now nor when the tools run.
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_UI": "ON" if ui else "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
    }
    if cuda:
        values["CMAKE_INSTALL_RPATH_USE_LINK_PATH"] = "ON"  # to CUDA's own libraries
        if cuda_architectures:
            values["CMAKE_CUDA_ARCHITECTURES"] = cuda_architectures
    return [f"-D{name}={value}" for name, value in values.items()]


class Build:
    """One build folder: its CMake and Ninja, its environment, its log.

    Attributes:
        folder: Ninja's folder; libraries and programs are in ``folder/bin``.
        log: what CMake and Ninja last wrote.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        python: Path,
        compilers: Compilers,
        extra_flags: Sequence[str],
        cxx_header: Path | None = None,
    ):
        """Prepare.

        Args:
            folder: Ninja's; the log lies beside it.
            root: holds the source and ``folder``. Its path is in no binary, and ccache finds the files of other clones.
            python: CMake and Ninja are beside it, or on PATH.
            compilers: to use.
            extra_flags: of the compilers, beyond those of CFLAGS and CXXFLAGS.
            cxx_header: is included before every C++ file; below ``root`` too.
        """
        self.folder = folder
        self.log = folder.with_name("build.log")
        self._cmake = find_tool("cmake", python, PIP_HINT)
        self._ninja = find_tool("ninja", python, PIP_HINT)
        flags = [*extra_flags, f"-ffile-prefix-map={root.resolve()}=."]
        cxx_flags = [*flags, *(["-include", str(cxx_header)] if cxx_header else [])]
        self._env = {
            **outside_git(root),
            **NPM,
            "CC": shlex.join(compilers.c),
            "CXX": shlex.join(compilers.cxx),
            # The Vulkan backend's generator of shaders is a CMake project of its own, which looks for Ninja itself.
            "PATH": first_on_path(self._ninja.parent),
            "CFLAGS": f"{os.environ.get('CFLAGS', '')} {shlex.join(flags)}".strip(),
            "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} {shlex.join(cxx_flags)}".strip(),
            "CCACHE_BASEDIR": str(root.resolve()),
            "NINJA_STATUS": "[%f/%t] ",
        }

    def configure(self, source: Path, arguments: Sequence[str]) -> bool:
        """Run CMake unless this folder is configured just so; return whether it ran.

        Raises:
            BuildError: CMake fails.
        """
        command = [str(self._cmake), "-S", str(source), "-B", str(self.folder), "-G", "Ninja"]
        command += [f"-DCMAKE_MAKE_PROGRAM={self._ninja}", *arguments]
        stamp = self.folder / "configured"
        wanted = "\n".join([*command, *(f"{name}={self._env[name]}" for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS"))])
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            return False
        (self.folder / "CMakeCache.txt").unlink(missing_ok=True)  # CMake keeps an old compiler otherwise
        stamp.unlink(missing_ok=True)
        try:
            self.log.write_text(run(command, env=self._env), encoding="utf-8")
            # Modules of another configuration would be loaded, and packaged.
            run([self._ninja, "-C", self.folder, "-t", "cleandead"], env=self._env)
        except BuildError as error:
            raise BuildError(f"cannot configure llama.cpp: {error}") from None
        stamp.write_text(wanted, encoding="utf-8")
        return True

    def compile(self, targets: Sequence[str], jobs: int) -> None:
        """Build the targets with Ninja; its progress goes to stdout, everything to the log.

        Raises:
            BuildError: a target does not build; the last lines of the log are on stderr by then.
        """
        command = [str(self._ninja), "-C", str(self.folder), "-j", str(jobs), *targets]
        last: deque[str] = deque(maxlen=25)
        progress = Progress()
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as ninja,
        ):
            assert ninja.stdout is not None
            for line in ninja.stdout:
                log.write(line)
                last.append(line)
                progress.show(line.rstrip())
        progress.close()
        if ninja.returncode != 0:
            sys.stderr.writelines(last)
            raise BuildError(f"the build failed: {error_line(''.join(last))}; the whole log is {self.log}")

    def variants(self) -> list[str]:
        """Return the file names of the modules with ggml's CPU code that this folder is configured for."""
        listed = run([self._ninja, "-C", self.folder, "-t", "targets", "all"], env=self._env)
        return sorted(set(re.findall(r"^bin/((?:lib)?ggml-cpu[^:]*\.(?:so|dll)):", listed, re.MULTILINE)))


class Progress:
    """Ninja's ``[done/total] what`` lines: one changing line on a terminal, a few lines elsewhere."""

    PARTS = 20

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._part = -1

    def show(self, line: str) -> None:
        match = re.match(r"\[(\d+)/(\d+)\] ", line)
        if match is None:
            return
        done, total = int(match[1]), int(match[2])
        part = done * self.PARTS // total
        if self._terminal:
            width = os.get_terminal_size(sys.stdout.fileno()).columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", flush=True)
        elif part > self._part:
            print(line, flush=True)
        self._part = part

    def close(self) -> None:
        if self._terminal and self._part >= 0:
            print()
