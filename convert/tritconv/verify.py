"""`tritconv verify`: is a GGUF file sound: its header, its TRIT blocks, and no value NaN or infinite?"""

import errno
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tritconv.sources.gguf import not_a_model
from tritcore import loads
from tritcore.codec import invalid_blocks
from tritcore.console import byte_bar, one_line, out
from tritcore.errors import TritError
from tritcore.gguf_header import ModelFile, Tensor, parts_of, read_model_file
from tritcore.gguf_types import DEPTH_OF_TYPE

_CHUNK = 1 << 20  # bytes that a thread reads and checks at a time

# Where the floats of a block lie: their dtype, as integers; the bits of the exponent, which are all set in NaN and
# infinities; and for each type the places in bytes.
_PLACES: list[tuple[str, int, dict[str, tuple[int, ...]]]] = [
    ("<u4", 0x7F800000, {"F32": (0,), "Q8_K": (0,)}),
    ("<u8", 0x7FF0000000000000, {"F64": (0,)}),
    ("<u2", 0x7F80, {"BF16": (0,)}),
    ("u1", 0xFF, {"MXFP4": (0,)}),  # an exponent alone
    (
        "<u2",
        0x7C00,
        {
            **dict.fromkeys(("F16", "Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
            **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
            **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
            "Q2_K": (80, 82),
            "Q3_K": (108,),
            "Q6_K": (208,),
            "TQ1_0": (52,),
            "TQ2_0": (64,),
        },
    ),
]
_FLOATS = {
    GGMLQuantizationType[name]: (dtype, exponent, places)
    for dtype, exponent, types in _PLACES
    for name, places in types.items()
}
_WITHOUT_FLOATS = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "NVFP4")}


@dataclass(frozen=True)
class _Span:
    """Some blocks of a tensor: `first` is the number of the first of them, `start` their place in the file in bytes."""

    path: Path
    tensor: Tensor
    first: int
    start: int
    n_bytes: int


@dataclass
class _Faults:
    """The blocks of a tensor that are not as they should be."""

    count: int = 0
    first: int = 0

    def add(self, blocks: np.ndarray) -> None:
        if len(blocks):
            self.first = int(blocks[0]) if not self.count else self.first
            self.count += len(blocks)


def verify(paths: list[Path], threads: int) -> bool:
    """Check files, and write a line for each finding to stdout, or one that says that a file is sound.

    Returns:
        Whether all are.
    """
    sound = True
    for path in paths:
        found = faults(path, threads)
        for line in found or [f"{path}: ok"]:
            out.print(one_line(line), markup=False, soft_wrap=True)
        sound = sound and not found
    return sound


def faults(path: Path, threads: int) -> list[str]:
    """The `findings` of a GGUF file; if there are none, why llama.cpp would not load it. Shows progress."""
    with byte_bar() as progress:
        task = progress.add_task(one_line(path.name), total=None)
        found = findings(path, threads, lambda n_bytes, total: progress.update(task, advance=n_bytes, total=total))
        return found or _refusals(path)


def findings(path: Path, threads: int, advance: Callable[[int, int], None] = lambda n_bytes, total: None) -> list[str]:
    """What is wrong with a GGUF file of any type and name, and with the other parts if it is one of several.

    Args:
        advance: called after each chunk with its bytes and those of all tensors together.

    Returns:
        A line for each fault of the header, and for each tensor with a fault; none if the file is sound.
    """
    try:
        model = read_model_file(path)
    except TritError as error:
        return [str(error)]
    found = []
    try:
        parts = parts_of(model)
    except TritError as error:
        found.append(str(error))
        parts = (model,)
    total = sum(tensor.n_bytes for part in parts for tensor in part.tensors)
    for part in parts:
        found += [f"{part.path}: metadata key '{key}' is NaN" for key in _nan_keys(part)]
        try:
            found += _faults_of_tensors(part, threads, lambda n_bytes: advance(n_bytes, total))
        except OSError as error:
            found.append(f"{part.path}: cannot be read: {error.strerror}")
    return found


