"""The conversion, on one page: a source, a plan, a method, a file."""

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_VERSION, GGUFValueType, LlamaFileType

import tritconv
from tritconv.allocate import Budget, FileSize, allocate, check
from tritconv.encode import n_bytes
from tritconv.methods import Method, Quantizer
from tritconv.methods.per_tensor import PerTensor
from tritconv.methods.search import Search
from tritconv.plan import Plan, TypeRule
from tritconv.sources.checkpoint import find_checkpoint
from tritconv.sources.gguf import open_gguf
from tritconv.sources.source import Kind, Source, Value
from tritconv.workers import Workers, all_cores
from tritconv.writer import Header, Written, file_bytes, write, write_outline
from tritcore import loads, sizes
from tritcore.console import byte_bar, err, note, one_line
from tritcore.errors import TritError, UsageError
from tritcore.format import FORMAT_VERSION
from tritcore.gguf_header import name_of_model, read_model_file
from tritcore.gguf_types import TRIT_TYPE
from tritcore.output import Output, reserve

if TYPE_CHECKING:
    from tritconv.calibration.context import CalibrationOptions, Context
    from tritconv.calibration.ranks import Ranks
    from tritconv.methods.tune import TuneOptions

_LARGE = 10**9  # bytes of a file whose size is worth a line before the work

# How file names end that say their type: model-F16, model.Q4_K_M
_TYPE_SUFFIX = re.compile(r"[-.](F32|F16|BF16|TRIT[1-4]|T?I?Q\d\w*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """What the user asked for.

    Attributes:
        plan: types by kind of tensor.
        output_path: None stands for `<model>-TRIT<depth>.gguf` in the current folder.
        threads: to compute with; None stands for all cores, or for as many as torch chooses.
        quantizer: makes blocks, where nothing is calibrated.
        rules: for single tensors, on top of `plan`.
        calibration: the text and how to use it; gptq then makes the blocks.
        training: of the layers after gptq; None leaves it at that.
        budget: a size to reach by mixed depth; None leaves the types as planned.
    """

    plan: Plan
    output_path: Path | None = None
    force: bool = False
    threads: int | None = None
    quantizer: Quantizer = field(default_factory=Search)
    rules: tuple[TypeRule, ...] = ()
    calibration: "CalibrationOptions | None" = None
    training: "TuneOptions | None" = None
    budget: Budget | None = None

    def output(self, model: str, ranks: "Ranks | None" = None) -> AbstractContextManager[Output | None]:
        """The file to write, for a model of that name; None for a process that only helps the first one.

        Entering raises TritError, as `reserve` has it.
        """
        if ranks is not None and not ranks.is_first:
            return nullcontext()
        label = self.budget.label if self.budget is not None else f"TRIT{self.plan.depth}"
        return reserve(self.output_path or Path(f"{model}-{label}.gguf"), self.force)


def hf_to_gguf(source: str, revision: str | None, job: Job, pre: str | None = None) -> Written | None:
    """Convert a checkpoint, a local folder or a hub id. `pre` as in `open_checkpoint`.

    Returns:
        The file; None in a process that has only helped the first one.

    Raises:
        TritError: it cannot be converted.
    """
    model = source.rstrip("/").rpartition("/")[2]
    if model in ("", ".", ".."):
        model = Path(source).resolve().name
    with _joined(job) as ranks, job.output(model, ranks) as output:
        folder = find_checkpoint(source, revision)
        from_hub = folder != Path(source).expanduser()  # a snapshot's folder is named after its commit
        with _status("mapping the checkpoint"):
            from tritconv.sources.mapped import open_checkpoint  # takes seconds to load

            _use_threads(job)
            checkpoint = open_checkpoint(folder, name=model if from_hub else None, pre=pre)
        name, commit = (source, folder.name) if from_hub else (model, None)
        return _convert(replace(checkpoint, name=name, revision=commit), output, job, ranks)


def gguf_to_gguf(source: Path, job: Job) -> Written | None:
    """Convert a GGUF file. Returns and raises as `hf_to_gguf`."""
    read_model_file(source)  # checks the header before anything trusts it
    with _joined(job) as ranks, job.output(_TYPE_SUFFIX.sub("", name_of_model(source)), ranks) as output:
        if output is not None and output.target.exists() and output.target.samefile(source):
            raise TritError(f"{output.target} is the source itself: name another file with -o")
        return _convert(open_gguf(source), output, job, ranks)


def _joined(job: Job) -> "AbstractContextManager[Ranks | None]":
    """This process and those that torchrun has started beside it; None where it is alone. Raises UsageError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    if job.calibration is None:
        raise UsageError("several processes can only share a calibration: add --calibrate FILE, or leave out torchrun")
    if job.training is not None:
        raise UsageError("--method tune trains in one process: leave out torchrun, or take --method gptq")
    from tritconv.calibration.ranks import joined

    return joined()


def _convert(source: Source, output: Output | None, job: Job, ranks: "Ranks | None" = None) -> Written | None:
    start = time.monotonic()
    plan = job.plan.with_rules(job.rules, source.tensors)
    budget = None if job.budget is None else _checked(job.budget, source, plan)
    if output is None:
        _assist(source, plan, budget, job, ranks)
        return None
    _check_outline(source, plan, output)
    with Workers(job.threads or all_cores()) as workers, _Bar() as bar:
        description: Sequence[str] = ()
        if job.calibration is None:
            with _status("looking for lattices of trits"):
                plan = plan.with_lattices(source.tensors)
            method: Method = PerTensor(job.quantizer)
        else:
            plan, method, description = _calibrated(source, plan, budget, job, ranks, bar)
        metadata = {**source.metadata, **_own_metadata(source, plan, method, description)}
        header = Header(source.architecture, metadata, source.tensors, method.methods)
        bar.start(source, plan)
        stored = write(header, plan, method.run(source, plan, workers), output, workers, bar.advance)
    size = output.target.stat().st_size
    return Written(output.target, size, time.monotonic() - start, stored, method.remarks())


def _calibrated(
    source: Source, plan: Plan, budget: Budget | None, job: Job, ranks: "Ranks | None", bar: "_Bar"
) -> tuple[Plan, Method, Sequence[str]]:
    """The plan with types for the size wanted, the method, and a description of the calibration."""
    from tritconv.methods.gptq import Gptq  # takes seconds to load
    from tritconv.methods.tune import Tune

    context, plan = _context(source, plan, budget, job, ranks)
    if job.training is None:
        return plan, Gptq(context, bar.say), context.description
    return plan, Tune(context, job.training, bar.say), context.description


def _assist(source: Source, plan: Plan, budget: Budget | None, job: Job, ranks: "Ranks | None") -> None:
    """Help the first process with its calibration. Raises TritError."""
    from tritconv.methods.gptq import Gptq

    context, plan = _context(source, plan, budget, job, ranks)
    Gptq(context, lambda what: None).assist(plan)


def _context(
    source: Source, plan: Plan, budget: Budget | None, job: Job, ranks: "Ranks | None"
) -> tuple["Context", Plan]:
    """The start of a calibration, and the plan with types for the size wanted."""
    from tritconv.calibration import context as calibration
    from tritconv.calibration.ranks import ALONE

    assert job.calibration is not None
    _use_threads(job)
    context = calibration.prepare(source, plan, job.calibration, ranks or ALONE)
    if budget is not None:
        losses = calibration.sensitivities(context)
        allocation = allocate(source.tensors, losses, plan, budget)
        if context.ranks.is_first:
            err.print(allocation.table())
        plan = plan.with_types(allocation.types, source.tensors)
    return context, plan


def _use_threads(job: Job) -> None:
    """Let torch compute with the threads asked for."""
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)


