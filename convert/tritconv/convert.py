"""The conversion: a source, a plan, a file, a report."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

import tritconv
from tritconv.allocate import FileSize, check
from tritconv.calibrate import CalibrationOptions, Origin, calibrate
from tritconv.encode import n_bytes
from tritconv.lattice import LatticeImport
from tritconv.methods import Quantizer
from tritconv.methods.search import Search
from tritconv.plan import Kind, SourceTensor, TypePlan, TypeRule
from tritconv.sources.checkpoint import find_checkpoint
from tritconv.sources.gguf import open_gguf
from tritconv.sources.mapped import open_checkpoint
from tritconv.workers import all_cores
from tritconv.writer import Written, header_bytes, write, write_outline
from tritcore import loads
from tritcore.console import byte_bar, err, one_line, quiet
from tritcore.errors import TritError
from tritcore.format import FORMAT_VERSION
from tritcore.gguf_header import name_of_model, read_model_file
from tritcore.output import Output, reserve

# How file names end that say their type: model-F16, model.Q4_K_M
_TYPE_SUFFIX = re.compile(r"[-.](F32|F16|BF16|TRIT[1-4]|T?I?Q\d\w*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Job:
    """What the user asked for. `output_path` None stands for `<model>-TRIT<depth>.gguf` in the current folder.

    `rules` are for single tensors, on top of `plan`. A `calibration` makes a quantizer of its own. `label` takes the
    place of the type in the name of the file.
    """

    plan: TypePlan
    output_path: Path | None = None
    force: bool = False
    threads: int = field(default_factory=all_cores)
    quantizer: Quantizer = field(default_factory=Search)
    rules: tuple[TypeRule, ...] = ()
    calibration: CalibrationOptions | None = None
    label: str | None = None

    def output(self, model: str) -> AbstractContextManager[Output]:
        """The file to write, for a model of that name. Entering raises TritError, as `reserve` has it."""
        return reserve(self.output_path or Path(f"{model}-{self.label or f'TRIT{self.plan.depth}'}.gguf"), self.force)


def hf_to_gguf(source: str, revision: str | None, job: Job, pre: str | None = None) -> Written:
    """Convert a checkpoint, a local folder or a hub id. `pre` as in `open_checkpoint`. Raises TritError."""
    model = source.rstrip("/").rpartition("/")[2]
    if model in ("", ".", ".."):
        model = Path(source).resolve().name
    with job.output(model) as output:
        folder = find_checkpoint(source, revision)
        from_hub = folder != Path(source).expanduser()  # a snapshot's folder is named after its commit

        def read() -> _Source:
            with err.status("mapping the checkpoint") if err.is_terminal else nullcontext():
                checkpoint = open_checkpoint(folder, job.plan.depth, model if from_hub else None, pre)
            if from_hub:
                checkpoint.header.add_string("trit.revision", folder.name)
            return checkpoint.header, checkpoint.tensors

        return _convert(read, Origin(folder), source if from_hub else model, output, job)


def gguf_to_gguf(source: Path, job: Job) -> Written:
    """Convert a GGUF file. Raises TritError."""
    read_model_file(source)  # checks the header before anything trusts it
    with job.output(_TYPE_SUFFIX.sub("", name_of_model(source))) as output:
        if output.target.exists() and output.target.samefile(source):
            raise TritError(f"{output.target} is the source itself: name another file with -o")
        return _convert(lambda: open_gguf(source), Origin(source.parent, source.name), source.name, output, job)


_Source = tuple[GGUFWriter, list[SourceTensor]]


def _convert(read: Callable[[], _Source], origin: Origin, name: str, output: Output, job: Job) -> Written:
    header, tensors = read()
    plan = job.plan.with_rules(job.rules, tensors)
    options = job.calibration
    if options is not None and isinstance(options.budget, FileSize):
        rest = header_bytes(header, tensors, plan) + sum(
            options.budget.size(tensor, plan.type_of(tensor)) for tensor in tensors if tensor.kind is not Kind.MATRIX
        )
        options = replace(options, budget=replace(options.budget, rest=rest))
    if options is not None and options.budget is not None:
        check(tensors, plan, options.budget)
    _check_outline(header, tensors, plan, name, output)
    if options is None:
        return _write(header, tensors, plan, LatticeImport(job.quantizer), name, output, job)
    calibration = calibrate(origin, header.arch, tensors, plan, options)
    with quiet():  # the first reading has said all
        header, tensors = read()  # tensors are loaded once, and the calibration has done that
    header.add_array("trit.calibration", calibration.description)
    if calibration.quantizer.exceptions:
        header.add_array("trit.method.exceptions", calibration.quantizer.exceptions)
    return _write(header, calibration.with_norms(tensors), calibration.plan, calibration.quantizer, name, output, job)


def _check_outline(
    header: GGUFWriter, tensors: Sequence[SourceTensor], plan: TypePlan, name: str, output: Output
) -> None:
    """See, before the work, that the disk holds the file to come and llama.cpp would load it. Raises TritError."""
    with err.status("asking llama.cpp") if err.is_terminal else nullcontext():
        output.check_space(write_outline(header, tensors, plan, output.partial))
        if (why := loads.refusal(output.partial)) is not None:
            raise TritError(f"{name}: llama.cpp would not load what comes of it: {why}")


def _write(
    header: GGUFWriter,
    tensors: list[SourceTensor],
    plan: TypePlan,
    quantizer: Quantizer,
    source: str,
    output: Output,
    job: Job,
) -> Written:
    depth = plan.depth
    header.add_file_type(LlamaFileType[f"MOSTLY_TRIT{depth}"])
    header.add_quantization_version(GGML_QUANT_VERSION)
    header.add_uint32("trit.format_version", FORMAT_VERSION)
    header.add_uint32("trit.depth", depth)
    header.add_string("trit.method", quantizer.name)
    header.add_uint32("trit.imported", 0)
    header.add_string("trit.codec", f"tritconv {tritconv.__version__}")
    header.add_string("trit.source", source)
    if exceptions := plan.exceptions(tensors):
        header.add_array("trit.plan", exceptions)

    total = sum(n_bytes(tensor.shape, plan.type_of(tensor)) for tensor in tensors)
    with byte_bar() as progress:
        # the bar counts bytes; the number of tensors stands in the text
        task = progress.add_task("", total=total)
        done = 0

        def advance(name: str, count: int) -> None:
            nonlocal done
            done += 1
            if isinstance(quantizer, LatticeImport):  # the header is written again at the end
                header.kv_data[0]["trit.imported"].value = quantizer.n_imported
            progress.update(task, advance=count, description=f"{done}/{len(tensors)} {one_line(name)}")

        return write(header, tensors, plan, output, job.threads, advance, quantizer)
