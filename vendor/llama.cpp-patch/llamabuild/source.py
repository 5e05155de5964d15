"""Fetch, verify, unpack and patch the pinned llama-cpp-python source distribution."""

from __future__ import annotations

import filecmp
import hashlib
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .shell import BuildError, error_line, outside_git, run

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

LLAMA_CPP = Path("vendor/llama.cpp")
"""llama.cpp's root inside the source distribution."""

PATCH_ROOTS = {"llama.cpp": LLAMA_CPP, "llama-cpp-python": Path()}
"""Where the patches of each folder of ``patches/`` apply, relative to the source distribution."""


@dataclass(frozen=True)
class PatchSet:
    """Our changes: an ordered series of patches, and whole new files for llama.cpp.

    Attributes:
        root: the folder with ``series``, ``patches/`` and ``files/``.
    """

    root: Path

    def series(self) -> list[str]:
        """Return the names in ``series``, such as ``llama.cpp/0001-x.patch``, in order of application."""
        path = self.root / "series"
        lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
        names = [line for line in lines if line]
        for name in names:
            if name.split("/")[0] not in PATCH_ROOTS or not self.patch(name).is_file():
                raise BuildError(f"{path}: there is no patch {name} in {self.root / 'patches'}")
        return names

    def patch(self, name: str) -> Path:
        """Return the file of one entry of the series."""
        return self.root / "patches" / name

    def new_files(self) -> list[Path]:
        """Return the whole new files, relative to llama.cpp's root, sorted."""
        folder = self.root / "files"
        return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())

    def key(self) -> str:
        """Return a SHA-256 over the pinned source and all our changes: equal keys give equal trees."""
        digest = hashlib.sha256(SHA256.encode())
        parts = [("patches/" + name, self.patch(name)) for name in self.series()]
        parts += [("files/" + path.as_posix(), self.root / "files" / path) for path in self.new_files()]
        for name, path in parts:
            content = path.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()


def verify(sdist: Path) -> None:
    """Check a source distribution against the pinned hash.

    Raises:
        BuildError: the file is missing or its SHA-256 is another one.
    """
    if not sdist.is_file():
        raise BuildError(f"{sdist}: no such file")
    digest = hashlib.sha256()
    with sdist.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise BuildError(
            f"{sdist}: wrong SHA-256 {digest.hexdigest()}, expected {SHA256}; delete the file and run again"
        )


def fetch(folder: Path, python: Path) -> Path:
    """Return the verified source distribution in ``folder``; pip downloads it where it is not there yet.

    pip follows the user's configuration: indexes, mirrors, certificates. ``--no-binary`` names this one
    package, because the tools that pip needs to read a source distribution may well come as wheels.
    """
    sdist = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if not sdist.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            requirement = f"{PACKAGE}=={VERSION}"
            pip = [str(python), "-I", "-m", "pip", "download", "--disable-pip-version-check"]
            try:
                run([*pip, "--no-deps", "--no-binary", PACKAGE, "--dest", fresh, requirement])
            except BuildError as error:
                raise BuildError(f"cannot download {requirement}: {error}; check the network and pip's index") from None
            downloaded = Path(fresh) / sdist.name
            verify(downloaded)
            os.replace(downloaded, sdist)
    verify(sdist)
    return sdist


def make_tree(sdist: Path, patches: PatchSet, tree: Path) -> None:
    """Unpack the source distribution into the new folder ``tree`` and apply all our changes.

    Raises:
        BuildError: a patch does not apply, a whole new file exists upstream, or git is missing.
    """
    if shutil.which("git") is None:
        raise BuildError("git not found on PATH; install it, the patches are applied with it")
    with tempfile.TemporaryDirectory(dir=tree.parent) as unpacked, tarfile.open(sdist) as archive:
        # The hash is pinned, so the content is trusted; the filter of newer Pythons only drops odd metadata.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(unpacked, filter="data")
        else:
            archive.extractall(unpacked)
        (top,) = Path(unpacked).iterdir()
        os.replace(top, tree)
    for path in patches.new_files():
        target = tree / LLAMA_CPP / path
        if target.exists():
            raise BuildError(f"files/{path}: llama.cpp already has this file; change it with a patch")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(patches.root / "files" / path, target)
    for name in patches.series():
        _apply(patches.patch(name), name, tree / PATCH_ROOTS[name.split("/")[0]])


def _apply(patch: Path, name: str, root: Path) -> None:
    command = ["git", "apply", "--whitespace=nowarn", str(patch.resolve())]
    env = outside_git(root)
    try:
        run([*command, "--check"], cwd=root, env=env)
        output = run([*command, "--verbose"], cwd=root, env=env)
    except BuildError as error:
        raise BuildError(f"patch {name} does not apply to {PACKAGE} {VERSION}: {error}") from None
    # git exits with 0 even where it skips a file because it takes the folder for part of another repository.
    if "Skipped patch" in output or "Applied patch" not in output:
        raise BuildError(f"patch {name} was skipped by git: {error_line(output)}")


def sync(fresh: Path, tree: Path) -> list[Path]:
    """Make ``tree`` equal to ``fresh`` and consume ``fresh``; return the changed files, relative, sorted.

    A file whose content is the same keeps its modification time, and a changed one gets the present time,
    so that Ninja rebuilds exactly what depends on a change.
    """
    wanted = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    present = {path.relative_to(tree) for path in tree.rglob("*") if path.is_file()}
    stale = present - wanted
    changed = {
        path for path in wanted if path not in present or not filecmp.cmp(fresh / path, tree / path, shallow=False)
    }
    for path in stale:
        (tree / path).unlink()
    for path in changed:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(fresh / path, tree / path)
        os.utime(tree / path)
    shutil.rmtree(fresh)
    return sorted(stale | changed)


def prepare(sdist: Path, patches: PatchSet, tree: Path) -> list[Path]:
    """Bring ``tree`` to the patched source; return the files that changed, none where it was up to date."""
    stamp = tree.with_name(tree.name + ".key")
    key = patches.key()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == key:
        return []
    fresh = tree.with_name(tree.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.parent.mkdir(parents=True, exist_ok=True)
    try:
        make_tree(sdist, patches, fresh)
        stamp.unlink(missing_ok=True)
        changed = sync(fresh, tree)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    stamp.write_text(key, encoding="utf-8")
    return changed


def check(sdist: Path, patches: PatchSet, scratch: Path) -> None:
    """Apply all our changes to a throw-away copy of the source, and keep nothing."""
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        make_tree(sdist, patches, Path(folder) / "src")
