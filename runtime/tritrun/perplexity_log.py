"""Read what llama-perplexity prints with --log-jsonl."""

import math
import re
from dataclasses import dataclass

from tritrun.tool_log import read_record

_NUMBER = r"-?(?:\d+\.?\d*(?:e[+-]?\d+)?|nan|inf)"
_CHUNKS = re.compile(r"over (\d+) chunks")
_PERPLEXITY_CHUNK = re.compile(rf"\[(\d+)\]({_NUMBER}),")
_DIVERGENCE_CHUNK = re.compile(r" *(\d+)")
_FINAL = re.compile(rf"Final estimate: PPL = ({_NUMBER}) \+/- ({_NUMBER})")
_STATISTIC = re.compile(rf"\s*(\S.*?)\s*:\s+({_NUMBER})\s*%?(?:\s*±\s*({_NUMBER}))?")


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where the tool gives none."""

    value: float
    error: float | None = None


class PerplexityLog:
    """The log of one run, fed line by line.

    Attributes:
        chunks: chunks of text to come in all, 0 until the tool has said so.
        done: chunks done.
        running: perplexity so far, as printed; empty until there is one.
        first_error: the first error in the log: later ones only repeat that it failed.
    """

    def __init__(self) -> None:
        self.chunks = 0
        self.done = 0
        self.running = ""
        self.first_error = ""
        self._text = ""

    def feed(self, line: str) -> None:
        """Take one line of the tool's stdout; a line that is no log record is passed over."""
        record = read_record(line)
        if record is None:
            return
        message = record.message
        self._text += message
        if record.level == "error":
            self.first_error = self.first_error or message.strip()
        elif chunks := _CHUNKS.search(message):
            self.chunks = int(chunks[1])
        elif chunk := _PERPLEXITY_CHUNK.fullmatch(message):
            self.done, self.running = int(chunk[1]), chunk[2]
        elif chunk := _DIVERGENCE_CHUNK.fullmatch(message):
            self.done = int(chunk[1])

    def perplexity(self) -> Estimate | None:
        """The final estimate, None if the run did not get there."""
        final = _FINAL.search(self._text)
        return _estimate(final[1], final[2]) if final else None

    def statistics(self) -> dict[str, Estimate]:
        """The labelled lines of a --kl-divergence run: `Mean KLD`, `99.9% KLD`, `Same top p` (percent), .."""
        found = (_STATISTIC.match(line) for line in self._text.splitlines())
        return {" ".join(line[1].split()): _estimate(line[2], line[3]) for line in found if line}


def _estimate(value: str, error: str | None) -> Estimate:
    """An estimate as printed. An error that is no number says nothing: there were too few tokens for one."""
    spread = float(error) if error else math.nan
    return Estimate(float(value), spread if math.isfinite(spread) else None)
