"""The `tritconv` command line."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from gguf import GGMLQuantizationType

from tritconv import extra
from tritconv.methods import MethodName
from tritconv.plan import Plan, TypeRule
from tritconv.sources.source import Kind
from tritconv.workers import all_cores, is_first_process
from tritcore import cache, sizes
from tritcore.commands import examples, new_app, with_options
from tritcore.console import note, out, warning
from tritcore.errors import UsageError
from tritcore.format import DEPTHS
from tritcore.gguf_types import DEPTH_OF_TYPE, TRIT_TYPE
from tritcore.reference import find_model
from tritcore.versions import versions

if TYPE_CHECKING:
    from tritconv.allocate import Budget
    from tritconv.calibration.context import CalibrationOptions
    from tritconv.convert import Job
    from tritconv.methods.imatrix import Importances
    from tritconv.methods.tune import TuneOptions

app = new_app("tritconv", "Convert language models to GGUF files with balanced-ternary weights.", versions)


class StorageType(str, Enum):
    """The types for tensors outside the layers, and for those that a TRIT type cannot hold."""

    TRIT1 = "trit1"
    TRIT2 = "trit2"
    TRIT3 = "trit3"
    TRIT4 = "trit4"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q5_0 = "q5_0"
    Q4_0 = "q4_0"

    @property
    def qtype(self) -> GGMLQuantizationType:
        """The type as gguf knows it."""
        return GGMLQuantizationType[self.name]


_MODEL_HELP = "A GGUF file, or org/name:TYPE of the hub."
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, metavar="N", help="CPU threads.", show_default="all cores")
]


@dataclass(frozen=True)
class ConversionOptions:
    """The options that both conversions have."""

    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            "-d",
            metavar="D",
            help="Trits per weight, 1 to 4: 2.00, 3.50, 5.25, 6.75 bits with the scales.",
            show_default=False,
        ),
    ] = None
    bpw: Annotated[
        float | None,
        typer.Option(
            "--bpw",
            metavar="X",
            help="Instead of --depth: bits per weight of the file. Each matrix gets the type that costs least.",
            show_default=False,
        ),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            "--target-size",
            metavar="SIZE",
            help="As --bpw, for the size of the file, such as 120MB or 1.5GiB.",
            show_default=False,
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write.", show_default="<model>-TRIT<D>.gguf"),
    ] = None
    method: Annotated[
        MethodName | None,
        typer.Option(
            "--method",
            help="How codes and scales are chosen: docs/guide/methods.md compares the methods.",
            show_default="gptq with --calibrate, imatrix with --imatrix, else the best that takes an hour at most",
        ),
    ] = None
    fast: Annotated[bool, typer.Option("--fast", help="Plain search, without calibration: as --method search.")] = False
    imatrix: Annotated[
        Path | None,
        typer.Option(
            "--imatrix", metavar="FILE", help="Importances by llama-imatrix, to weight the search.", show_default=False
        ),
    ] = None
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="Text to calibrate on, or JSON with texts or conversations; a file or a pipe. Repeatable.",
            show_default="a text that comes with tritconv",
        ),
    ] = None
    calib_tokens: Annotated[
        int | None,
        typer.Option(
            "--calib-tokens",
            min=256,
            metavar="N",
            help="Tokens to calibrate on, at most.",
            show_default="262144, or less to stay within an hour; with --method gptq or imatrix 65536",
        ),
    ] = None
    calib_bundled: Annotated[
        int,
        typer.Option(
            "--calib-bundled",
            min=0,
            metavar="N",
            help="Tokens to calibrate on besides, from the text that comes with tritconv, where --calibrate names one.",
        ),
    ] = 0
    calib_own: Annotated[
        int,
        typer.Option(
            "--calib-own",
            min=0,
            metavar="N",
            help="Tokens to calibrate on besides, which the model writes itself, going on from the text.",
        ),
    ] = 0
    calib_seq: Annotated[
        int, typer.Option("--calib-seq", min=16, metavar="N", help="Tokens of a calibration sequence.")
    ] = 512
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, metavar="N", help="Passes over the text, with --method tune.")
    ] = 2
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="Which parts of the text are taken.")
    ] = 0
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory for the hidden states of a calibration, such as 4GB; what takes more is in a file.",
            show_default="half of what is free",
        ),
    ] = None
    tensor_depth: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-depth",
            metavar="REGEX=D",
            help="Another depth, or a type such as q8_0, for the matrices whose GGUF name has a match. Repeatable; "
            "later ones win.",
            show_default=False,
        ),
    ] = None
    embed_type: Annotated[
        StorageType | None,
        typer.Option(
            "--embed-type",
            help="Type of the token embeddings.",
            show_default="q8_0; with gptq or tune, the smallest that costs little",
        ),
    ] = None
    output_type: Annotated[
        StorageType | None,
        typer.Option("--output-type", help="Type of the output matrix (lm_head).", show_default="as --embed-type"),
    ] = None
    fallback_type: Annotated[
        StorageType, typer.Option("--fallback-type", help="Type of matrices that a TRIT type cannot hold.")
    ] = StorageType.Q8_0
    split_max_size: Annotated[
        str | None,
        typer.Option(
            "--split-max-size",
            metavar="SIZE",
            help="Split what is larger into parts of at most this size, such as 4GB: <model>-00001-of-00003.gguf.",
            show_default=False,
        ),
    ] = None
    threads: Threads = None
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace the output file if it exists.")] = False


@app.command(
    "hf-to-gguf",
    epilog=examples(
        "tritconv hf-to-gguf Qwen/Qwen2.5-0.5B --depth 2",
        "tritconv hf-to-gguf Qwen/Qwen2.5-0.5B --depth 2 --calibrate text.txt",
        "tritconv hf-to-gguf ./my-checkpoint --depth 3 --embed-type f16 -o my-model.gguf",
    ),
)
@with_options(ConversionOptions)
def hf_to_gguf(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, or a hub id.", show_default=False)],
    options: ConversionOptions,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="NAME", help="llama.cpp's name of a BPE pre-tokenizer that it does not detect."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Convert a Hugging Face checkpoint: a local folder, or a model on the hub."""
    extra.need("tritconv hf-to-gguf")
    from tritconv import convert, report
    from tritconv.sources import foreign_code

    job = _job(options)
    if trust_remote_code:
        warning(f"--trust-remote-code: Python code that comes with {source} may do all that you may do")
    with foreign_code.trusted(trust_remote_code):
        written = convert.hf_to_gguf(source, revision, job, pre)
    if written is not None:
        out.print(report.conversion_report(written))


