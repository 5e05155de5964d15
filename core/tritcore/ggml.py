"""ggml's own encoders and decoders, from the installed llama-cpp-python: the reference in C, and the fastest on a CPU.

`gptq_quantize` and `gptq_descend` work on transposed rows of blocks: float32 (64, rows), the scales of groups
(4, rows). These arrays may be parts `array[:, first:last]` of larger ones, so that threads can share the rows of one.

The library is loaded by itself: it needs neither a backend nor a model. Calls let go of Python's lock, so threads work
at the same time.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")


def quantize(weights: np.ndarray, qtype: GGMLQuantizationType, importance: np.ndarray | None = None) -> np.ndarray:
    """Encode rows as llama-quantize does.

    Args:
        weights: float32 (rows, n), n a multiple of the type's block size.
        qtype: any type that ggml can quantize to.
        importance: float32 (n,), the weight of each column's squared errors; None leaves it to the type. The IQ1 and
            IQ2 types do not go without.

    Returns:
        uint8 (rows, bytes per row). TRIT blocks that cannot hold their weights fail validation.
    """
    n_rows, n_per_row = weights.shape
    block, size = GGML_QUANT_SIZES[qtype]
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    data = np.zeros((n_rows, n_per_row // block * size), dtype=np.uint8)
    _library().ggml_quantize_chunk(
        ctypes.c_int(qtype),
        _pointer(weights),
        _pointer(data),
        ctypes.c_int64(0),
        ctypes.c_int64(n_rows),
        ctypes.c_int64(n_per_row),
        None if importance is None else _pointer(np.ascontiguousarray(importance, dtype=np.float32)),
    )
    return data


def dequantize(data: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    """Decode rows, to the values that gguf-py has for them, in less time.

    Args:
        data: blocks, uint8 (..., bytes per row); of a type without blocks, values (..., n).

    Returns:
        float32 (..., n), of finite values: those of damaged blocks may be anything.

    Raises:
        NotImplementedError: ggml has no decoder for the type.
    """
    block, size = GGML_QUANT_SIZES[qtype]
    if block == 1:
        return quants.dequantize(data, qtype)
    decode = _library().ggml_get_type_traits(ctypes.c_int(qtype)).contents.to_float
    if not decode:
        raise NotImplementedError(f"{qtype.name} has no decoder")
    data = np.ascontiguousarray(data)
    values = np.empty((*data.shape[:-1], data.shape[-1] // size * block), dtype=np.float32)
    decode(_pointer(data), _pointer(values), values.size)
    return values


class Reach(ctypes.Structure):
    """How well a TRIT type reaches down to some rows, as `struct ggml_trit_reach` has it."""

    _fields_ = (("energy", ctypes.c_double), ("excess", ctypes.c_double))
    energy: float
    excess: float


def measure_reach(weights: np.ndarray, depth: int) -> Reach:
    """Measure how well the TRIT type of a depth reaches down to float32 (rows, n), n a multiple of 64."""
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    reach = Reach()
    _library().ggml_trit_measure_reach(
        ctypes.c_int(depth),
        _pointer(weights),
        ctypes.c_int64(weights.size // BLOCK_SIZE),
        ctypes.byref(reach),
    )
    return reach


def reaches(depth: int, parts: Sequence[Reach]) -> bool:
    """Whether the TRIT type of a depth reaches down to a tensor, by the rule of docs/reference/format.md."""
    whole = Reach(sum(part.energy for part in parts), sum(part.excess for part in parts))
    return bool(_library().ggml_trit_reaches(ctypes.c_int(depth), ctypes.byref(whole)))


class Columns:
    """The statistics of a block of 64 columns for gptq, given other columns."""

    def __init__(self, feedback: np.ndarray, importance: np.ndarray, hessian: np.ndarray, inverse: np.ndarray) -> None:
        """Copy.

        Args:
            feedback: (64, 64), read above the diagonal: [i, j] is the share of the error of column i that goes into
                column j.
            importance: (64,), the weights of squared errors in the search of scales.
            hessian: (64, 64), symmetric.
            inverse: (64, 64), of the Hessian.
        """
        arrays = (feedback, importance, hessian, inverse)
        self._arrays = [np.array(array, dtype=np.float32, order="C") for array in arrays]
        self.struct = _Columns(*map(_pointer, self._arrays))


def gptq_quantize(
    depth: int, columns: Columns, aims: np.ndarray, values: np.ndarray, scales: np.ndarray, indexes: np.ndarray
) -> int | None:
    """Search the scales of a block of columns, then quantize column after column.

    Column j is rounded to the multiple of its scale that is nearest to its aim plus the sum over the columns i before
    of feedback[i, j] times the error of column i, its aim less its value. All CPUs give the same bits, and so does any
    split of the rows.

    Args:
        depth: trits per weight, 1..4.
        columns: the statistics of the columns.
        aims: float32 (64, rows), the weights, with the feedback of other blocks.
        values: float32 (64, rows), output.
        scales: float32 (4, rows), output, the scale of each group.
        indexes: uint8 (rows, 4), contiguous, output, the scale indexes.

    Returns:
        The first row that is not finite or above the range of the scales, None if there is none. The output of this row
        and of later ones is undefined.
    """
    refused = _library().ggml_trit_gptq_quantize(
        ctypes.c_int(depth),
        ctypes.c_int64(aims.shape[1]),
        ctypes.byref(columns.struct),
        ctypes.byref(_Matrix.of(aims)),
        ctypes.byref(_Matrix.of(values)),
        ctypes.byref(_Scales(_Matrix.of(scales), _pointer(indexes))),
    )
    return None if refused < 0 else int(refused)


def gptq_descend(
    depth: int,
    columns: Columns,
    gradient: np.ndarray,
    values: np.ndarray,
    scales: np.ndarray,
    indexes: np.ndarray,
    *,
    search: bool,
) -> int | None:
    """Coordinate descent: move each column in turn to the multiple of its scale of least error, given all others.

    With `search`, other scales are tried too: those for the values that are best without rounding, quantized as by
    `gptq_quantize`, with a descent of their own. A row takes them where its error gets less.

    Args:
        depth: trits per weight, 1..4.
        columns: the statistics of the columns, given all others.
        gradient: float32 (64, rows), half the gradient of the squared error of the products.
        values: float32 (64, rows), changed.
        scales: float32 (4, rows), changed where `search` finds better ones.
        indexes: uint8 (rows, 4), contiguous, changed with the scales.
        search: whether to try other scales.

    Returns:
        The first row whose values are not finite, None if there is none. This row and later ones may be unchanged.
    """
    refused = _library().ggml_trit_gptq_descend(
        ctypes.c_int(depth),
        ctypes.c_int64(values.shape[1]),
        ctypes.byref(columns.struct),
        ctypes.c_bool(search),
        ctypes.byref(_Matrix.of(gradient)),
        ctypes.byref(_Matrix.of(values)),
        ctypes.byref(_Scales(_Matrix.of(scales), _pointer(indexes))),
    )
    return None if refused < 0 else int(refused)


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class _Matrix(ctypes.Structure):
    """`struct ggml_trit_gptq_matrix`."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))

    @classmethod
    def of(cls, array: np.ndarray) -> "_Matrix":
        """Of float32 (columns, rows), rows side by side. It does not keep the array alive."""
        if array.dtype != np.float32 or (array.shape[1] > 1 and array.strides[1] != array.itemsize):
            raise ValueError("the array is not float32, or its rows do not lie side by side")
        return cls(array.ctypes.data, array.strides[0] // array.itemsize)


class _Scales(ctypes.Structure):
    """`struct ggml_trit_gptq_scales`."""

    _fields_ = (("scale", _Matrix), ("indexes", ctypes.c_void_p))


class _Columns(ctypes.Structure):
    """`struct ggml_trit_gptq_columns`."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("feedback", "importance", "hessian", "inverse"))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def library_path() -> Path:
    """The file that has the encoders. Raises TritError if it is not installed."""
    bindings = importlib.util.find_spec("llama_cpp")
    if bindings is None or bindings.origin is None:
        raise TritError("llama-cpp-python is not installed; `make` builds and installs it")
    return Path(bindings.origin).parent / "lib" / f"libggml-base.{_SUFFIX}"


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise TritError(f"{path} cannot be loaded ({error}); `make build` installs it") from error
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_trit_measure_reach.restype = None
    library.ggml_trit_reaches.restype = ctypes.c_bool
    library.ggml_trit_gptq_quantize.restype = ctypes.c_int64
    library.ggml_trit_gptq_descend.restype = ctypes.c_int64
    return library
