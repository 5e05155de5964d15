"""`tritconv inspect`: what a GGUF file holds, as tables."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.filesize import decimal as human_size
from rich.markup import escape
from rich.table import Table

from tritcore.codec import Blocks, unpack, validate
from tritcore.console import without_controls
from tritcore.errors import TritError
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, N_SCALES
from tritcore.gguf_header import ModelFile, Skipped, Tensor, joined, parts_of, raw_values, read_model_file
from tritcore.gguf_types import DEPTH_OF_TYPE

_BAR_WIDTH = 40
_VALUE_WIDTH = 72


def file_tables(path: Path) -> Iterator[RenderableType]:
    """Metadata and tensors of a file, or of all parts of a split model. Raises TritError."""
    model = joined(parts_of(read_model_file(path)))
    yield _metadata_table(model)
    yield _tensor_table(model)


def tensor_tables(path: Path, name: str) -> Iterator[RenderableType]:
    """How often each code and each scale index occurs in one TRIT tensor.

    Raises:
        TritError: there is no such tensor, it is not of a TRIT type, or its data are damaged.
    """
    parts = parts_of(read_model_file(path))
    found = ((part, tensor) for part in parts for tensor in part.tensors if tensor.name == name)
    model, tensor = next(found, (parts[0], None))
    if tensor is None:
        raise TritError(f"{path} has no tensor {name}: `tritconv inspect {path}` lists them")
    depth = DEPTH_OF_TYPE.get(tensor.type)
    if depth is None:
        raise TritError(f"{path}: {name} is {tensor.type.name}, only TRIT tensors have codes to count")

    blocks = _blocks(model, tensor, depth)
    anchors = 3 * blocks.scales[:, 0].astype(int) + blocks.scales[:, 1:].sum(axis=1, dtype=int) % 3
    top = CODE_MAX[depth]
    yield _histogram(f"codes of {name}", "code", blocks.codes.astype(int).ravel() + top, range(-top, top + 1))
    yield _histogram("scale indexes of groups 1 to 3", "k", blocks.scales[:, 1:].ravel(), range(N_SCALES))
    yield _histogram("anchors", "n", anchors, range(anchors.max() + 1))


def _blocks(model: ModelFile, tensor: Tensor, depth: int) -> Blocks:
    data = np.memmap(
        model.path, dtype=np.uint8, mode="r", offset=model.data_start + tensor.offset, shape=(tensor.n_bytes,)
    )
    packed = np.asarray(data).reshape(-1, BYTES_PER_BLOCK[depth])
    try:
        validate(depth, packed)
    except TritError as error:
        raise TritError(f"{model.path}: tensor {tensor.name}: {error}; download or convert it again") from error
    return unpack(depth, packed)


def _metadata_table(model: ModelFile) -> Table:
    table = Table("key", "value", title=f"{escape(without_controls(model.path.name))}: metadata")
    for key, value in model.metadata.items():
        shown = f"({value.length} elements or bytes)" if isinstance(value, Skipped) else without_controls(str(value))
        if len(shown) > _VALUE_WIDTH:
            shown = shown[: _VALUE_WIDTH - 1] + "…"
        table.add_row(escape(key), escape(" ".join(shown.split())))
    return table


def _tensor_table(model: ModelFile) -> Table:
    table = Table("tensor", "type", "shape", "size", "bits/weight", title="tensors")
    table.columns[0].no_wrap = True
    for column in table.columns[3:]:
        column.justify = "right"
    methods = _methods(model)
    if methods is not None:
        table.add_column("method")
    for number, tensor in enumerate(model.tensors):
        weights = math.prod(tensor.shape)
        table.add_row(
            escape(tensor.name),
            tensor.type.name,
            " x ".join(str(n) for n in tensor.shape),
            human_size(tensor.n_bytes),
            f"{8 * tensor.n_bytes / weights:.2f}" if weights else "-",
            *([] if methods is None else [escape(methods[number])]),
        )
    table.add_section()
    total = sum(tensor.n_bytes for tensor in model.tensors)
    table.add_row("total", "", "", human_size(total), f"{model.bits_per_weight:.2f}", style="bold")
    return table


def _methods(model: ModelFile) -> list[str] | None:
    """By which method the blocks of each tensor were made, "" for none; None where the file does not say."""
    wanted = ("trit.methods", "trit.tensor.method")
    if not set(wanted) <= model.fields.keys():
        return None
    values = {key: value for key, _, value in raw_values(model) if key in wanted}
    names, numbers = (values[key] for key in wanted)
    if not (isinstance(names, list) and isinstance(numbers, list) and len(numbers) == len(model.tensors)):
        return None
    if not all(isinstance(name, bytes) for name in names) or any(n not in range(len(names)) for n in numbers):
        return None
    return [without_controls(names[n].decode(errors="replace")) if n else "" for n in numbers]


def _histogram(title: str, name: str, values: np.ndarray, labels: range) -> Table:
    counts = np.bincount(values, minlength=len(labels))
    table = Table(name, "share", "", title=escape(title))
    table.columns[0].justify = table.columns[1].justify = "right"
    for label, count in zip(labels, counts, strict=True):
        bar = "█" * round(_BAR_WIDTH * int(count) / max(1, int(counts.max())))
        table.add_row(str(label), f"{100 * count / max(1, len(values)):.2f}%", bar)
    return table
