"""ggml's own encoders, from the installed llama-cpp-python: the reference in C, and the fastest on a CPU.

The library is loaded by itself: it needs neither a backend nor a model. Calls let go of Python's lock, so threads
encode at the same time.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

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
    """Whether the TRIT type of a depth reaches down to a tensor, given all its rows: docs/format.md has the rule."""
    whole = Reach(sum(part.energy for part in parts), sum(part.excess for part in parts))
    return bool(_library().ggml_trit_reaches(ctypes.c_int(depth), ctypes.byref(whole)))


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
    library.ggml_trit_measure_reach.restype = None
    library.ggml_trit_reaches.restype = ctypes.c_bool
    return library
