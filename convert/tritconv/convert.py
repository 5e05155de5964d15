"""The conversion, on one page: a source, a plan, a method, a file."""

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType

from tritconv.allocate import CANDIDATES, Budget, FileSize, Losses, allocate, cheapest_outside, check
from tritconv.encode import n_bytes
from tritconv.methods import Method, MethodName
from tritconv.methods.imatrix import Imatrix, Importances
from tritconv.methods.per_tensor import PerTensor
from tritconv.methods.search import Search
from tritconv.methods.uniform import Uniform
from tritconv.plan import Plan, TypeRule
from tritconv.sources.checkpoint import find_checkpoint
from tritconv.sources.gguf import open_gguf
from tritconv.sources.source import Source, Value
from tritconv.workers import Workers, all_cores
from tritconv.writer import Header, Written, file_bytes, file_sizes, write, write_outline
from tritcore import loads, sizes
from tritcore.console import byte_bar, err, note, one_line, status
from tritcore.errors import TritError, UsageError
from tritcore.format import FORMAT_VERSION
from tritcore.gguf_header import name_of_model, parts_of, read_model_file
from tritcore.gguf_types import TRIT_TYPE
from tritcore.output import Output, reserve
from tritcore.versions import version

if TYPE_CHECKING:
    from tritconv.calibration.context import CalibrationOptions, Context
    from tritconv.calibration.ranks import Ranks
    from tritconv.methods.tune import TuneOptions

_SHARE_OUTSIDE = 0.02  # of the loss of the layers, that embeddings and output matrix may cost unasked
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
        rules: for single tensors, on top of `plan`.
        method: None for the best one that the machine can afford.
        affordable: take as much of the text as the machine can afford, and not all of `calibration`.
        imatrix: importances from a file, for `MethodName.IMATRIX`; None: they are measured on the text.
        calibration: the text and how to use it, for methods that need one.
        training: of the layers, for `MethodName.TUNE`.
        budget: a size to reach by mixed depth; None leaves the types as planned.
        split_size: most bytes of a file: a larger model is split into parts; None for one file.
    """

    plan: Plan
    output_path: Path | None = None
    force: bool = False
    threads: int | None = None
    rules: tuple[TypeRule, ...] = ()
    method: MethodName | None = MethodName.SEARCH
    affordable: bool = False
    imatrix: Importances | None = None
    calibration: "CalibrationOptions | None" = None
    training: "TuneOptions | None" = None
    budget: Budget | None = None
    split_size: int | None = None

    @property
    def needs_text(self) -> bool:
        """Whether the method calibrates on a text."""
        is_measured = self.method is MethodName.IMATRIX and self.imatrix is None
        return is_measured or self.method in (MethodName.GPTQ, MethodName.TUNE)

    def output(self, model: str, ranks: "Ranks | None" = None) -> AbstractContextManager[Output | None]:
        """The file to write, for a model of that name; None for a process that only helps the first one.

        Entering raises TritError, as `reserve` has it.
        """
        if ranks is not None and not ranks.is_first:
            return nullcontext()
        label = self.budget.label if self.budget is not None else f"TRIT{self.plan.depth}"
        return reserve(self.output_path or Path(f"{model}-{label}.gguf"), self.force, self.split_size is not None)


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
        with status("mapping the checkpoint"):
            from tritconv.sources.mapped import open_checkpoint  # takes seconds to load

            _use_threads(job)
            checkpoint = open_checkpoint(folder, name=model if from_hub else None, pre=pre)
        name, commit = (source, folder.name) if from_hub else (model, None)
        return _convert(replace(checkpoint, name=name, revision=commit), output, job, ranks)


def gguf_to_gguf(source: Path, job: Job) -> Written | None:
    """Convert a GGUF file. Returns and raises as `hf_to_gguf`."""
    parts = parts_of(read_model_file(source))  # checks the headers before anything trusts them
    with _joined(job) as ranks, job.output(_TYPE_SUFFIX.sub("", name_of_model(source)), ranks) as output:
        if output is not None and any(output.may_replace(part.path) for part in parts):
            raise TritError(f"{output.target} is the source itself: name another file with -o")
        return _convert(open_gguf(source), output, job, ranks)


def _joined(job: Job) -> "AbstractContextManager[Ranks | None]":
    """This process and those that torchrun has started beside it; None where it is alone. Raises UsageError."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    if job.method is not MethodName.GPTQ:
        raise UsageError("several processes can only share gptq: add --method gptq, or leave out torchrun")
    from tritconv.calibration.ranks import joined

    return joined()


