"""C++ programs of this folder."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tritcore.errors import TritError


def compile_program(source: Path, target: Path, options: Sequence[str]) -> None:
    """Compile and link a program of one file, with $CXX or c++.

    Raises:
        TritError: no compiler, or an error of the compiler.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++17", str(source), "-o", str(target), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TritError(f"{compiler[0]}: no such compiler; install one, or name it in CXX") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no output")
        raise TritError(f"{source} cannot be built: {first}")
