"""How fast the memory of this machine can be read, which bounds how fast a token can be computed."""

import statistics
from pathlib import Path

from cxx import compile_program
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
    compile_program(_SOURCE, target, ("-O3", "-march=native", "-pthread"))
    return target


def measure(program: Path, threads: int, n_bytes: int = _BYTES) -> float:
    """Bytes per second that so many threads read together: the median of several passes. Raises TritError."""
    lines: list[str] = []
    finished = run_tool(program.name, [str(threads), str(_PASSES), str(n_bytes)], lines.append, folder=program.parent)
    if finished.exit_code:
        raise TritError(f"{program}: {finished.reason}")
    return statistics.median(float(line) for line in lines)
