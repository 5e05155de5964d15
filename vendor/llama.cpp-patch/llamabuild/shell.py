"""Running other programs, and the one kind of error that the build reports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class BuildError(Exception):
    """A failure that the user can mend; its text is one line that says what, where and how."""


def run(command: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its stdout and stderr together.

    Raises:
        BuildError: the program is missing, or it exits with another status than 0.
    """
    program = Path(command[0]).name
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise BuildError(f"{program}: no such program ({command[0]})") from None
    if done.returncode != 0:
        raise BuildError(f"{program} failed with status {done.returncode}: {error_line(done.stdout)}")
    return done.stdout


def error_line(output: str) -> str:
    """Return the first line of a program's output that names an error, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line, following in zip(lines, [*lines[1:], ""], strict=False):
        if re.search(r"\berror\b", line, re.IGNORECASE):
            return f"{line} {following}" if line.endswith(":") else line
    return lines[-1] if lines else "no output"


def find_tool(name: str, python: Path, mend: str) -> Path:
    """Return the path of a program: beside the given interpreter first, then on PATH.

    Raises:
        BuildError: there is none; ``mend`` says how to get it.
    """
    beside = shutil.which(name, path=str(python.parent))
    found = beside or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} not found beside {python} or on PATH; {mend}")
    return Path(found)


def first_on_path(folder: Path) -> str:
    """Return the PATH with a folder before all others."""
    return f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


def outside_git(root: Path) -> dict[str, str]:
    """Return an environment in which git takes ``root`` for a plain folder.

    The build folder lies inside our own repository. Without this ``git apply`` silently skips every patch
    there, and llama.cpp's CMake stamps our commit into its binaries.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(root.resolve().parent)
    env["LC_ALL"] = "C"
    return env