@app.command("gguf-to-gguf", epilog=examples("tritconv gguf-to-gguf model-F16.gguf --depth 2"))
@with_options(ConversionOptions)
def gguf_to_gguf(
    source: Annotated[str, typer.Argument(metavar="MODEL", help=f"{_MODEL_HELP} Of any type.", show_default=False)],
    options: ConversionOptions,
) -> None:
    """Encode a GGUF file again. The fewer bits the input has, the more its own error shows."""
    from tritconv import convert, report

    written = convert.gguf_to_gguf(find_model(source), _job(options))
    if written is not None:
        out.print(report.conversion_report(written))


@app.command(
    epilog=examples(
        "tritconv inspect model-TRIT2.gguf",
        "tritconv inspect model-TRIT2.gguf --tensor blk.0.attn_q.weight",
    )
)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)],
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="NAME", help="Count the codes and scale indexes of this tensor."),
    ] = None,
) -> None:
    """Show metadata, tensors, types and bits per weight of a GGUF file."""
    from tritconv import inspect as inspection

    path = find_model(model)
    for table in inspection.tensor_tables(path, tensor) if tensor else inspection.file_tables(path):
        out.print(table)


cache_app = typer.Typer(help="Show or empty the cache of calibrations.", invoke_without_command=True)
app.add_typer(cache_app, name="cache", epilog=examples("tritconv cache", "tritconv cache clear"))


@cache_app.callback()
def show_cache(context: typer.Context) -> None:
    """Show what the cache holds: its place, and what was used when."""
    if context.invoked_subcommand is None:
        out.print(f"{cache.folder()}, at most {sizes.show(cache.limit())}", markup=False, soft_wrap=True)
        out.print(cache.table())


@cache_app.command("clear")
def clear_cache() -> None:
    """Delete all that the cache holds, but for what a process uses now."""
    cleared = cache.clear()
    in_use = f"; {cleared.n_in_use} in use stay" if cleared.n_in_use else ""
    out.print(f"{cleared.n_deleted} deleted, {sizes.show(cleared.n_bytes)}{in_use}")


_LEAST_SIZE = 10**5  # bytes of a file: below that, a unit has been forgotten


