"""Options that several commands of tritrun have."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from gguf import GGMLQuantizationType

from tritcore.errors import UsageError
from tritcore.gguf_header import ModelFile
from tritcore.reference import find_model
from tritrun.llama import Adapter
from tritrun.loading import Loading
from tritrun.machine import physical_cores
from tritrun.models import read_adapter, read_text_model
from tritrun.servers import Server, find_servers, read_addresses


class KvType(str, Enum):
    """Types of the key-value cache; those below q8_0 cost quality."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    IQ4_NL = "iq4_nl"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"


def _gpu_layers(wanted: str) -> str:
    if not (wanted in ("auto", "all") or wanted.isdecimal()):
        raise typer.BadParameter(f"{wanted} is neither a number nor 'auto' nor 'all'")
    return wanted


MODEL_HELP = "A file, or org/name:TYPE of the hub."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", "-t", min=1, metavar="N", help="CPU threads.", show_default="physical cores"),
]
CpuOption = Annotated[
    str | None,
    typer.Option("--cpu", metavar="VARIANT", help="CPU code to use, such as haswell.", show_default="the best"),
]


RpcOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT,...", help="Machines with tritrun rpc-server, which hold a part of the model."),
]


@dataclass(frozen=True)
class LoadingOptions:
    """Options of the commands that load a model to answer."""

    ctx: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**24, metavar="N", help="Context in tokens; 0: the model's.", show_default="up to 4096"
        ),
    ] = None
    threads: ThreadsOption = None
    cpu: CpuOption = None
    gpu_layers: Annotated[
        str,
        typer.Option(
            metavar="N",
            help="Layers to keep on a GPU or on --rpc servers: a number, all, or auto for what fits.",
            callback=_gpu_layers,
        ),
    ] = "auto"
    kv_type: Annotated[KvType, typer.Option("--kv-type", help="Type of the key-value cache.")] = KvType.F16
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora", metavar="FILE[=SCALE]", help="Add a LoRA adapter in GGUF. May be repeated.", show_default=False
        ),
    ] = None
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model of the same family, which guesses tokens.")
    ] = None
    mmproj: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The part of the model that sees or hears, in GGUF.")
    ] = None
    rpc: RpcOption = None
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="See first that no weight and no block is damaged.")
    ] = True

    def of(self, model: ModelFile) -> Loading:
        """How to load `model`.

        Raises:
            TritError: an adapter, the model that guesses or a server is not there, or is something else.
            UsageError: an adapter is not of the form FILE or FILE=SCALE, or a server of the form HOST:PORT.
        """
        return Loading(
            self.ctx,
            self.threads or physical_cores(),
            self.gpu_layers,
            self.check,
            GGMLQuantizationType[self.kv_type.name],
            tuple(_adapter(text, model) for text in self.lora or ()),
            read_text_model(find_model(self.draft)) if self.draft else None,
            servers_of(self.rpc, [model]),
        )


def servers_of(addresses: str | None, models: Sequence[ModelFile]) -> tuple[Server, ...]:
    """The servers of `--rpc`, which compute with the types of `models` as this build does.

    Raises:
        TritError: one does not, or is not there.
        UsageError: an address is not of the form HOST:PORT.
    """
    return find_servers(read_addresses(addresses), models) if addresses is not None else ()


def _adapter(text: str, model: ModelFile) -> Adapter:
    name, _, number = text.rpartition("=")
    try:
        scale = float(number)
    except ValueError:
        name, scale = text, 1.0
    if not name or not math.isfinite(scale):
        raise UsageError(f"--lora {text}: not of the form FILE or FILE=SCALE")
    return Adapter(read_adapter(Path(name), model), scale)
