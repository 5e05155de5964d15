"""Writes a GGUF file, or the parts of a split one, in one pass: each tensor is written as it comes, and forgotten.

Room for the headers is reserved at the start. All metadata have a length that is known before, so each header is
written once, at the end, with the types that the tensors really have.
"""

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, GGUFWriter, quant_shape_to_byte_shape
from gguf.gguf_writer import WriterState

from tritconv.encode import Encoded, check_finite, encode, measured, n_bytes
from tritconv.methods import Finished
from tritconv.parts import in_one_file, layout
from tritconv.plan import Plan, Why
from tritconv.sources.source import Kind, SourceTensor, Value
from tritconv.verify import findings
from tritconv.workers import Workers
from tritcore.errors import RangeError, TritError
from tritcore.output import Output

_NO_METHOD = "none"  # of tensors that are not TRIT; the first of `trit.methods`


@dataclass(frozen=True)
class StoredTensor:
    """What became of a tensor.

    Attributes:
        method: by which its blocks were made; "" for a type that is not TRIT.
        imported: whether the codes are those of the source's lattice.
        fallback: why it did not get the type that it should have, if so.
    """

    name: str
    kind: Kind
    n_weights: int
    qtype: GGMLQuantizationType
    n_bytes: int
    relative_error: float
    method: str = ""
    imported: bool = False
    fallback: str | None = None


@dataclass(frozen=True)
class Written:
    """A finished model: one file, or its parts in order."""

    paths: Sequence[Path]
    n_bytes: int
    seconds: float
    tensors: Sequence[StoredTensor]
    remarks: Sequence[str]

    @property
    def path(self) -> Path:
        """The file that stands for the model: the only one, or the first part."""
        return self.paths[0]


Progress = Callable[[str, int], None]  # called after each tensor with its name and planned bytes


@dataclass(frozen=True)
class Header:
    """What the header of a file says besides the tensors' types.

    Attributes:
        architecture: as llama.cpp calls it.
        metadata: without what depends on what becomes of the tensors.
        tensors: in the order of the file.
        methods: that may make blocks, by name.
    """

    architecture: str
    metadata: Mapping[str, Value]
    tensors: Sequence[SourceTensor]
    methods: Sequence[str]

    def files(self, plan: Plan, most: int | None) -> Sequence[range]:
        """Which tensors go into which file, by number, where none may be larger than `most` bytes: see `layout`."""
        if most is None:
            return in_one_file(len(self.tensors))
        sizes = [_padded(n_bytes(tensor.shape, plan.type_of(tensor))) + _entry_bytes(tensor) for tensor in self.tensors]
        first, other = (len(head) for head in self.as_planned(plan, (range(0), range(0))))
        padding = GGUF_DEFAULT_ALIGNMENT  # the entries of tensors may move the end of a header to the next multiple
        return layout(sizes, first + padding, other + padding, most)

    def as_planned(self, plan: Plan, files: Sequence[range]) -> list[bytes]:
        """The headers of files whose tensors all have their planned types."""
        types = [plan.type_of(tensor) for tensor in self.tensors]
        return [self._bytes(types, [""] * len(types), 0, files, number) for number in range(len(files))]

    def of(self, stored: Sequence[StoredTensor], files: Sequence[range]) -> list[bytes]:
        """The headers of files with these tensors. They are as long as any other ones."""
        types, methods = [tensor.qtype for tensor in stored], [tensor.method for tensor in stored]
        n_imported = sum(tensor.imported for tensor in stored)
        return [self._bytes(types, methods, n_imported, files, number) for number in range(len(files))]

    def _bytes(
        self,
        types: Sequence[GGMLQuantizationType],
        methods: Sequence[str],
        n_imported: int,
        files: Sequence[range],
        number: int,
    ) -> bytes:
        """The header of one of the files, up to where the tensors' data begin. The first one has the metadata."""
        writer = GGUFWriter(None, arch=self.architecture)
        if number:
            writer.kv_data[0].clear()
        else:
            self._add_metadata(writer, methods, n_imported)
        if len(files) > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", len(files))
            writer.add_int32("split.tensors.count", len(self.tensors))
        for index in files[number]:
            tensor, qtype = self.tensors[index], types[index]
            shape, size = quant_shape_to_byte_shape(tensor.shape, qtype), n_bytes(tensor.shape, qtype)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=qtype)
        file = io.BytesIO()
        writer.fout, writer.state = [file], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(file, file.tell())
        return file.getvalue()

    def _add_metadata(self, writer: GGUFWriter, methods: Sequence[str], n_imported: int) -> None:
        for key, value in self.metadata.items():
            writer.add_key_value(key, value.value, value.type, value.element_type)
        numbers = [0 if not method else 1 + self.methods.index(method) for method in methods]
        writer.add_key_value("trit.methods", [_NO_METHOD, *self.methods], GGUFValueType.ARRAY, GGUFValueType.STRING)
        if numbers:
            writer.add_key_value("trit.tensor.method", numbers, GGUFValueType.ARRAY, GGUFValueType.UINT8)
        writer.add_uint32("trit.imported", n_imported)


