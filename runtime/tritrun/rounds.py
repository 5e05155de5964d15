"""Speeds that can be compared: rounds that run llama-bench once on every file, so that a change of the machine's
speed meets all of them; medians and ranges over the rounds.
"""

import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tritcore.gguf_header import ModelFile
from tritrun.bench import BenchRun

PHASES = ("decode", "prompt")

Speeds = dict[str, dict[str, float]]  # name of a file -> phase -> tokens per second


class Spread(NamedTuple):
    """Median and range of several figures."""

    median: float
    low: float
    high: float

    def format(self, digits: int) -> str:
        """As in "38.3 (37.0 - 38.9)"."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} - {self.high:.{digits}f})"


def spread(figures: Iterable[float]) -> Spread:
    """Median and range; there must be at least one figure."""
    figures = list(figures)
    return Spread(statistics.median(figures), min(figures), max(figures))


def run_round(bench: BenchRun, files: Mapping[str, ModelFile], number: int) -> Speeds:
    """Measure every file once; the file that comes first changes with the number of the round.

    Raises:
        TritError: llama-bench fails.
    """
    names = list(files)
    turn = number % len(names)
    speeds: Speeds = {}
    for name in [*names[turn:], *names[:turn]]:
        result = bench.measure(files[name])
        speeds[name] = {"decode": result.answer.mean, "prompt": result.prompt.mean}
    return speeds


def summarize(rounds: Iterable[Speeds], name: str) -> dict[str, Spread]:
    """Speed of one file in each phase."""
    rounds = list(rounds)
    return {phase: spread(speeds[name][phase] for speeds in rounds) for phase in PHASES}
