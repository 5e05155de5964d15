"""The result of `tritrun compare`: a row of figures for each file, and the conditions. As JSON and as a table."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from gguf import LlamaFileType
from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table

from tritcore.console import one_line
from tritcore.gguf_header import ModelFile
from tritrun.base_logits import scored_tokens
from tritrun.naming import clean_name
from tritrun.perplexity import Divergence
from tritrun.perplexity_log import Estimate
from tritrun.provenance import Provenance
from tritrun.rounds import PHASES, Spread

STAND_IN_TYPE = "trit.stand_in.type"
"""Metadata key, text: the type that the file stands in for. The matrices of its layers hold, as floats, weights that
were encoded in that type and decoded."""
STAND_IN_BITS = "trit.stand_in.bits_per_weight"
"""Metadata key, float32: the bits per weight of that type."""

_FORMAT = 1  # of the JSON


@dataclass(frozen=True)
class Contents:
    """Facts on the weights of a file, from its header.

    Attributes:
        file_type: llama.cpp's name for the mixture of types, such as Q4_K_M.
        method: how the TRIT codes were chosen, None if the file does not say.
        layers: tensor type -> share of the weights, 0..1, in the matrices of the layers, the largest first.
        layer_bits: bits per weight of those matrices.
        bits: bits per weight of all tensors.
        stand_in: the matrices of the layers are floats that went through another type, as the header says (see
            `STAND_IN_TYPE`). `layers` and `layer_bits` are those of that type; size and speed of the file say nothing.
    """

    file_type: str
    method: str | None
    layers: dict[str, float]
    layer_bits: float
    bits: float
    stand_in: bool = False

    @property
    def family(self) -> str:
        """TRIT, K-quant, I-quant or other: by the layers if they are ours, else by the name of the mixture."""
        if sum(share for name, share in self.layers.items() if name.startswith("TRIT")) >= 0.5:
            return "TRIT"
        if self.file_type.startswith("IQ"):
            return "I-quant"
        return "K-quant" if "_K" in self.file_type else "other"


@dataclass(frozen=True)
class File:
    """A file of a model: the only one, or one of its parts. `name` is without a folder."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Row:
    """One model, in one file or in parts.

    Attributes:
        label: what it is called in the report; no other row has it.
        file: name of the file, or of the first part, without its folder.
        sha256: of the file; of a model in parts, one over the digests of all.
        n_bytes: size of the file, or of all parts.
        divergence: from the base; None for the base itself.
        speed: tokens per second for each phase; None if not measured.
        files: the file, or all parts in order.
        provenance: where it comes from.
    """

    label: str
    file: str
    sha256: str
    n_bytes: int
    contents: Contents
    perplexity: Estimate
    divergence: Divergence | None
    speed: dict[str, Spread] | None
    files: tuple[File, ...] = ()
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def is_ours(self) -> bool:
        """Whether TRIT types hold the layers."""
        return self.contents.family == "TRIT"


@dataclass(frozen=True)
class Conditions:
    """How the rows were measured.

    Attributes:
        command: the command line, without folders.
        date: of the end, ISO 8601 in UTC.
        chunks: of `ctx` tokens; the second half of each is scored.
        recipes: the files that llama-quantize made of the base.
        calibration: where the importance matrix of the recipes came from; None if there was none.
        cpu: variant of ggml's CPU code.
        speed: rounds and tokens of each test; None if speed was not measured.
        versions: of this package, of the bindings, and the fingerprint of llama.cpp's libraries.
    """

    command: str
    date: str
    text: str
    text_sha256: str
    ctx: int
    chunks: int
    recipes: tuple[str, ...]
    calibration: str | None
    threads: int
    cpu: str
    machine: dict[str, str | int]
    speed: dict[str, int] | None
    versions: dict[str, str]

    @property
    def scored_tokens(self) -> int:
        """Tokens whose predictions count."""
        return self.chunks * scored_tokens(self.ctx)

    def facts(self) -> Iterator[tuple[str, str]]:
        """What a report says of them: names, and texts about each."""
        machine, versions = self.machine, self.versions
        yield "date", datetime.fromisoformat(self.date).strftime("%Y-%m-%d %H:%M UTC")
        yield "text", f"{self.text}, SHA-256 {self.text_sha256}"
        yield (
            "scored",
            f"{self.chunks} chunks of {self.ctx} tokens, the second half of each: {self.scored_tokens:,} tokens",
        )
        if self.recipes:
            matrix = (
                f"with an importance matrix from {self.calibration}"
                if self.calibration
                else "without an importance matrix"
            )
            yield "recipes", f"{', '.join(self.recipes)}: made of the base by llama-quantize, {matrix}"
        if speed := self.speed:
            yield (
                "speed",
                f"llama-bench: decode is an answer of {speed['answer_tokens']} tokens, prompt is reading "
                f"{speed['prompt_tokens']}; {speed['rounds']} rounds, each over all files in turn",
            )
        yield "machine", f"{machine['cpu']}, {machine['architecture']}, {machine['system']}"
        yield "threads", f"{self.threads} of {machine['cores']} cores, CPU code for {self.cpu}"
        yield (
            "versions",
            f"trit-gguf {versions['trit-gguf']}, llama-cpp-python {versions['llama-cpp-python']}; libraries "
            f"{versions['libraries'][:16]}",
        )


