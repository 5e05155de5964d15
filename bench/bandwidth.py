"""How fast the memory of this machine can be read, which bounds how fast a token can be computed."""

import os
import shlex
import statistics
import subprocess
from pathlib import Path

from programs import BUILD
from tritcore.errors import TritError
from tritrun.tools import run_tool

_SOURCE = Path(__file__).with_name("read_bandwidth.cpp")
_PASSES = 9
_BYTES = 1 << 30  # more than any cache holds


def build(target: Path = BUILD / "bench" / _SOURCE.stem) -> Path:
    """The program that measures it, for this very CPU. Raises TritError if it cannot be compiled."""
    if target.exists() and target.stat().st_mtime > _SOURCE.stat().st_mtime:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    command = [*compiler, "-std=c++17", "-O3", "-march=native", "-pthread", str(_SOURCE), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TritError(f"{compiler[0]}: no such compiler; install one, or name it in CXX") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no output")
        raise TritError(f"{_SOURCE} cannot be built: {first}")
    return target


def measure(program: Path, threads: int, n_bytes: int = _BYTES) -> float:
    """Bytes per second that so many threads read together: the median of several passes. Raises TritError."""
    lines: list[str] = []
    finished = run_tool(program.name, [str(threads), str(_PASSES), str(n_bytes)], lines.append, folder=program.parent)
    if finished.exit_code:
        raise TritError(f"{program}: {finished.reason}")
    return statistics.median(float(line) for line in lines)
