"""What a conversion starts from: a model as plain data, with tensors that are read when they are needed."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from tritconv.sources.weights import find_weights
from tritcore.gguf_header import parts_of, read_model_file

_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
_FIRST = ("token_embd", "position_embd", "token_types", "per_layer_")  # names of tensors that come before the layers
_LAYER = re.compile(r"(?P<stack>(?:.*\.)?)blk\.(?P<number>\d+)\.")


class Kind(Enum):
    """What a tensor is, as far as its type goes."""

    MATRIX = "layers"
    EMBEDDING = "embeddings"
    OUTPUT = "lm_head"
    KEPT = "norms, other"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor to convert.

    Attributes:
        shape: row length last.
        load: reads the values, each time it is called: float16 or float32 of `shape`; for a KEPT tensor the values or
            bytes to store. Nothing of them stays in memory once the caller forgets them.
        kept_type: the type of a KEPT tensor.
        load_sample: reads some rows of each matrix of the tensor, one in so many as it is told: float16 or float32
            (matrices, rows, n). None: `load` is the only way.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    load: Callable[[], np.ndarray]
    kept_type: GGMLQuantizationType | None = None
    load_sample: Callable[[int], np.ndarray] | None = None

    def sample(self, step: int) -> np.ndarray:
        """One in `step` of the rows of each matrix: float16 or float32 (matrices, rows, n)."""
        if self.load_sample is not None:
            return self.load_sample(step)
        return self.load().reshape(-1, *self.shape[-2:])[:, ::step]


@dataclass(frozen=True)
class Value:
    """A metadata value of a GGUF file.

    Attributes:
        value: an int, float, bool, str or bytes, or a list of these.
        element_type: of an array; None leaves it to gguf-py, which asks the first element.
    """

    value: Any
    type: GGUFValueType
    element_type: GGUFValueType | None = None


@dataclass(frozen=True)
class Origin:
    """Where the model is: a folder that the transformers library reads, or a GGUF file in it."""

    folder: Path
    gguf_file: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.gguf_file or self.folder.resolve().name

    def files(self) -> list[Path]:
        """All files that determine the model."""
        if self.gguf_file is not None:
            return [part.path for part in parts_of(read_model_file(self.folder / self.gguf_file))]
        beside = (path for pattern in _BESIDE_WEIGHTS for path in self.folder.glob(pattern) if path.is_file())
        return [*find_weights(self.folder), *beside]


@dataclass(frozen=True)
class Source:
    """A model to convert.

    Attributes:
        name: for people, and for `trit.source` in the file.
        architecture: as llama.cpp calls it.
        metadata: of the file to write, without `general.architecture` and without keys that say how it is quantized.
        tensors: in the order of the file to write.
        origin: where the transformers library finds the same model.
        revision: the commit of a model from the hub; None for local files.
    """

    name: str
    architecture: str
    metadata: Mapping[str, Value]
    tensors: tuple[SourceTensor, ...]
    origin: Origin
    revision: str | None = None


def kind_of(name: str) -> Kind:
    """The kind of a matrix, by its GGUF name: matrices outside the layers are stored as embeddings are."""
    if name == "output.weight":
        return Kind.OUTPUT
    return Kind.MATRIX if "blk." in name else Kind.EMBEDDING


def in_file_order(tensors: Iterable[SourceTensor]) -> tuple[SourceTensor, ...]:
    """Tensors in the order of the file: inputs of the model, then the layers by number, then all others.

    Where that says nothing, the given order stays. Layers come in the order in which a calibration finishes them.
    """
    stacks: dict[str, int] = {}

    def place(tensor: SourceTensor) -> tuple[int, int, int]:
        if (found := _LAYER.match(tensor.name)) is not None:
            return 1, stacks.setdefault(found["stack"], len(stacks)), int(found["number"])
        return (0 if tensor.name.startswith(_FIRST) else 2), 0, 0

    return tuple(sorted(tensors, key=place))
