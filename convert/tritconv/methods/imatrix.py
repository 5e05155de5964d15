"""The `imatrix` method: the search, weighted by what llama-imatrix measured: the mean square of each input."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tritconv.errors import TritError
from tritconv.methods import search
from tritconv.model_file import ModelFile, Tensor, read_model_file
from tritconv.plan import SourceTensor
from tritconv.workers import Chunk, Workers

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_LISTED = 8


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Read an imatrix file of llama.cpp, in its GGUF format.

    Returns:
        For each GGUF tensor name float32 (matrices, n): the importance of each column, as llama-quantize takes it. A
        tensor of experts has a matrix for each; one that saw no token has ones.

    Raises:
        TritError: the file cannot be read, or is no imatrix.
    """
    _refuse_old_format(path)
    model = read_model_file(path)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        raise TritError(f"{path} holds no importances: make an imatrix with llama-imatrix -m F16.gguf -f TEXT -o FILE")
    missing = next((name for name in names if name + _COUNTS not in tensors), None)
    if missing is not None:
        raise TritError(f"{path}: damaged: {missing} has sums but no counts; make it again with llama-imatrix")
    return {name: _importance(model, name, tensors[name + _SUMS], tensors[name + _COUNTS]) for name in names}


def _refuse_old_format(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:  # what cannot be read is for `read_model_file` to say
        if file.read(4) != b"GGUF":
            raise TritError(
                f"{path} is no imatrix in GGUF format; one of the old format becomes one by "
                f"llama-imatrix -m MODEL.gguf --in-file {path} -o {path.with_suffix('.gguf').name}"
            )


def _importance(model: ModelFile, name: str, sums_entry: Tensor, counts_entry: Tensor) -> np.ndarray:
    sums, counts = _float32(model, sums_entry), _float32(model, counts_entry)
    if not len(sums) or not len(counts) or len(sums) % len(counts):
        raise _damaged(model, name, f"{len(sums)} sums for {len(counts)} counts")
    for values in (sums, counts):
        if not np.isfinite(values).all() or (values < 0).any():
            raise _damaged(model, name, "a value is negative or not finite")
    counts = np.rint(counts)[:, None]
    seen = counts > 0
    return np.where(seen, sums.reshape(len(counts), -1) / np.where(seen, counts, 1), np.float32(1))


def _float32(model: ModelFile, tensor: Tensor) -> np.ndarray:
    if tensor.type is not GGMLQuantizationType.F32:
        raise _damaged(model, tensor.name, f"the type is {tensor.type.name}, not F32")
    data = np.fromfile(model.path, dtype=np.uint8, count=tensor.n_bytes, offset=model.data_start + tensor.offset)
    return data.view("<f4")


def _damaged(model: ModelFile, name: str, what: str) -> TritError:
    return TritError(f"{model.path}: damaged: {name}: {what}; make it again with llama-imatrix")


class Imatrix:
    """The search, weighted by the importance of each column. Without it, matrices go by the plain search."""

    name = "imatrix"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._importance = read_imatrix(path)
        self._missing: list[str] = []
        self._unseen: list[str] = []

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        importance = self._importance_of(tensor)

        def blocks(chunk: Chunk) -> np.ndarray:
            return search.quantize(chunk.rows, depth, None if importance is None else importance[chunk.matrix])

        return np.concatenate(workers.map(blocks, values))

    def _importance_of(self, tensor: SourceTensor) -> np.ndarray | None:
        importance = self._importance.get(tensor.name)
        if importance is None:
            self._missing.append(tensor.name)
            return None
        wanted = (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        if importance.shape != wanted:
            raise TritError(
                f"{self._path} is of another model: it has {_size(importance.shape)} importances for {tensor.name}, "
                f"which needs {_size(wanted)}"
            )
        unseen = int((importance == 1).all(axis=1).sum())
        if unseen:
            self._unseen.append(f"{unseen} of {len(importance)} in {tensor.name}")
        return importance

    def remarks(self) -> list[str]:
        remarks = []
        if self._missing:
            remarks.append(f"without importances, so by plain search: {_listed(self._missing)}")
        if self._unseen:
            remarks.append(f"experts that saw no token, so all columns alike: {_listed(self._unseen)}")
        return remarks


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_LISTED} more" if len(items) > _MOST_LISTED else ""
    return ", ".join(items[:_MOST_LISTED]) + more