def file_sizes(header: Header, plan: Plan, files: Sequence[range]) -> list[int]:
    """The sizes in bytes of files whose tensors all have their planned types."""
    sizes = [_padded(n_bytes(tensor.shape, plan.type_of(tensor))) for tensor in header.tensors]
    headers = header.as_planned(plan, files)
    return [len(head) + sum(sizes[index] for index in file) for head, file in zip(headers, files, strict=True)]


def file_bytes(header: Header, plan: Plan) -> int:
    """The size of a single file whose tensors all have their planned types."""
    (size,) = file_sizes(header, plan, in_one_file(len(header.tensors)))
    return size


def write_outline(header: Header, plan: Plan, path: Path) -> int:
    """Write the header of a single file, and data of zeros that take no room on the disk: llama.cpp looks at no more.

    Returns:
        The size of the file to come, in bytes.
    """
    path.write_bytes(*header.as_planned(plan, in_one_file(len(header.tensors))))
    size = file_bytes(header, plan)
    os.truncate(path, size)
    return size


def write(
    header: Header,
    plan: Plan,
    finished: Iterable[Finished],
    output: Output,
    workers: Workers,
    progress: Progress,
    most: int | None = None,
) -> list[StoredTensor]:
    """Store tensors as they come, and publish the file of them, or the parts.

    Args:
        finished: the tensors of the header, in its order.
        most: bytes of a file, by the planned types; None for a single file.

    Raises:
        TritError: a weight is NaN or infinite, or what has been written is not valid.
        OSError: the file cannot be written.
    """
    files = header.files(plan, most)
    partials = output.partials(len(files))
    reserved = [len(head) for head in header.as_planned(plan, files)]
    for partial, room in zip(partials, reserved, strict=True):
        partial.touch()
        os.truncate(partial, room)
    places = [partial for partial, file in zip(partials, files, strict=True) for _ in file]
    stored = []
    for partial, tensor, one in zip(places, header.tensors, finished, strict=True):
        assert one.tensor is tensor, "tensors come in the order of the file"
        data, outcome = _store(one, plan, workers)
        with partial.open("ab") as file:
            file.write(data.data)
            file.write(bytes(_padded(outcome.n_bytes) - outcome.n_bytes))
        stored.append(outcome)
        progress(tensor.name, n_bytes(tensor.shape, plan.type_of(tensor)))
    for partial, room, head in zip(partials, reserved, header.of(stored, files), strict=True):
        assert len(head) == room, "the header has the length that was reserved"
        with partial.open("r+b") as start:
            start.write(head)
            start.flush()
            os.fsync(start.fileno())
    if found := findings(partials[0], workers.threads):
        fault = found[0].removeprefix(f"{output.partial}: ").removeprefix(f"{partials[0].parent}{os.sep}")
        raise TritError(f"{output.target} is not written, as the result would not be sound: {fault}")
    output.publish()
    return stored


def _padded(size: int) -> int:
    """Bytes that a tensor takes in the file."""
    return GGUFWriter.ggml_pad(size, GGUF_DEFAULT_ALIGNMENT)


def _entry_bytes(tensor: SourceTensor) -> int:
    """Bytes that a tensor takes in the table of a header: its name, dimensions, type and offset."""
    return 8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8


def _store(one: Finished, plan: Plan, workers: Workers) -> tuple[np.ndarray, StoredTensor]:
    """The bytes of a tensor, uint8 (bytes,), and what became of it."""
    tensor, values, choice = one.tensor, one.values, plan.choice(one.tensor)
    if values.dtype.kind in "iu":  # stored as it is: integers, or blocks that the checkpoint brought
        as_it_is = Encoded(np.ascontiguousarray(values).view(np.uint8).ravel(), 0.0, 0.0)
        return as_it_is.data, _outcome(one, choice.qtype, as_it_is)
    reason = one.reason
    if choice.why is Why.ROWS:
        reason = f"its rows of {tensor.shape[-1]} weights are no multiple of {choice.wanted.name}'s block"
    if one.blocks is not None:
        encoded = measured(values, one.blocks, choice.qtype, workers)
        return encoded.data, _outcome(one, choice.qtype, encoded, reason)

    check_finite(tensor, values, workers)
    planned = () if choice.depth is not None else (choice.qtype,)
    # a type that llama.cpp wants for a tensor is one of floats, and it does not take blocks instead
    fallback = (plan.fallback_of(tensor),) if tensor.kept_type is None else ()
    for qtype in dict.fromkeys((*planned, *fallback, GGMLQuantizationType.F32)):
        try:
            encoded = encode(values, qtype, workers)
        except RangeError as error:
            reason = reason or str(error)
        else:
            return encoded.data, _outcome(one, qtype, encoded, reason)
    raise AssertionError("every finite weight fits into F32")


def _outcome(one: Finished, qtype: GGMLQuantizationType, encoded: Encoded, fallback: str | None = None) -> StoredTensor:
    tensor = one.tensor
    return StoredTensor(
        tensor.name,
        tensor.kind,
        int(np.prod(tensor.shape)),
        qtype,
        len(encoded.data),
        encoded.relative_error,
        one.method,
        one.imported,
        fallback,
    )