@dataclass(frozen=True)
class Comparison:
    """The base, all other files from the smallest to the largest (stand-ins last), and the conditions."""

    title: str
    base: Row
    rows: tuple[Row, ...]
    conditions: Conditions

    def as_json(self) -> str:
        """All figures, for machines. A figure that is no number is null."""
        rows = [{"base": row is self.base} | asdict(row) for row in (self.base, *self.rows)]
        for row, source in zip(rows, (self.base, *self.rows), strict=True):
            row["contents"] |= {"family": source.contents.family}
            if source.speed:
                row["speed"] = {phase: spread._asdict() for phase, spread in source.speed.items()}
        report = {"format": _FORMAT, "title": self.title, "conditions": asdict(self.conditions), "models": rows}
        return json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n"

    def as_table(self) -> Table:
        """The figures, for people."""
        caption = f"{one_line(self.conditions.text)}, {self.conditions.chunks} chunks of {self.conditions.ctx} tokens"
        if self.conditions.speed:
            caption += "; tokens/s: median (range) of {rounds} rounds".format(**self.conditions.speed)
        table = Table(caption=escape(caption))
        table.add_column("model", overflow="fold")
        for heading in ("size", "bpw\nlayers", "bpw\nall", "PPL", "KLD\nmean", "median", "99.9%", "same\ntop"):
            table.add_column(heading, justify="right", overflow="fold")
        for phase in PHASES if self.conditions.speed else ():
            table.add_column(f"{phase}\ntokens/s", justify="right", overflow="fold")
        for row in (self.base, *self.rows):
            table.add_row(escape(row.label), *_cells(row), style="bold" if row.is_ours else None)
            if row is self.base:
                table.add_section()
        return table


def contents(model: ModelFile) -> Contents:
    """The types of a file's weights, from its header."""
    weights: Counter[str] = Counter()
    n_bytes = 0
    for tensor in model.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            weights[tensor.type.name] += math.prod(tensor.shape)
            n_bytes += tensor.n_bytes
    total = weights.total()
    layers = {name: count / total for name, count in weights.most_common()} if total else {}
    method = model.metadata.get("trit.method")
    found = Contents(
        file_type=_file_type(model),
        method=clean_name(method) if isinstance(method, str) else None,
        layers=layers,
        layer_bits=8 * n_bytes / total if total else 0.0,
        bits=model.bits_per_weight,
    )
    stands_for, bits = model.metadata.get(STAND_IN_TYPE), model.metadata.get(STAND_IN_BITS)
    if isinstance(stands_for, str) and isinstance(bits, float) and 0 < bits < 32:
        name = clean_name(stands_for)
        return replace(found, file_type=name, layers={name: 1.0}, layer_bits=bits, stand_in=True)
    return found


def _file_type(model: ModelFile) -> str:
    try:
        name = LlamaFileType(model.metadata.get("general.file_type")).name
    except ValueError:
        return model.main_type
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _cells(row: Row) -> Iterable[str]:
    real = not row.contents.stand_in
    yield human_size(row.n_bytes) if real else "-"
    yield f"{row.contents.layer_bits:.2f}"
    yield f"{row.contents.bits:.2f}" if real else "-"
    yield f"{row.perplexity.value:.3f}"
    d = row.divergence
    if d is None:
        yield from [""] * 4
    else:
        yield from (f"{d.mean.value:.4f}", f"{d.median:.4f}", f"{d.percentile_99_9:.3f}", f"{d.same_top.value:.1f}%")
    for spread in (row.speed or {}).values():
        yield spread.format(0 if spread.median >= 100 else 1)


def _finite(value: Any) -> Any:
    """`value` with None in place of what JSON cannot hold: nan and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