def _convert(source: Source, output: Output | None, job: Job, ranks: "Ranks | None" = None) -> Written | None:
    start = time.monotonic()
    plan = job.plan.with_rules(job.rules, source.tensors)
    budget = None if job.budget is None else _checked(job.budget, source, plan)
    if output is None:
        _assist(source, plan, budget, job, ranks)
        return None
    _check_outline(source, plan, output, job.split_size)
    with Workers(job.threads or all_cores()) as workers, _Bar() as bar:
        plan, method, description = _started(source, plan, budget, job, ranks, bar)
        metadata = {**source.metadata, **_own_metadata(source, plan, method, description)}
        header = Header(source.architecture, metadata, source.tensors, method.methods)
        bar.start(source, plan)
        stored = write(header, plan, method.run(source, plan, workers), output, workers, bar.advance, job.split_size)
    found = {path: path.stat().st_size for path in output.published}
    remarks = [*method.remarks(), *_too_large(found, job.split_size)]
    return Written(output.published, sum(found.values()), time.monotonic() - start, stored, remarks)


def _too_large(found: Mapping[Path, int], most: int | None) -> Iterable[str]:
    """Remarks on files that became larger than planned."""
    for path, size in found.items():
        if most is not None and size > most:
            yield f"{path.name} has {sizes.show(size)}, more than --split-max-size: a type in it is not the planned one"


def _started(
    source: Source, plan: Plan, budget: Budget | None, job: Job, ranks: "Ranks | None", bar: "_Bar"
) -> tuple[Plan, Method, Sequence[str]]:
    """The plan with all that the values say, the method, and a description of the calibration, if there is one."""
    is_free = job.method is None
    if is_free or not job.needs_text:
        with status("looking for lattices of trits"):
            plan = plan.with_lattices(source.tensors)
    if is_free and plan.lattices and budget is None:
        note("the weights lie on a lattice of trits: the codes are kept, without calibration")
        job = replace(job, method=MethodName.SEARCH)
    elif job.affordable:
        job = _affordable(source, plan, job)
    if job.needs_text:
        try:
            context, plan = _context(source, plan, budget, job, ranks)
        except TritError as error:
            if not is_free or budget is not None:
                raise
            note(f"{error}. So it goes without calibration")
            job = replace(job, method=MethodName.SEARCH)
        else:
            return plan, _calibrated(context, job, bar), context.description
    return plan, _per_tensor(job), ()


def _affordable(source: Source, plan: Plan, job: Job) -> Job:
    """The job with the best method, or the most text, that the machine can afford. Says why it is no better one."""
    from tritconv import effort

    assert job.calibration is not None
    text = job.calibration.text
    calibrates, threads = job.budget is not None, job.threads or all_cores()
    found, better = effort.affordable(
        source, plan, text.length, text.n_tokens, threads, calibrates=calibrates, method=job.method
    )
    for other in better[:1]:
        note(f"not by {other}: --method {other.method.value} --calib-tokens {other.n_tokens} takes that time")
    text = replace(text, n_tokens=found.n_tokens)
    return replace(job, method=found.method, calibration=replace(job.calibration, text=text))


def _predicted(source: Source, plan: Plan, job: Job) -> object:
    """What the method asked for takes, as text."""
    from tritconv import effort

    assert job.method is not None
    assert job.calibration is not None
    n_tokens = job.calibration.n_tokens
    return effort.predicted(source, plan, job.method, n_tokens, job.threads or all_cores())


def _calibrated(context: "Context", job: Job, bar: "_Bar") -> Method:
    """The method of a job that needs a text."""
    from tritconv.calibration.importance import TextImportances  # takes seconds to load, as the others do
    from tritconv.methods.gptq import Gptq
    from tritconv.methods.tune import Tune

    if job.method is MethodName.GPTQ:
        return Gptq(context, bar.say)
    if job.method is MethodName.TUNE:
        assert job.training is not None
        return Tune(context, job.training, bar.say)
    return PerTensor(Imatrix(TextImportances(context, bar.say)))


