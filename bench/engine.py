"""llama-bench of another engine, such as a fork of llama.cpp, to be measured in the same rounds as ours."""

import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tritcore.errors import TritError, first_line
from tritcore.files import sha256
from tritrun.bench import BenchRun, read_speeds


@dataclass(frozen=True)
class Engine:
    """A program, a model, and how to run it.

    Attributes:
        label: how reports call it.
        command: its llama-bench, with `-m MODEL` and whatever else the engine needs.
    """

    label: str
    command: tuple[str, ...]

    @property
    def model(self) -> Path:
        """The file that it runs."""
        return Path(self.command[self.command.index("-m") + 1])

    def facts(self) -> dict[str, object]:
        """What identifies it in a report. Raises TritError where a file cannot be read."""
        try:
            digest = sha256(Path(self.command[0]))
            n_bytes = self.model.stat().st_size
        except OSError as error:
            raise TritError(f"--engine {self.label}: {error.filename} cannot be read: {error.strerror}") from error
        return {"n_bytes": n_bytes, "bits_per_weight": None, "command": shlex.join(self.command), "program": digest}

    def measure(self, bench: BenchRun) -> dict[str, float]:
        """Tokens per second in each phase. Raises TritError if the program fails."""
        command = [*self.command, *bench.arguments()]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise TritError(f"--engine {self.label}: {lines[-1]}")
        try:
            prompt, answer = read_speeds(done.stdout)
        except ValueError as error:
            raise TritError(f"--engine {self.label}: unexpected output: {first_line(error)}") from error
        return {"decode": answer.mean, "prompt": prompt.mean}


def parse(text: str) -> Engine:
    """Read "LABEL=COMMAND", such as `fork IQ3_K=/opt/fork/bin/llama-bench -m IQ3_K.gguf -rtr 1`.

    Raises:
        ValueError: it is not of this form, or there is no such program.
    """
    label, separator, line = text.partition("=")
    words = shlex.split(line)
    if not separator or not label.strip() or "-m" not in words[1:-1]:
        raise ValueError("not of the form 'LABEL=LLAMA_BENCH -m MODEL ..'")
    program = shutil.which(words[0])
    if program is None:
        raise ValueError(f"{words[0]}: no such program")
    return Engine(label.strip(), (program, *words[1:]))
