"""Package the built libraries and tools with their Python bindings, and install them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import versions
from .compile import TOOLS
from .shell import BuildError, run
from .source import LLAMA_CPP
from .toolchain import Machine
from .versions import Versions

BINDINGS_FILES = (Path("pyproject.toml"), Path("README.md"), Path("LICENSE.md"), LLAMA_CPP / "LICENSE")
BINDINGS_FOLDERS = (Path("llama_cpp"), LLAMA_CPP / "conversion")
GGUF_PY = LLAMA_CPP / "gguf-py"
KEY_FILE = Path("llama_cpp/lib/build.key")
"""Lies in the wheel, so that the installed package itself says which build it is."""
COMMIT_FILE = KEY_FILE.with_name("build.commit")
"""Says which commit of this repository the wheel was made of. It is in no binary: each commit would compile again."""

ENVIRONMENT = "import sys, sysconfig; print(sys.prefix != sys.base_prefix, sysconfig.get_path('platlib'), sep='\\n')"
"""Asks an interpreter whether it is in a virtual environment, and where its packages are."""


@dataclass(frozen=True)
class Wheels:
    """Two wheels: llama-cpp-python over these very libraries, and the matching gguf.

    Attributes:
        versions: of both.
        source: the patched source distribution.
        binaries: the folder of the built libraries and programs.
        folder: where the wheels are made.
        python: interpreter of the virtual environment to install into.
    """

    versions: Versions
    source: Path
    binaries: Path
    folder: Path
    python: Path

    def libraries(self) -> list[Path]:
        """Return the built shared libraries; on macOS ggml's modules end in .so among the .dylib."""
        return sorted(path for path in self.binaries.iterdir() if path.suffix in (".so", ".dylib", ".dll"))

    def tools(self) -> list[Path]:
        """Return the command-line tools that go into ``llama_cpp/bin``."""
        return [self.binaries / f"{name}{'.exe' if os.name == 'nt' else ''}" for name in TOOLS]

    def key(self, source_key: str, binaries: Sequence[Path]) -> str:
        """Return a hash over the source's key and versions, and one over the state of every binary.

        Equal keys give equal wheels, but for the commit that they name.
        """
        source = hashlib.sha256(f"{source_key} {self.versions}".encode()).hexdigest()
        states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in binaries]
        return f"{source} {hashlib.sha256(str(states).encode()).hexdigest()}"

    def install(self, source_key: str) -> bool:
        """Make and install the wheels unless this very build is installed; return whether it did.

        Raises:
            BuildError: the interpreter is in no virtual environment, pip fails, or the tools do not run.
        """
        key = self.key(source_key, [*self.libraries(), *self.tools()])
        packages = self._packages()
        if _installed_key(packages) == key:
            return False
        self._install(key, self.libraries(), self.tools())
        run([packages / "llama_cpp" / "bin" / "llama-server", "--version"])
        return True

    def install_python(self, source_key: str) -> bool:
        """Install the wheels without libraries and tools, unless there is any build of this source.

        Return whether it did.

        Raises:
            BuildError: the interpreter is in no virtual environment, or pip fails.
        """
        key = self.key(source_key, [])
        if _installed_key(self._packages()).split()[:1] == key.split()[:1]:
            return False
        self._install(key, [], [])
        return True

    def _packages(self) -> Path:
        in_venv, packages = run([self.python, "-I", "-c", ENVIRONMENT]).splitlines()
        if in_venv != "True":
            raise BuildError(f"{self.python} is in no virtual environment; `make build` makes one")
        return Path(packages)

    def _install(self, key: str, libraries: Sequence[Path], tools: Sequence[Path]) -> None:
        made = self.make(key, libraries, tools)
        run([*self._pip(), "install", "--no-deps", "--force-reinstall", *made])

    def make(
        self, key: str, libraries: Sequence[Path], tools: Sequence[Path], machine: Machine | None = None
    ) -> tuple[Path, Path]:
        """Make the wheels of the bindings and of gguf in ``folder/made``, and return them.

        Args:
            key: that the first one holds.
            libraries: to pack.
            tools: to pack.
            machine: strip the binaries, which are for this one; None leaves them as they are, for this machine.

        Raises:
            BuildError: a program fails.
        """
        stages = self.stage(key, libraries, tools)
        env = os.environ | (machine.environment if machine else {})
        if machine:
            packed = [path for folder in ("lib", "bin") for path in (stages[0] / "llama_cpp" / folder).iterdir()]
            names = {path.name for path in (*libraries, *tools)}
            machine.strip([path for path in packed if path.name in names])
        made = self.folder / "made"
        shutil.rmtree(made, ignore_errors=True)
        # The build requirements are in the environment already: nothing is fetched for an isolated one.
        run([*self._pip(), "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", made, *stages], env=env)
        (bindings,), (gguf,) = made.glob("llama_cpp_python-*.whl"), made.glob("gguf-*.whl")
        return bindings, gguf

    def _pip(self) -> list[str | Path]:
        return [self.python, "-I", "-m", "pip", "--disable-pip-version-check"]

    def stage(self, key: str, libraries: Sequence[Path], tools: Sequence[Path]) -> tuple[Path, Path]:
        """Lay out two source trees, the bindings with libraries and tools, and gguf; return their folders.

        Raises:
            BuildError: the source has other versions than those wanted.
        """
        stage, gguf = self.folder / "stage", self.folder / "gguf"
        for folder in (stage, gguf):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in BINDINGS_FOLDERS:
            shutil.copytree(self.source / folder, stage / folder)
        for file in BINDINGS_FILES:
            shutil.copy2(self.source / file, stage / file)
        versions.stamp(stage / "llama_cpp" / "__init__.py", "__version__", self.versions.llama_cpp_python)
        for name, files in (("lib", libraries), ("bin", tools)):
            target = stage / "llama_cpp" / name
            target.mkdir()
            for file in files:
                shutil.copy2(file, target)
        (stage / KEY_FILE).write_text(key, encoding="utf-8")
        (stage / COMMIT_FILE).write_text(versions.commit(), encoding="utf-8")
        shutil.copytree(self.source / GGUF_PY, gguf)
        versions.stamp(gguf / "pyproject.toml", "version", self.versions.gguf)
        return stage, gguf


def _installed_key(packages: Path) -> str:
    installed = packages / KEY_FILE
    return installed.read_text(encoding="utf-8") if installed.exists() else ""
