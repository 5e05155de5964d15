"""Samples, and what follows from them: medians, ratios, verdicts.

A round measures every file once, so that a change of the machine's speed meets all of them. Ratios are taken
within a round, then their median over the rounds.
"""

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from tritrun.rounds import PHASES, Spread, spread

REDUCED = 0.9  # of a target is the bar on a CPU without AVX-512


@dataclass(frozen=True)
class Settings:
    """What the rounds of a run share. Where it differs, rounds cannot be put together.

    Attributes:
        programs: fingerprint of llama-bench's libraries.
        machine: as `programs.machine` has it.
    """

    model: str
    cpu: str
    prompt_tokens: int
    answer_tokens: int
    threads: int
    programs: str
    machine: dict[str, Any]


@dataclass
class Run:
    """The rounds of one model with one instruction set.

    Attributes:
        commit: of this repository, when the first round began.
        files: type -> its contestant's path-free facts: n_bytes, bytes_per_token, bits_per_weight, contents; or label
            of another engine -> n_bytes, command, the program's digest, and None as bits_per_weight.
        rounds: each with the time it began ("date"), the "bandwidth" of the memory in bytes per second, and its
            "speeds", in the order they were measured.
    """

    settings: Settings
    commit: str
    files: dict[str, dict[str, Any]]
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def speed(self, name: str, phase: str) -> Spread:
        """Tokens per second of a type."""
        return spread(one["speeds"][name][phase] for one in self.rounds)

    def bandwidth(self) -> Spread:
        """Bytes per second that threads read which do nothing else."""
        return spread(one["bandwidth"] for one in self.rounds)

    def read_rate(self, name: str) -> Spread | None:
        """Bytes of weights per second while tokens are decoded; None where it is not known what is read."""
        n_bytes = self.files[name].get("bytes_per_token")
        return None if n_bytes is None else spread(n_bytes * one["speeds"][name]["decode"] for one in self.rounds)

    def ratio(self, ours: str, peer: str, phase: str) -> Spread:
        """Of the speeds of two types."""
        return spread(one["speeds"][ours][phase] / one["speeds"][peer][phase] for one in self.rounds)

    def as_json(self) -> str:
        """All samples, with the medians of each type."""
        medians = {name: {phase: self.speed(name, phase).median for phase in PHASES} for name in self.files}
        return json.dumps(asdict(self) | {"medians": medians if self.rounds else {}}, indent=1) + "\n"


def read_rounds(path: Path, settings: Settings, files: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds in an earlier report that count for this run: same settings, and all of its files."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["settings"] != asdict(settings) or any(report["files"].get(name) != files[name] for name in files):
            return []
        return [one for one in report["rounds"] if files.keys() <= one["speeds"].keys() and one["bandwidth"] > 0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # none, or one of an older layout


@dataclass(frozen=True)
class Target:
    """A ratio of speeds that ought to be reached on the models named."""

    phase: str
    ours: str
    peer: str
    at_least: float
    models: tuple[str, ...] = ("llama-1b", "qwen2-0.5b")


TARGETS = (
    Target("decode", "TRIT2", "Q4_0", 1.10, models=("llama-1b",)),
    Target("decode", "TRIT3", "Q4_0", 0.85, models=("llama-1b",)),
    Target("decode", "TRIT1", "Q4_0", 1.4, models=("llama-1b",)),
    Target("decode", "TRIT2", "Q4_K", 1.6, models=("llama-1b",)),
    Target("decode", "TRIT2", "Q3_K", 1.30),
    Target("decode", "TRIT2", "IQ3_S", 2.0),
    Target("decode", "TRIT3", "Q5_K", 1.25),
    Target("decode", "TRIT4", "Q6_K", 0.95),
    Target("decode", "TRIT1", "TQ2_0", 0.90),
    Target("prompt", "TRIT2", "Q4_K", 1.2),
    Target("prompt", "TRIT2", "Q4_0", 1.1),
    Target("prompt", "TRIT2", "IQ4_XS", 1.1),
    Target("prompt", "TRIT3", "Q5_K", 0.95),
    Target("decode", "TRIT2", "Q3_K_M", 1.2, models=("qwen2-0.5b",)),
    Target("prompt", "TRIT2", "Q3_K_M", 1.2, models=("qwen2-0.5b",)),
)


class Verdict(Enum):
    """How a ratio compares with its target."""

    MET = "met"
    BAR_MET = "bar met"
    MISSED = "missed"
    NO_TARGET = "-"


def verdict(ratio: float, target: Target, model: str, avx512: bool) -> Verdict:
    """Judge a ratio: without AVX-512 the bar is REDUCED times the target."""
    if model not in target.models:
        return Verdict.NO_TARGET
    if ratio >= target.at_least:
        return Verdict.MET
    return Verdict.BAR_MET if not avx512 and ratio >= REDUCED * target.at_least else Verdict.MISSED
