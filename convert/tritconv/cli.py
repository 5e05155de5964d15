"""The `tritconv` command line."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from gguf import GGMLQuantizationType

from tritconv import __version__
from tritconv.commands import examples, new_app
from tritconv.console import out
from tritconv.errors import TritError
from tritconv.format import DEPTHS
from tritconv.plan import TypePlan

if TYPE_CHECKING:
    from tritconv.convert import Job

app = new_app("tritconv", "Convert language models to GGUF files with balanced-ternary weights.", lambda: __version__)


class StorageType(str, Enum):
    """The types for tensors that do not become TRIT."""

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


Depth = Annotated[
    int,
    typer.Option(
        "--depth",
        "-d",
        metavar="D",
        help="Trits per weight, 1 to 4: 2.00, 3.50, 5.25, 6.75 bits with the scales.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="The file to write.", show_default="<model>-TRIT<D>.gguf"),
]
EmbedType = Annotated[StorageType, typer.Option("--embed-type", help="Type of the token embeddings.")]
OutputType = Annotated[
    StorageType | None,
    typer.Option("--output-type", help="Type of the output matrix (lm_head).", show_default="as --embed-type"),
]
FallbackType = Annotated[
    StorageType, typer.Option("--fallback-type", help="Type of matrices that a TRIT type cannot hold.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, metavar="N", help="CPU threads.", show_default="all cores")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output file if it exists.")]


@app.command(
    "hf-to-gguf",
    epilog=examples(
        "tritconv hf-to-gguf Qwen/Qwen2.5-0.5B --depth 2",
        "tritconv hf-to-gguf ./my-checkpoint --depth 3 --embed-type f16 -o my-model.gguf",
    ),
)
def hf_to_gguf(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder, or a hub id.", show_default=False)],
    depth: Depth,
    output: Output = None,
    embed_type: EmbedType = StorageType.Q8_0,
    output_type: OutputType = None,
    fallback_type: FallbackType = StorageType.Q8_0,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Convert a Hugging Face checkpoint: a local folder, or a model on the hub."""
    from tritconv import convert, report

    job = _job(depth, output, embed_type, output_type, fallback_type, threads, force)
    out.print(report.conversion_report(convert.hf_to_gguf(source, revision, job)))


@app.command("gguf-to-gguf", epilog=examples("tritconv gguf-to-gguf model-F16.gguf --depth 2"))
def gguf_to_gguf(
    source: Annotated[Path, typer.Argument(metavar="IN.gguf", help="A GGUF file of any type.", show_default=False)],
    depth: Depth,
    output: Output = None,
    embed_type: EmbedType = StorageType.Q8_0,
    output_type: OutputType = None,
    fallback_type: FallbackType = StorageType.Q8_0,
    threads: Threads = None,
    force: Force = False,
) -> None:
    """Encode a GGUF file again. The fewer bits the input has, the more its own error shows."""
    from tritconv import convert, report

    job = _job(depth, output, embed_type, output_type, fallback_type, threads, force)
    out.print(report.conversion_report(convert.gguf_to_gguf(source, job)))


@app.command(
    epilog=examples(
        "tritconv inspect model-TRIT2.gguf",
        "tritconv inspect model-TRIT2.gguf --tensor blk.0.attn_q.weight",
    )
)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file.", show_default=False)],
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="NAME", help="Count the codes and scale indexes of this tensor."),
    ] = None,
) -> None:
    """Show metadata, tensors, types and bits per weight of a GGUF file."""
    from tritconv import inspect as inspection

    for table in inspection.tensor_tables(path, tensor) if tensor else inspection.file_tables(path):
        out.print(table)


def _job(
    depth: int,
    output: Path | None,
    embed_type: StorageType,
    output_type: StorageType | None,
    fallback_type: StorageType,
    threads: int | None,
    force: bool,
) -> "Job":
    from tritconv import convert

    if depth not in DEPTHS:
        raise TritError(f"--depth {depth} is out of range: choose {min(DEPTHS)} to {max(DEPTHS)}")
    plan = TypePlan(depth, embed_type.qtype, (output_type or embed_type).qtype, fallback_type.qtype)
    return convert.Job(plan, output, force, threads or convert.Job.threads)