def _per_tensor(job: Job) -> Method:
    """The method of a job that needs no text."""
    if job.method is MethodName.UNIFORM:
        return PerTensor(Uniform())
    if job.imatrix is not None:
        return PerTensor(Imatrix(job.imatrix))
    return PerTensor(Search())


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
    if context.ranks.is_first and job.method is not MethodName.TUNE:
        note(str(_predicted(source, plan, job)))
    if budget is not None:
        allocation = allocate(source.tensors, _losses(context, CANDIDATES, of_all=True), plan, budget)
        if context.ranks.is_first:
            err.print(allocation.table())
        plan = plan.with_types(allocation.types).with_most_frequent_depth(source.tensors)
    elif job.method is not MethodName.IMATRIX and _leaves_outside(plan, source, context):
        losses = _losses(context, [TRIT_TYPE[plan.depth]], of_all=False)
        chosen = cheapest_outside(source.tensors, losses, plan, _SHARE_OUTSIDE)
        if context.ranks.is_first:
            note(", ".join(f"{name} in {qtype.name}" for name, qtype in chosen.items()) + ", as that costs little")
        plan = plan.with_types(chosen)
    return context, plan


def _leaves_outside(plan: Plan, source: Source, context: "Context") -> bool:
    """Whether the types of what lies outside the layers are to be chosen."""
    return any(plan.is_free(tensor) for tensor in source.tensors if tensor.name in context.outside)


def _losses(context: "Context", types: Sequence[GGMLQuantizationType], *, of_all: bool) -> Losses:
    """The predicted losses of the tensors that are reached. Args: as `sensitivities` has them."""
    from tritconv.methods.gptq.sensitivity import sensitivities

    with status("what each type costs") as say:
        return sensitivities(context, types, say, of_all=of_all)


def _use_threads(job: Job) -> None:
    """Let torch compute with the threads asked for."""
    import torch

    if job.threads is not None:
        torch.set_num_threads(job.threads)


def _checked(budget: Budget, source: Source, plan: Plan) -> Budget:
    """The budget, for a file with all that the source has. Raises UsageError where it cannot be met."""
    if isinstance(budget, FileSize):
        matrices = [tensor for tensor in source.tensors if tensor.kept_type is None]
        # the longest list of types that there can be
        longest = plan.with_types({tensor.name: GGMLQuantizationType.Q8_0 for tensor in matrices})
        header = Header(source.architecture, {**source.metadata, **_list_of_types(source, longest)}, source.tensors, ())
        rest = file_bytes(header, plan) - sum(budget.size(tensor, plan.type_of(tensor)) for tensor in matrices)
        budget = replace(budget, rest=rest)
    check(source.tensors, plan, budget)
    return budget


def _check_outline(source: Source, plan: Plan, output: Output, split_size: int | None) -> None:
    """See, before the work, that the disk holds the file to come and llama.cpp would load it. Raises TritError."""
    with status("asking llama.cpp"):
        metadata = {**source.metadata, **_own_metadata(source, plan, None, ())}
        header = Header(source.architecture, metadata, source.tensors, ())
        size = write_outline(header, plan, output.partial)
        if split_size is not None:
            size = _checked_parts(header, plan, split_size)
        if size >= _LARGE:
            note(f"needs {sizes.show(size)} on disk for {output.target}")
        output.check_space(size)
        why = loads.refusal(output.partial)
    if why is not None:
        raise TritError(f"{source.name}: llama.cpp would not load what comes of it: {why}")


def _checked_parts(header: Header, plan: Plan, most: int) -> int:
    """The bytes of all parts together. Raises UsageError where a part would be too large."""
    files = header.files(plan, most)
    part_sizes = file_sizes(header, plan, files)
    for file, size in zip(files, part_sizes, strict=True):
        if size > most:
            what = f"tensor '{header.tensors[file[0]].name}' takes" if file else "the metadata take"
            raise UsageError(
                f"--split-max-size {sizes.show(most)} is too small: {what} {sizes.show(size)}, which one file must hold"
            )
    return sum(part_sizes)


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
        "trit.codec": text(f"tritconv {version('trit-gguf')}"),
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
