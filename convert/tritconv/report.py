"""What a conversion prints at the end: what the file's bytes are made of, and where the error is."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tritconv.sources.source import Kind
from tritconv.writer import StoredTensor, Written

_N_WORST = 5


def conversion_report(written: Written) -> RenderableType:
    """Tables for a finished file."""
    parts: list[RenderableType] = [_sizes(written), _worst(written.tensors)]
    parts.extend(_fallbacks(written.tensors))
    parts.extend(Text(remark, style="yellow") for remark in written.remarks)
    last = f" to {written.paths[-1].name}" if len(written.paths) > 1 else ""
    parts.append(Text(f"{written.path}{last}  {human_size(written.n_bytes)}  {written.seconds:.1f} s", style="bold"))
    return Group(*parts)


def _sizes(written: Written) -> Table:
    table = Table("tensors", "number", "types", "weights", "size", "bits/weight", title="what the bytes are")
    for column in table.columns[1:2] + table.columns[3:]:
        column.justify = "right"

    by_kind: dict[Kind, list[StoredTensor]] = defaultdict(list)
    for tensor in written.tensors:
        by_kind[tensor.kind].append(tensor)
    for kind in Kind:
        if kind in by_kind:
            table.add_row(kind.value, *_size_cells(by_kind[kind]))
    table.add_section()
    table.add_row("total", *_size_cells(written.tensors), style="bold")
    return table


def _size_cells(tensors: Iterable[StoredTensor]) -> list[str]:
    tensors = list(tensors)
    weights = sum(tensor.n_weights for tensor in tensors)
    size = sum(tensor.n_bytes for tensor in tensors)
    types = Counter(tensor.qtype.name for tensor in tensors)
    return [
        str(len(tensors)),
        " ".join(name for name, _ in types.most_common()),
        f"{weights:,}",
        human_size(size),
        f"{8 * size / weights:.2f}" if weights else "-",
    ]


def _worst(tensors: Iterable[StoredTensor]) -> Table:
    table = Table("matrix", "type", "relative error", title="the matrices with the largest error")
    table.columns[2].justify = "right"
    matrices = [tensor for tensor in tensors if tensor.kind is Kind.MATRIX]
    for tensor in sorted(matrices, key=lambda tensor: -tensor.relative_error)[:_N_WORST]:
        table.add_row(escape(tensor.name), tensor.qtype.name, f"{tensor.relative_error:.4f}")
    return table


def _fallbacks(tensors: Iterable[StoredTensor]) -> Iterable[Text]:
    for tensor in tensors:
        if tensor.fallback is not None:
            yield Text(f"{tensor.name} is stored as {tensor.qtype.name}: {tensor.fallback}", style="yellow")
