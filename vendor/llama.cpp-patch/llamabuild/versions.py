"""The versions of what is built: pyproject.toml has them, and everything else takes them from there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .shell import BuildError, outside_git, run

REPOSITORY = Path(__file__).resolve().parents[3]
DIRTY = "-dirty"


@dataclass(frozen=True)
class Versions:
    """The version of trit-gguf, and those of the two packages that it asks for."""

    trit_gguf: str
    llama_cpp_python: str
    gguf: str

    @property
    def label(self) -> str:
        """What the programs print as their commit: it changes with the versions only, so nothing is compiled again."""
        return f"trit-gguf-{self.trit_gguf}+llama-cpp-python-{self.llama_cpp_python}"


def read(project: Path = REPOSITORY / "pyproject.toml") -> Versions:
    """Return the versions that a pyproject.toml has. Python 3.10 cannot parse TOML.

    Raises:
        BuildError: it lacks one of them.
    """
    text = project.read_text(encoding="utf-8")

    def find(pattern: str) -> str:
        if (match := re.search(pattern, text, re.MULTILINE)) is None:
            raise BuildError(f"{project}: no line has {pattern}")
        return match[1]

    return Versions(find(r'^version = "([^"]+)"'), find(r'^ +"llama-cpp-python==([^"]+)"'), find(r'^ +"gguf==([^"]+)"'))


def stamp(file: Path, name: str, version: str) -> None:
    """Write a version, which is upstream's with a local part, in the place of upstream's: ``name = "0.19.0"``.

    Raises:
        BuildError: the file has no such line, or another version of upstream's.
    """
    text = file.read_text(encoding="utf-8")
    match = re.search(rf'^{name} = "([^"]+)"', text, re.MULTILINE)
    upstream = version.partition("+")[0]
    if match is None or match[1] != upstream:
        found = "none" if match is None else match[1]
        raise BuildError(f"pyproject.toml asks for {version}, but {name} in {file} is {found}; make them agree")
    file.write_text(text[: match.start(1)] + version + text[match.end(1) :], encoding="utf-8")


def commit(repository: Path = REPOSITORY) -> str:
    """Return the commit of a repository, with ``-dirty`` where files differ from it; "" where there is none."""
    describe = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return run(describe, env=outside_git(repository)).strip()
    except BuildError:
        return ""