@app.command(epilog=examples("tritconv verify model-TRIT2.gguf", "tritconv verify *.gguf"))
def verify(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=_MODEL_HELP, show_default=False)],
    threads: Threads = None,
) -> None:
    """Check GGUF files of any type: header, TRIT blocks, NaN and Inf, and whether llama.cpp would load them.

    Prints a line for each finding, and exits with 1 if there is one. Any part of a split file stands for all.
    """
    from tritconv import verify as verification

    if not verification.verify([find_model(model) for model in models], threads or all_cores()):
        raise typer.Exit(1)


@app.command(
    epilog=examples(
        "tritconv publish ./folder org/name --dry-run",
        "tritconv publish ./folder org/name --private --yes",
    )
)
def publish(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="GGUF files, README.md and what it shows.", show_default=False)
    ],
    repository: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub; it is made.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", metavar="NAME", help="Branch; made if it is not there.")
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", metavar="TEXT", help="Of the commit.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show what would be uploaded, no more.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    threads: Threads = None,
) -> None:
    """Upload a folder with GGUF files and their card to the Hugging Face hub, in one commit.

    All files are checked first, as verify does it. README.md must name license and base_model.
    """
    from tritconv import publish as publishing

    target = publishing.Repository(repository, branch, private)
    if not dry_run:
        if not yes and not sys.stdin.isatty():
            raise UsageError("there is no terminal to ask on: give --yes, or look first with --dry-run")
        publishing.check_token()
    uploads = publishing.prepare(folder, threads or all_cores())
    for upload in uploads:
        out.print(str(upload), markup=False, soft_wrap=True)
    if dry_run:
        note(f"nothing is uploaded to {target.url}: --dry-run")
        return
    if not yes:
        typer.confirm(f"Upload these {len(uploads)} files to {target.url}?", abort=True, err=True)
    publishing.upload(uploads, target, message)
    out.print(target.url, markup=False, soft_wrap=True)


def _job(options: ConversionOptions) -> "Job":
    """What the options ask for. Raises UsageError where they make no sense, whatever the model."""
    from tritconv.convert import Job

    budget = _budget(options)
    plan = _plan(options)
    method = _method(options)
    calibration = _calibration(options, method, budget)
    affordable = calibration is not None and options.method is None and (method is None or not options.calib_tokens)
    return Job(
        plan,
        options.output,
        options.force,
        options.threads,
        tuple(_rule(text) for text in options.tensor_depth or ()),
        method,
        affordable,
        _importances(options.imatrix),
        calibration,
        _training(options, method),
        budget,
        None if options.split_max_size is None else _parsed("--split-max-size", options.split_max_size),
    )


def _budget(options: ConversionOptions) -> "Budget | None":
    """The size to reach by mixed depth; None where --depth says it all."""
    from tritconv.allocate import BitsPerWeight, FileSize, bits_range

    depth, bpw, target_size = options.depth, options.bpw, options.target_size
    if sum(option is not None for option in (depth, bpw, target_size)) != 1:
        raise typer.BadParameter("give one of --depth, --bpw and --target-size")
    if bpw is not None:
        least, most = bits_range(any_type=bool(options.tensor_depth))
        if not least <= bpw <= most:  # nor is NaN
            raise UsageError(f"--bpw {bpw:g} is out of range: {least:.2f} to {most:.2f} bits per weight can be had")
        return BitsPerWeight(bpw)
    if target_size is None:
        return None
    size = _parsed("--target-size", target_size)
    if size < _LEAST_SIZE:
        raise UsageError(f"--target-size {target_size} is {size} bytes, too few for a model: write 120MB or 1.5GiB")
    return FileSize(size)


_START_DEPTH = 2  # where --bpw or --target-size takes the place of --depth: of matrices that no text reached


def _plan(options: ConversionOptions) -> Plan:
    depth = _START_DEPTH if options.depth is None else options.depth
    if depth not in DEPTHS:
        raise UsageError(f"--depth {depth} is out of range: choose {min(DEPTHS)} to {max(DEPTHS)}")
    if options.fallback_type.qtype in DEPTH_OF_TYPE:
        raise UsageError(f"--fallback-type {options.fallback_type.value}: it is for what a TRIT type cannot hold")
    embedding, output = options.embed_type or StorageType.Q8_0, options.output_type or options.embed_type
    named = {Kind.EMBEDDING: options.embed_type, Kind.OUTPUT: output}
    return Plan(
        depth,
        embedding.qtype,
        (output or embedding).qtype,
        options.fallback_type.qtype,
        named=frozenset(kind for kind, qtype in named.items() if qtype is not None),
    )


