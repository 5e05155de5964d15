"""The weights of a GGUF file for a model of the transformers library, a tensor at a time.

The library's own loader dequantizes all tensors of a file into memory. Here it is given some of the tensors at a time.
"""

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tritconv.calibration.stored import OpenFile, runs
from tritcore import ggml

_LAYER = re.compile(r"\bblk\.(\d+)\.")
_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LOCK = threading.RLock()  # the library's loader is given other parts while it runs


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within this context, a module has another value by this name."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class GgufWeights:
    """A GGUF file, and the library's loader of it."""

    def __init__(self, path: str, model: Any, load: Callable[..., dict[str, Any]], dtype: torch.dtype) -> None:
        """Read the header.

        Args:
            model: of the transformers library, on the meta device.
            load: `load_gguf_checkpoint` of the library.
            dtype: that the library gives the weights.
        """
        import gguf
        from transformers import modeling_gguf_pytorch_utils as library

        self._path, self._model, self._load, self._dtype = path, model, load, dtype
        reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor._replace(data=_Shape(tensor.data)) for tensor in reader.tensors}
        self._fields = {
            key: field._replace(parts=list(map(np.array, field.parts)))  # copies: the file does not stay mapped
            for key, field in reader.fields.items()
            if not key.startswith("tokenizer.")  # the loader would read it again at each call
        }
        self._file = OpenFile.of(Path(path))
        self._library = library
        self._names: Mapping[str, str] | None = None

    def state_dict(self) -> "dict[str, GgufTensor]":
        """All weights of the model that the file has, by the model's names of them."""
        groups: dict[str, list[str]] = defaultdict(list)  # tensors of a layer, or one outside them
        for name in self._tensors:
            match = _LAYER.search(name)
            groups[match[0] if match else name].append(name)
        known: dict[tuple[Any, ...], tuple[str, dict[str, GgufTensor]]] = {}  # layers of the same shapes are alike
        found: dict[str, GgufTensor] = {}
        for group, names in groups.items():
            signature = tuple((name.replace(group, "", 1), self._tensors[name].data.shape) for name in sorted(names))
            if group in self._tensors or signature not in known:
                made = self._examine(names)
                known[signature] = group, made
                found |= made
            else:
                other, made = known[signature]
                number = group.removeprefix("blk.").rstrip(".")
                for key, tensor in made.items():
                    mine = _FIRST_NUMBER.sub(number, key, count=1)
                    sources = tuple(name.replace(other, group, 1) for name in tensor.sources)
                    found[mine] = GgufTensor(self, mine, sources, tensor.shape, tensor.dtype, tensor.has_rows)
        return found

    def _examine(self, names: Sequence[str]) -> "dict[str, GgufTensor]":
        """What the loader makes of some tensors."""
        sources: dict[str, list[str]] = defaultdict(list)
        about: dict[str, tuple[tuple[int, ...], torch.dtype, bool]] = {}
        for name in names:
            data = self._tensors[name].data
            if len(data.shape) == 2 and _LAYER.search(name) is None:  # may be large: a row shows it
                made = self.produce([name], range(1))
                if all(values.dim() == 2 and len(values) == 1 for values in made.values()):
                    for key, values in made.items():
                        sources[key].append(name)
                        about[key] = (data.shape[0], values.shape[1]), values.dtype, True
                    continue
            for key, values in self.produce([name]).items():
                sources[key].append(name)
                about[key] = tuple(values.shape), values.dtype, False
        return {key: GgufTensor(self, key, tuple(sources[key]), *about[key]) for key in about}

    def produce(self, names: Sequence[str], rows: Sequence[int] | range | None = None) -> dict[str, torch.Tensor]:
        """What the loader makes of some tensors, or of some rows of them, by the model's names."""
        import gguf

        tensors = [self._tensors[name] for name in names]
        tensors = [tensor._replace(data=self._read(tensor, rows)) for tensor in tensors]
        reader = _Reader(self._fields, tensors)
        with _LOCK:
            mapping = self._library.get_gguf_hf_weights_map

            def names_once(*args: Any, **kwargs: Any) -> Mapping[str, str]:
                if self._names is None:
                    with replaced(self._library, "get_gguf_hf_weights_map", mapping):  # it calls itself
                        self._names = mapping(*args, **kwargs)
                return self._names

            with (
                replaced(gguf, "GGUFReader", lambda _: reader),
                replaced(gguf, "dequantize", ggml.dequantize),
                replaced(self._library, "get_gguf_hf_weights_map", names_once),
                replaced(self._library, "tqdm", lambda tensors, **_: tensors),  # a progress bar for each tensor
            ):
                loaded = self._load(self._path, return_tensors=True, model_to_load=self._model, torch_dtype=self._dtype)
        tensors_by_name: dict[str, torch.Tensor] = loaded["tensors"]
        return tensors_by_name

    def _read(self, tensor: Any, rows: Sequence[int] | range | None) -> np.ndarray:
        """The data of a tensor, or rows of it, as the reader of gguf-py has it."""
        shape, dtype = tensor.data.shape, tensor.data.dtype
        if rows is None:
            return self._file.read(tensor.data_offset, tensor.n_bytes).view(dtype).reshape(shape)
        row = tensor.n_bytes // shape[0]
        parts = [self._file.read(tensor.data_offset + first * row, count * row) for first, count in runs(rows)]
        return np.concatenate(parts).view(dtype).reshape(len(rows), *shape[1:])


class _Shape:
    """Of an array that is not read: its shape and type."""

    def __init__(self, data: np.ndarray) -> None:
        self.shape: tuple[int, ...] = data.shape
        self.dtype = data.dtype


@dataclass(frozen=True)
class _Reader:
    """What the library's loader asks a reader of gguf-py for."""

    fields: Mapping[str, Any]
    tensors: Sequence[Any]


@dataclass(frozen=True)
class GgufTensor:
    """A weight of the model, made of tensors of a GGUF file.

    Attributes:
        name: the model's.
        sources: names of the file's tensors.
        has_rows: whether a row of it is a row of the only source.
    """

    weights: GgufWeights
    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_rows: bool

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _: object) -> torch.Tensor:
        return self.weights.produce(self.sources)[self.name]

    def rows(self, numbers: Sequence[int] | range) -> torch.Tensor:
        if not self.has_rows:
            return self[...][torch.as_tensor(list(numbers))]
        return self.weights.produce(self.sources, numbers)[self.name]
