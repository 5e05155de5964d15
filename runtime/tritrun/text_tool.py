"""Run those of llama.cpp's programs that go through a text chunk by chunk, with a progress bar."""

import math
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tritcore.console import err, one_line
from tritcore.errors import TritError
from tritrun.perplexity_log import PerplexityLog
from tritrun.tools import run_tool

OnStart = Callable[[int], None]


def ignore_start(chunks: int) -> None:
    """What `run_over_text` does at the start unless told otherwise: nothing."""


def not_finite(name: str) -> TritError:
    """The error for a model whose predictions are no numbers."""
    return TritError(
        f"{name}: its predictions of this text are not finite: the model is damaged, or its values overflow; "
        "`tritconv verify` looks into the file"
    )


def run_over_text(tool: str, arguments: list[str], title: str, on_start: OnStart = ignore_start) -> PerplexityLog:
    """Run llama-perplexity or llama-imatrix to its end.

    Args:
        arguments: of the program.
        title: of the progress bar.
        on_start: is given the number of chunks when the program knows it; an exception ends the program.

    Raises:
        TritError: the program is not there, or it fails.
    """
    log = PerplexityLog()
    with _progress() as progress:
        task = progress.add_task(one_line(title), total=None, running="")

        def on_line(line: str) -> None:
            started = log.chunks > 0
            log.feed(line)
            if log.chunks and not started:
                on_start(log.chunks)
            if not math.isfinite(float(log.running or 0)):  # nor will it be after more chunks
                raise not_finite(title)
            running = f"PPL {log.running}" if log.running else ""
            progress.update(task, completed=log.done, total=log.chunks or None, running=running)

        finished = run_tool(tool, [*arguments, "--log-jsonl"], on_line)
    if finished.exit_code:
        raise TritError(f"{tool}: {title}: {log.first_error or finished.reason}")
    return log


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[running]}", markup=False),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
