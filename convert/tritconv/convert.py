"""The conversion: a source, a plan, a file, a report."""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import tritconv
from tritconv.checkpoint import find_checkpoint
from tritconv.console import err, one_line
from tritconv.encode import n_bytes
from tritconv.errors import TritError
from tritconv.format import FORMAT_VERSION
from tritconv.gguf_source import open_gguf
from tritconv.hf import open_checkpoint
from tritconv.model_file import read_model_file
from tritconv.plan import SourceTensor, TypePlan
from tritconv.writer import Written, write

# How file names end that say their type: model-F16, model.Q4_K_M
_TYPE_SUFFIX = re.compile(r"[-.](F32|F16|BF16|TRIT[1-4]|T?I?Q\d\w*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """What the user asked for. `output` None stands for `<model>-TRIT<depth>.gguf` in the current folder."""

    plan: TypePlan
    output: Path | None = None
    force: bool = False
    threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def target(self, model: str) -> Path:
        """Where the file goes.

        Raises:
            TritError: there is a file already, and --force was not given.
        """
        target = self.output or Path(f"{model}-TRIT{self.plan.depth}.gguf")
        if target.is_dir():
            raise TritError(f"{target} is a folder: name a file with -o")
        if target.exists() and not self.force:
            raise TritError(f"{target} exists: give --force to replace it, or another name with -o")
        return target


def hf_to_gguf(source: str, revision: str | None, job: Job) -> Written:
    """Convert a checkpoint, a local folder or a hub id. Raises TritError."""
    model = source.rstrip("/").rpartition("/")[2]
    if model in ("", ".", ".."):
        model = Path(source).resolve().name
    target = job.target(model)
    folder = find_checkpoint(source, revision)
    from_hub = folder != Path(source).expanduser()  # a snapshot's folder is named after its commit
    with err.status("mapping the checkpoint") if err.is_terminal else nullcontext():
        checkpoint = open_checkpoint(folder, job.plan.depth, model if from_hub else None)
    return _write(checkpoint.header, checkpoint.tensors, source if from_hub else model, target, job)


def gguf_to_gguf(source: Path, job: Job) -> Written:
    """Convert a GGUF file. Raises TritError."""
    read_model_file(source)  # checks the header before anything trusts it
    target = job.target(_TYPE_SUFFIX.sub("", source.name.removesuffix(".gguf")))
    if target.exists() and target.samefile(source):
        raise TritError(f"{target} is the source itself: name another file with -o")
    header, tensors = open_gguf(source)
    return _write(header, tensors, source.name, target, job)


def _write(header: GGUFWriter, tensors: list[SourceTensor], source: str, target: Path, job: Job) -> Written:
    depth = job.plan.depth
    header.add_file_type(LlamaFileType[f"MOSTLY_TRIT{depth}"])
    header.add_quantization_version(GGML_QUANT_VERSION)
    header.add_uint32("trit.format_version", FORMAT_VERSION)
    header.add_uint32("trit.depth", depth)
    header.add_string("trit.method", "search")
    header.add_string("trit.codec", f"tritconv {tritconv.__version__}")
    header.add_string("trit.source", source)

    progress = Progress(
        TextColumn("{task.fields[tensor]}", style="dim"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    total = sum(n_bytes(tensor.shape, job.plan.type_of(tensor)) for tensor in tensors)
    with progress:
        # the bar counts bytes; the number of tensors stands in the text
        task = progress.add_task("", total=total, tensor="")
        done = 0

        def advance(name: str, count: int) -> None:
            nonlocal done
            done += 1
            progress.update(task, advance=count, tensor=f"{done}/{len(tensors)} {one_line(name)}")

        return write(header, tensors, job.plan, target, job.threads, advance)
