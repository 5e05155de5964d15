"""`tritrun bench`: run llama-bench on each model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table

from tritcore.console import err, one_line
from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile
from tritcore.loads import refusal
from tritrun import variants
from tritrun.servers import explain_loss
from tritrun.tools import run_tool

_TOOL = "llama-bench"
_NOT_LOADED = "failed to load model"


@dataclass(frozen=True)
class Speed:
    """Tokens per second: mean and standard deviation over the repetitions."""

    mean: float
    spread: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.spread:.1f}"


@dataclass(frozen=True)
class Benchmark:
    """Speed of reading a prompt and of writing an answer."""

    model: ModelFile
    prompt: Speed
    answer: Speed

    @property
    def by_phase(self) -> dict[str, float]:
        """Mean tokens per second of writing an answer ("decode") and of reading a prompt ("prompt")."""
        return {"decode": self.answer.mean, "prompt": self.prompt.mean}


@dataclass(frozen=True)
class BenchRun:
    """Settings that all models share: tokens per test, repetitions of each, CPU threads.

    Attributes:
        cpu_only: leave GPUs alone, where llama-bench knows some.
        servers: addresses of RPC servers that hold layers.
    """

    prompt_tokens: int
    answer_tokens: int
    repetitions: int
    threads: int
    cpu_only: bool = False
    servers: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The options of llama-bench that say so; those of forks are the same."""
        return [
            *("-o", "json", "-p", str(self.prompt_tokens), "-n", str(self.answer_tokens)),
            *("-r", str(self.repetitions), "-t", str(self.threads)),
        ]

    def measure(self, model: ModelFile, gpu_layers: int | None = None) -> Benchmark:
        """Run llama-bench on `model`.

        Args:
            gpu_layers: layers to keep on GPUs and servers; None leaves that to llama-bench.

        Raises:
            TritError: the tool fails, or a server is lost.
        """
        arguments = ["-m", str(model.path), *self.arguments(), "--progress"]
        if self.cpu_only:
            arguments += ["-dev", "none", "-ngl", "0"]
        if self.servers:
            arguments += ["--rpc", ",".join(self.servers)]
        if gpu_layers is not None:
            arguments += ["-ngl", str(gpu_layers)]
        output: list[str] = []
        name = escape(one_line(model.path.name))
        with err.status(name) as status:

            def on_stderr(line: str) -> None:
                _, is_progress, step = line.partition(": benchmark ")
                if is_progress:
                    status.update(f"{name}: {escape(one_line(step))}")

            finished = run_tool(_TOOL, arguments, output.append, on_stderr)
        if finished.exit_code:
            if loss := explain_loss(finished.reason, self.servers):
                raise TritError(loss)
            # The program swallows llama.cpp's own reason for not loading a file.
            reason = refusal(model.path) if _NOT_LOADED in finished.reason else None
            raise TritError(f"{model.path}: {_TOOL}: {reason or finished.reason}")
        try:
            return Benchmark(model, *read_speeds("".join(output)))
        except ValueError as error:
            raise TritError(f"{model.path}: {_TOOL} printed something unexpected: {error}") from error

    def speeds(self, model: ModelFile) -> dict[str, float]:
        """Tokens per second in each phase. Raises TritError as `measure`."""
        return self.measure(model).by_phase

    def as_table(self, benchmarks: Iterable[Benchmark]) -> Table:
        """All models in one table."""
        table = Table(
            caption=f"prompt of {self.prompt_tokens} tokens, answer of {self.answer_tokens}, "
            f"{self.repetitions} runs, {self.threads} threads, {variants.in_use()}{self._where()}"
        )
        table.add_column("model", overflow="fold")
        for heading in ("type", "size", "bpw", "prompt t/s", "answer t/s"):
            table.add_column(heading, justify="right")
        for benchmark in benchmarks:
            model = benchmark.model
            table.add_row(
                escape(one_line(model.path.name)),
                model.main_type,
                human_size(model.size),
                f"{model.bits_per_weight:.2f}",
                str(benchmark.prompt),
                str(benchmark.answer),
            )
        return table

    def _where(self) -> str:
        return f", with {', '.join(self.servers)}" if self.servers else ""


def read_speeds(output: str) -> tuple[Speed, Speed]:
    """The speeds of the prompt and of the answer in llama-bench's JSON, which has a test of either.

    Raises:
        ValueError: it is something else.
    """
    try:
        speeds = {
            test["n_gen"] > 0: Speed(float(test["avg_ts"]), float(test["stddev_ts"])) for test in json.loads(output)
        }
        return speeds[False], speeds[True]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(repr(error)) from error