def _method(options: ConversionOptions) -> MethodName | None:
    """The method wanted, or the one that goes with what is given; None leaves the choice."""
    method, imatrix, calibrate = options.method, options.imatrix, options.calibrate
    if options.fast:
        if method not in (None, MethodName.SEARCH) or imatrix or calibrate:
            raise UsageError("--fast is plain search: leave out --method, --imatrix and --calibrate, or --fast")
        return MethodName.SEARCH
    if imatrix and calibrate:
        raise UsageError("--imatrix and --calibrate are two ways to know what matters: leave one of them out")
    if method is None:
        return MethodName.GPTQ if calibrate else MethodName.IMATRIX if imatrix else None
    if imatrix and method is not MethodName.IMATRIX:
        raise UsageError(f"--method {method.value} does not use --imatrix: leave one of them out")
    if calibrate and method in (MethodName.SEARCH, MethodName.UNIFORM):
        raise UsageError(f"--method {method.value} does not use --calibrate: leave one of them out")
    return method


def _importances(path: Path | None) -> "Importances | None":
    """The importances of a file that llama-imatrix has made."""
    if path is None:
        return None
    from tritconv.methods.imatrix_file import ImatrixFile

    return ImatrixFile(path)


_TOKENS = 65536
_MOST_TOKENS = 262144


def _calibration(
    options: ConversionOptions, method: MethodName | None, budget: "Budget | None"
) -> "CalibrationOptions | None":
    if method in (MethodName.SEARCH, MethodName.UNIFORM) or options.imatrix is not None:
        if budget is not None:
            raise UsageError("--bpw and --target-size need a calibration: leave out --fast, --imatrix and --method")
        if options.memory is not None:
            raise UsageError("--memory is for calibrations: leave it out, or leave out --fast, --imatrix and --method")
        return None
    extra.need("a calibration", otherwise="give --fast" if budget is None else "")
    from tritconv.calibration import bundled, documents
    from tritconv.calibration.context import CalibrationOptions
    from tritconv.calibration.text import TextOptions

    is_tune = method is MethodName.TUNE
    most = _MOST_TOKENS if is_tune or options.method is None else _TOKENS
    n_tokens, length = options.calib_tokens or most, options.calib_seq
    if n_tokens < length:
        raise UsageError(
            f"--calib-tokens {n_tokens} is less than one sequence of {length} tokens: raise it, or lower --calib-seq"
        )
    memory = None if options.memory is None else _parsed("--memory", options.memory)
    if options.calib_bundled and not options.calibrate:
        raise UsageError("--calib-bundled adds to a text of yours: name it with --calibrate, or leave that option out")
    documents.check(options.calibrate or ())
    cache.check()
    names = tuple(map(documents.name_of, options.calibrate or ())) or (bundled.NAME,)
    read: Sequence[documents.Document] = ()
    if is_first_process():
        read = documents.read(options.calibrate, n_tokens) if options.calibrate else bundled.documents()
    text = TextOptions(read, names, n_tokens, length, options.seed)
    besides = None
    if options.calib_bundled:
        also = bundled.documents() if is_first_process() else ()
        besides = TextOptions(also, (bundled.NAME,), options.calib_bundled, length, options.seed)
    return CalibrationOptions(text, besides, options.calib_own, is_tune, memory)


def _training(options: ConversionOptions, method: MethodName | None) -> "TuneOptions | None":
    if method is not MethodName.TUNE:
        return None
    from tritconv.methods.tune import TuneOptions

    return TuneOptions(options.epochs, seed=options.seed)


def _parsed(option: str, text: str) -> int:
    """Bytes."""
    size = sizes.parse(text)
    if size is None:
        raise UsageError(f"{option} {text} is no size: write 120MB or 1.5GiB")
    return size


def _rule(text: str) -> TypeRule:
    pattern, _, name = text.rpartition("=")
    types = {str(depth): qtype for depth, qtype in TRIT_TYPE.items()}
    types |= {one.value: one.qtype for one in StorageType if one.qtype not in DEPTH_OF_TYPE}
    if not pattern or name not in types:
        raise UsageError(f"--tensor-depth {text}: not of the form REGEX=D with D one of {', '.join(types)}")
    try:
        return TypeRule(re.compile(pattern), types[name])
    except re.error as error:
        raise UsageError(f"--tensor-depth {text}: not a regular expression: {error}") from error