def _checked(budget: Budget, source: Source, plan: Plan) -> Budget:
    """The budget, for a file with all that the source has. Raises UsageError where it cannot be met."""
    if isinstance(budget, FileSize):
        matrices = [tensor for tensor in source.tensors if tensor.kind is Kind.MATRIX]
        # the longest list of types that there can be
        longest = plan.with_types({tensor.name: TRIT_TYPE[4] for tensor in matrices}, ())
        header = Header(source.architecture, {**source.metadata, **_list_of_types(source, longest)}, source.tensors, ())
        rest = file_bytes(header, plan) - sum(budget.size(tensor, plan.type_of(tensor)) for tensor in matrices)
        budget = replace(budget, rest=rest)
    check(source.tensors, plan, budget)
    return budget


def _check_outline(source: Source, plan: Plan, output: Output) -> None:
    """See, before the work, that the disk holds the file to come and llama.cpp would load it. Raises TritError."""
    with _status("asking llama.cpp"):
        metadata = {**source.metadata, **_own_metadata(source, plan, None, ())}
        size = write_outline(Header(source.architecture, metadata, source.tensors, ()), plan, output.partial)
        if size >= _LARGE:
            note(f"needs {sizes.show(size)} on disk for {output.target}")
        output.check_space(size)
        why = loads.refusal(output.partial)
    if why is not None:
        raise TritError(f"{source.name}: llama.cpp would not load what comes of it: {why}")


def _own_metadata(source: Source, plan: Plan, method: Method | None, description: Sequence[str]) -> dict[str, Value]:
    """What tritconv says of a file, besides what the writer does. `method` is None for an outline."""

    def number(value: int) -> Value:
        return Value(value, GGUFValueType.UINT32)

    def text(value: str) -> Value:
        return Value(value, GGUFValueType.STRING)

    own = {
        "general.file_type": number(LlamaFileType[f"MOSTLY_TRIT{plan.depth}"]),
        "general.quantization_version": number(GGML_QUANT_VERSION),
        "trit.format_version": number(FORMAT_VERSION),
        "trit.depth": number(plan.depth),
        "trit.method": text("" if method is None else method.name),
        "trit.codec": text(f"tritconv {tritconv.__version__}"),
        "trit.source": text(source.name),
        **_list_of_types(source, plan),
    }
    if source.revision is not None:
        own["trit.revision"] = text(source.revision)
    if description:
        own["trit.calibration"] = _texts(description)
    return own


def _list_of_types(source: Source, plan: Plan) -> dict[str, Value]:
    exceptions = plan.exceptions(source.tensors)
    return {"trit.plan": _texts(exceptions)} if exceptions else {}


def _texts(values: Iterable[str]) -> Value:
    return Value(list(values), GGUFValueType.ARRAY, GGUFValueType.STRING)


def _status(what: str) -> AbstractContextManager[object]:
    """Shows what is done, on a terminal."""
    return err.status(what) if err.is_terminal else nullcontext()


class _Bar:
    """Progress in bytes of the file, on a terminal, with a text that says what is done."""

    def __init__(self) -> None:
        self._progress = byte_bar()
        self._task = self._progress.add_task("", total=None)
        self._done = self._count = 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def start(self, source: Source, plan: Plan) -> None:
        """Show it, for the tensors of a source."""
        self._count = len(source.tensors)
        self._progress.update(self._task, total=sum(n_bytes(t.shape, plan.type_of(t)) for t in source.tensors))
        self._progress.start()

    def say(self, what: str) -> None:
        """Show what is done now."""
        self._progress.update(self._task, description=one_line(what))

    def advance(self, name: str, n_bytes: int) -> None:
        """A tensor is written."""
        self._done += 1
        self._progress.update(self._task, advance=n_bytes)
        self.say(f"{self._done}/{self._count} {name}")
