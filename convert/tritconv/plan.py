"""Which tensor is stored in which type."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tritconv.gguf_types import TRIT_TYPE


class Kind(Enum):
    """What a tensor is, as far as its type goes."""

    MATRIX = "layers"
    EMBEDDING = "embeddings"
    OUTPUT = "lm_head"
    KEPT = "norms, other"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor to convert.

    shape: row length last.
    load: reads it: float16 or float32 of `shape`; for a KEPT tensor the values or bytes to store.
    kept_type: the type of a KEPT tensor.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    load: Callable[[], np.ndarray]
    kept_type: GGMLQuantizationType | None = None


@dataclass(frozen=True)
class TypePlan:
    """The types the user asked for."""

    depth: int
    embedding: GGMLQuantizationType
    output: GGMLQuantizationType
    fallback: GGMLQuantizationType

    def wanted(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type that a tensor should have."""
        if tensor.kept_type is not None:
            return tensor.kept_type
        return {
            Kind.MATRIX: TRIT_TYPE[self.depth],
            Kind.EMBEDDING: self.embedding,
            Kind.OUTPUT: self.output,
        }[tensor.kind]

    def type_of(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type of a tensor; where its rows do not fit into blocks, the fallback, then F16."""
        wanted = self.wanted(tensor)
        return wanted if _fits(tensor, wanted) else self.fallback_of(tensor)

    def fallback_of(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type of a tensor that its own type cannot hold."""
        return self.fallback if _fits(tensor, self.fallback) else GGMLQuantizationType.F16


def _fits(tensor: SourceTensor, qtype: GGMLQuantizationType) -> bool:
    return tensor.shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0


def kind_of(name: str) -> Kind:
    """The kind of a matrix, by its GGUF name: matrices outside the layers are stored as embeddings are."""
    if name == "output.weight":
        return Kind.OUTPUT
    return Kind.MATRIX if "blk." in name else Kind.EMBEDDING
