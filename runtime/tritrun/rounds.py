"""Speeds that can be compared: rounds that run llama-bench once on every file, so that a change of the machine's
speed meets all of them; medians and ranges over the rounds.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

PHASES = ("decode", "prompt")

Speeds = dict[str, dict[str, float]]  # name of a test -> phase -> tokens per second


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


def run_round(tests: Mapping[str, Callable[[], dict[str, float]]], number: int) -> Speeds:
    """Run every test once; the one that comes first changes with the number of the round.

    Args:
        tests: by name; each gives tokens per second of each phase.

    Raises:
        TritError: a test fails.
    """
    names = list(tests)
    turn = number % len(names)
    return {name: tests[name]() for name in [*names[turn:], *names[:turn]]}


def summarize(rounds: Iterable[Speeds], name: str) -> dict[str, Spread]:
    """Speed of one test in each phase."""
    rounds = list(rounds)
    return {phase: spread(speeds[name][phase] for speeds in rounds) for phase in PHASES}
