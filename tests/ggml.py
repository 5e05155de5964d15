"""The installed ggml libraries through ctypes: what the Python codec and the kernels are compared with."""

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import numpy as np

from tritcore.errors import TritError
from tritcore.format import BLOCK_SIZE, BYTES_PER_BLOCK
from tritrun import variants

_SUFFIX = "dylib" if sys.platform == "darwin" else "so"
Q8_0_BLOCK = 32
Q8_0_BYTES = 34  # a float16 scale and 32 int8


def folder() -> Path:
    """The folder of the installed llama_cpp package."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None, "llama-cpp-python is not installed: make build"
    assert spec.origin is not None
    return Path(spec.origin).parent


def tool(name: str) -> Path:
    """One of llama.cpp's programs."""
    return folder() / "bin" / name


@cache
def base() -> ctypes.CDLL:
    """The library with the reference of the types."""
    return ctypes.CDLL(str(folder() / "lib" / f"libggml-base.{_SUFFIX}"))


@cache
def cpu(variant: str | None = None) -> ctypes.CDLL:
    """The library with the kernels, in one of `tritrun.variants.runnable()`; None for the best of them."""
    loaded = ctypes.CDLL(str(variants.modules()[variant or variants.runnable()[0]]))
    loaded.ggml_cpu_init()  # fills the table that converts float16
    return loaded


def runnable() -> list[str]:
    """The variants of the CPU code that run here; none where llama.cpp is not compiled, so that tests can be listed."""
    try:
        return variants.runnable()
    except TritError:
        return []


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def quantize(depth: int, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 (n, bytes): blocks of float32 (n, 64) by the reference in C; each row is one block."""
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    out = np.zeros((len(weights), BYTES_PER_BLOCK[depth]), dtype=np.uint8)
    function = getattr(base(), f"quantize_trit{depth}")
    function.restype = ctypes.c_size_t
    # one row of all blocks: each has its own importance
    n_per_row = ctypes.c_int64(weights.size)
    written = function(_pointer(weights), _pointer(out), ctypes.c_int64(1), n_per_row, _pointer(importance))
    assert written == out.nbytes
    return out


def kernels() -> list[str]:
    """The kernels of the search and of gptq that run here, the best first; none where llama.cpp is not compiled."""
    if not runnable():
        return []
    names = [name for name in ("avx512", "avx2", "plain") if base().ggml_trit_use_kernels(name.encode())]
    use_kernels(None)
    return names


def use_kernels(name: str | None) -> None:
    """Take one of `kernels()` from now on, the best for None."""
    function = base().ggml_trit_use_kernels
    function.restype = ctypes.c_bool
    assert function(None if name is None else name.encode())


def search(
    depth: int, weights: np.ndarray, importance: np.ndarray | None, *, reference: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Scale indexes uint8 (n, 4) of blocks float32 (n, 64), and bool (n,), whether the type can hold each.

    Args:
        depth: trits per weight.
        weights: of the blocks.
        importance: float32 (n, 64), or None.
        reference: by the search of single blocks in place of the kernels.
    """
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    importance = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    indexes, found = np.zeros((len(weights), 4), np.uint8), np.zeros(len(weights), bool)
    function = base().ggml_trit_search_ref if reference else base().ggml_trit_search
    function(
        ctypes.c_int(depth),
        ctypes.c_int64(len(weights)),
        _pointer(weights),
        _pointer(importance),
        _pointer(indexes),
        _pointer(found),
    )
    return indexes, found


def dequantize(depth: int, data: np.ndarray) -> np.ndarray:
    """float32 (n, 64): the weights of blocks uint8 (n, bytes)."""
    out = np.zeros((len(data), BLOCK_SIZE), dtype=np.float32)
    function = getattr(base(), f"dequantize_row_trit{depth}")
    function(_pointer(np.ascontiguousarray(data)), _pointer(out), ctypes.c_int64(out.size))
    return out


def validate(depth: int, data: np.ndarray) -> bool:
    """Whether ggml takes the blocks."""
    function = base().ggml_validate_row_data
    function.restype = ctypes.c_bool
    return bool(function(ctypes.c_int(84 + depth), _pointer(data), ctypes.c_size_t(data.nbytes)))


def vec_dot(
    depth: int, data: np.ndarray, activations: np.ndarray, *, generic: bool = False, variant: str | None = None
) -> float:
    """Dot product of blocks uint8 (n, bytes) with Q8_0 activations uint8 (2 n, 34), by one variant of the kernels."""
    suffix = "_generic" if generic else ""
    function = getattr(cpu(variant), f"ggml_vec_dot_trit{depth}_q8_0{suffix}")
    out = ctypes.c_float(float("nan"))
    zero = ctypes.c_size_t(0)
    function(
        ctypes.c_int(len(data) * BLOCK_SIZE),
        ctypes.byref(out),
        zero,
        _pointer(data),
        zero,
        _pointer(activations),
        zero,
        ctypes.c_int(1),
    )
    return out.value


def q8_0(scale: np.ndarray, values: np.ndarray) -> np.ndarray:
    """uint8 (n, 34): Q8_0 blocks of scales float16 (n,) and values int8 (n, 32)."""
    halves = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([halves, values.view(np.uint8)], axis=1)