def _nan_keys(model: ModelFile) -> list[str]:
    return [key for key, value in model.metadata.items() if isinstance(value, float) and math.isnan(value)]


def _refusals(path: Path) -> list[str]:
    """Why llama.cpp would not load a sound file, if it is a model."""
    parts = parts_of(read_model_file(path))
    if not_a_model(parts) is not None:
        return []
    why = loads.refusal(parts[0].path)
    return [] if why is None else [f"{path}: llama.cpp would not load it: {why}"]


def _faults_of_tensors(model: ModelFile, threads: int, advance: Callable[[int], None]) -> list[str]:
    faults = {tensor.name: _Faults() for tensor in model.tensors}
    spans = list(_spans(model))
    pool = ThreadPoolExecutor(threads)
    try:
        for span, wrong in zip(spans, pool.map(_wrong_blocks, spans), strict=True):
            faults[span.tensor.name].add(wrong)
            advance(span.n_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    return [
        f"{model.path}: tensor '{tensor.name}': {_said(tensor, faults[tensor.name])}"
        for tensor in model.tensors
        if faults[tensor.name].count
    ]


def _said(tensor: Tensor, faults: _Faults) -> str:
    values = GGML_QUANT_SIZES[tensor.type][0] == 1
    what = f"{'value' if values else 'block'} {faults.first}"
    if faults.count > 1:
        what += f", as the first of {faults.count},"
    if tensor.type in DEPTH_OF_TYPE:
        return f"{what} is not {tensor.type.name} data"
    return f"{what} {'is' if values else 'has a scale that is'} NaN or infinite"


def _spans(model: ModelFile) -> Iterator[_Span]:
    for tensor in model.tensors:
        if tensor.type in _WITHOUT_FLOATS:
            continue
        size = GGML_QUANT_SIZES[tensor.type][1]
        step = max(1, _CHUNK // size) * size
        for start in range(0, tensor.n_bytes, step):
            place = model.data_start + tensor.offset + start
            yield _Span(model.path, tensor, start // size, place, min(step, tensor.n_bytes - start))


def _wrong_blocks(span: _Span) -> np.ndarray:
    """int64 (m,): the numbers of the blocks of a span that are not as they should be."""
    # not mapped: of a file that shrinks meanwhile, or cannot be read, that would be a signal
    data = np.fromfile(span.path, np.uint8, span.n_bytes, offset=span.start)
    if len(data) < span.n_bytes:
        raise OSError(errno.EIO, "it has become shorter meanwhile")
    size = GGML_QUANT_SIZES[span.tensor.type][1]
    return span.first + wrong_blocks(span.tensor.type, data.reshape(-1, size))


def wrong_blocks(qtype: GGMLQuantizationType, data: np.ndarray) -> np.ndarray:
    """The blocks that are no valid TRIT data, or hold a value or a scale that is NaN or infinite.

    Args:
        data: uint8 (n, bytes per block).

    Returns:
        int64 (m,): their indexes, in order.
    """
    if (depth := DEPTH_OF_TYPE.get(qtype)) is not None:
        return invalid_blocks(depth, data)
    if qtype in _WITHOUT_FLOATS:
        return np.empty(0, np.int64)
    if qtype is GGMLQuantizationType.IQ1_M:
        nibbles = data[:, 48:].view("<u2") >> 12  # the scale is spread over the upper nibbles of four words, low first
        floats = [nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12]
        exponent = 0x7C00
    else:
        dtype, exponent, places = _FLOATS[qtype]
        width = np.dtype(dtype).itemsize
        floats = [data[:, place : place + width].view(dtype)[:, 0] for place in places]
    wrong = np.zeros(len(data), bool)
    for bits in floats:
        wrong |= bits & bits.dtype.type(exponent) == exponent
    return np.flatnonzero(wrong)
