"""Writes a GGUF file in one pass: a tensor at a time is read, encoded, written and forgotten.

The header has the same length whatever the types are, so it is written first as planned, and again at the end with
the types that the tensors really got.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape
from gguf.gguf_writer import WriterState

from tritconv.encode import Encoded, Encoder, n_bytes
from tritconv.methods import Quantizer
from tritconv.methods.search import Search
from tritconv.plan import Kind, SourceTensor, TypePlan
from tritconv.verify import findings
from tritconv.workers import Workers
from tritcore.errors import NotFiniteError, RangeError, TritError
from tritcore.output import Output


@dataclass(frozen=True)
class StoredTensor:
    """What became of a tensor. `fallback` says why it did not get the planned type, if so."""

    name: str
    kind: Kind
    n_weights: int
    qtype: GGMLQuantizationType
    n_bytes: int
    relative_error: float
    fallback: str | None = None


@dataclass(frozen=True)
class Written:
    """A finished file. `remarks` are the method's."""

    path: Path
    n_bytes: int
    seconds: float
    tensors: Sequence[StoredTensor]
    remarks: Sequence[str]


Progress = Callable[[str, int], None]  # called after each tensor with its name and planned bytes


def write(
    header: GGUFWriter,
    tensors: Sequence[SourceTensor],
    plan: TypePlan,
    output: Output,
    threads: int,
    progress: Progress,
    quantizer: Quantizer | None = None,
) -> Written:
    """Encode tensors and publish the file of them.

    Args:
        header: holds the metadata; its tensors are replaced. Until the last call of `progress` returns, values that
            take the same room may still change.
        quantizer: makes the blocks of TRIT types; None stands for the search.

    Raises:
        TritError: a weight is NaN or infinite, the disk is too small, or what has been written is not valid.
        OSError: the file cannot be written.
    """
    start = time.monotonic()
    quantizer = quantizer or Search()
    _list_tensors(header, tensors, plan)
    output.check_space(_data_bytes(header))
    try:
        with Workers(threads) as workers:
            stored = _write_file(header, tensors, plan, output.partial, Encoder(quantizer, workers), progress)
    finally:
        with suppress(OSError):
            header.close()
    if found := findings(output.partial, threads):
        fault = found[0].removeprefix(f"{output.partial}: ")
        raise TritError(f"{output.target} is not written, as the result would not be sound: {fault}")
    output.publish()
    size = output.target.stat().st_size
    return Written(output.target, size, time.monotonic() - start, stored, quantizer.remarks())


def header_bytes(header: GGUFWriter, tensors: Sequence[SourceTensor], plan: TypePlan) -> int:
    """What a file's metadata and list of tensors take, about: `write` adds some metadata of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return _write_header_alone(header, tensors, plan, Path(folder) / "header")


def write_outline(header: GGUFWriter, tensors: Sequence[SourceTensor], plan: TypePlan, path: Path) -> int:
    """Write the header of a file, and data of zeros that take no room on the disk: what llama.cpp looks at first.

    Returns:
        The size of the file to come, in bytes.
    """
    size = _write_header_alone(header, tensors, plan, path)
    size += GGUFWriter.ggml_pad(size, header.data_alignment) - size + _data_bytes(header)
    os.truncate(path, size)
    return size


def _write_header_alone(header: GGUFWriter, tensors: Sequence[SourceTensor], plan: TypePlan, path: Path) -> int:
    """Returns its length in bytes. `header` is as it was."""
    _list_tensors(header, tensors, plan)
    _write_header(header, path)
    header.close()
    header.fout = None
    header.state = WriterState.NO_FILE
    return path.stat().st_size


def _data_bytes(header: GGUFWriter) -> int:
    return sum(GGUFWriter.ggml_pad(info.nbytes, header.data_alignment) for info in header.tensors[0].values())


def _list_tensors(header: GGUFWriter, tensors: Sequence[SourceTensor], plan: TypePlan) -> None:
    header.tensors = [{}]
    for tensor in tensors:
        qtype = plan.type_of(tensor)
        header.add_tensor_info(
            tensor.name,
            quant_shape_to_byte_shape(tensor.shape, qtype),
            np.dtype(np.uint8),
            n_bytes(tensor.shape, qtype),
            raw_dtype=qtype,
        )


def _write_file(
    header: GGUFWriter,
    tensors: Sequence[SourceTensor],
    plan: TypePlan,
    partial: Path,
    encoder: Encoder,
    progress: Progress,
) -> list[StoredTensor]:
    _write_header(header, partial)
    assert header.fout is not None
    file = header.fout[0]
    header.write_padding(file, file.tell())

    stored = []
    for tensor in tensors:
        info = header.tensors[0][tensor.name]
        planned_bytes = info.nbytes
        data, outcome = _store(tensor, info.dtype, plan, encoder)
        info.dtype, info.nbytes = outcome.qtype, outcome.n_bytes
        file.write(data.data)
        header.write_padding(file, outcome.n_bytes)
        stored.append(outcome)
        progress(tensor.name, planned_bytes)

    file.seek(0)
    header.state = WriterState.EMPTY
    _write_header(header, partial)
    os.fsync(file.fileno())
    return stored


def _write_header(header: GGUFWriter, path: Path) -> None:
    header.write_header_to_file(path)
    header.write_kv_data_to_file()
    header.write_ti_data_to_file()


def _store(
    tensor: SourceTensor, planned: GGMLQuantizationType, plan: TypePlan, encoder: Encoder
) -> tuple[np.ndarray, StoredTensor]:
    """The bytes of a tensor, uint8 (bytes,), and what became of it."""
    values = tensor.load()
    if values.dtype.kind in "iu":  # stored as it is: integers, or blocks that the checkpoint brought
        as_it_is = Encoded(np.ascontiguousarray(values).view(np.uint8).ravel(), 0.0, 0.0)
        return as_it_is.data, _outcome(tensor, planned, as_it_is)

    wanted = plan.wanted(tensor)
    reason = None
    if planned is not wanted:
        reason = f"its rows of {tensor.shape[-1]} weights are no multiple of {wanted.name}'s block"
    # what llama.cpp wants in a type of its own, it does not take in blocks
    fallback = (plan.fallback_of(tensor),) if tensor.kept_type is None else ()
    try:
        for qtype in dict.fromkeys((planned, *fallback, GGMLQuantizationType.F32)):
            try:
                encoded = encoder.encode(tensor, values, qtype)
                return encoded.data, _outcome(tensor, qtype, encoded, reason)
            except RangeError as error:
                reason = reason or str(error)
    except NotFiniteError as error:
        index = tuple(int(i) for i in np.unravel_index(error.index, tensor.shape))
        value = values[index]
        raise TritError(
            f"tensor {tensor.name} holds {value} at {list(index)}: the checkpoint is damaged or was saved "
            "mid-training; no such weight can be quantized"
        ) from None
    raise AssertionError("every finite weight fits into F32")


def _outcome(
    tensor: SourceTensor, qtype: GGMLQuantizationType, encoded: Encoded, fallback: str | None = None
) -> StoredTensor:
    n_weights = int(np.prod(tensor.shape))
    return StoredTensor(tensor.name, tensor.kind, n_weights, qtype, len(encoded.data), encoded.relative_error, fallback)
