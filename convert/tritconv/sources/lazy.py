"""Reads the lazy tensors of llama.cpp's converter, each as often as wanted.

gguf-py's own evaluation keeps every value in the graph of operations, so a tensor stays in memory once it has been
read. This evaluation leaves the graph as it is.
"""

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gguf import LazyBase, LazyChunkedTensor
from gguf.utility import LocalTensor

from tritcore.errors import TritError, first_line

_FAULTS = (RuntimeError, ValueError, IndexError, AssertionError, OSError)  # of damaged or odd tensors
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

ReadLeaf = Callable[[Any], Any]  # of a node that is read from a file, the values or a part of them


class MappedTensor:
    """A tensor whose storage torch has mapped from a file. Its pages do not stay in memory after they are read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def read(self) -> torch.Tensor:
        """A copy of the values."""
        values = self._tensor.clone()
        if sys.platform == "linux":  # elsewhere the system forgets the pages when it needs the room
            start, n_bytes = self._tensor.data_ptr(), self._tensor.nbytes
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (start + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                libc = ctypes.CDLL(None)
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
        return values


class LazyLoad:
    """Reads a lazy tensor, or gives an array that is there already."""

    def __init__(self, name: str, lazy: Any) -> None:
        """Prepare.

        Args:
            name: of the tensor, for errors.
            lazy: a lazy tensor of gguf-py or of llama.cpp's `conversion` package, or an array or a tensor.
        """
        self._name = name
        self._lazy = lazy

    def __call__(self) -> np.ndarray:
        """The values. Raises TritError."""
        try:
            if isinstance(self._lazy, LazyChunkedTensor):
                return np.concatenate([chunk() for chunk in self._lazy._chunks]).reshape(self._lazy.shape)
            return _array(_evaluate(self._lazy))
        except _FAULTS as error:
            raise TritError(
                f"tensor {self._name} cannot be made of what the files hold: {first_line(error)}"
            ) from error

    def sample(self, shape: tuple[int, ...], step: int) -> np.ndarray:
        """One in `step` of the rows of each matrix of a tensor of `shape`: (matrices, rows, n).

        Where the converter takes matrices as the files have them, only these rows are read.

        Raises:
            TritError: the files are damaged.
        """
        rows = -(-shape[-2] // step)
        if all(_is_matrix_of_floats(leaf, shape[-1]) for leaf in _leaves(self._lazy)):
            try:
                some = _array(_evaluate(self._lazy, lambda leaf: _read(leaf)[..., ::step, :].clone()))
            except _FAULTS:
                pass  # the converter does something that takes all rows
            else:
                if some.shape == (*shape[:-2], rows, shape[-1]):
                    return some.reshape(-1, rows, shape[-1])
        return self().reshape(-1, *shape[-2:])[:, ::step]


def _array(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.detach().numpy()


def _is_leaf(node: LazyBase) -> bool:
    return node._data is not None or any(isinstance(one, LocalTensor | MappedTensor) for one in node._args)


def _read(leaf: LazyBase) -> Any:
    return leaf._data if leaf._data is not None else leaf._func(*leaf._args, **leaf._kwargs)


def _is_matrix_of_floats(leaf: LazyBase, n: int) -> bool:
    """Whether a leaf has rows of n floats."""
    return leaf._meta.ndim >= 2 and leaf._meta.shape[-1] == n and leaf._meta.dtype in _FLOATS


def _leaves(lazy: Any) -> list[LazyBase]:
    """The nodes of a graph that come from files, each once; none of what is no lazy tensor."""
    found: dict[int, LazyBase] = {}
    seen: set[int] = set()

    def visit(node: LazyBase) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            if _is_leaf(node):
                found[id(node)] = node
            else:
                LazyBase._recurse_apply(node._args, visit)

    LazyBase._recurse_apply(lazy, visit)
    return list(found.values())


def _evaluate(lazy: Any, read: ReadLeaf = _read) -> Any:
    """The value of a node, or of a value that is none. A value is kept only until its last use."""
    uses: Counter[int] = Counter()

    def count(node: LazyBase) -> None:
        uses[id(node)] += 1
        if uses[id(node)] == 1 and not _is_leaf(node):
            LazyBase._recurse_apply(node._args, count)

    values: dict[int, Any] = {}

    def value(node: LazyBase) -> Any:
        key = id(node)
        uses[key] -= 1
        if key in values:
            return values[key] if uses[key] else values.pop(key)
        if _is_leaf(node):
            made = read(node)
        else:
            assert node._func is not None
            made = node._func(*LazyBase._recurse_apply(node._args, value), **node._kwargs)
        if uses[key]:
            values[key] = made
        return made

    LazyBase._recurse_apply(lazy, count)
    return LazyBase._recurse_apply(lazy, value)
