"""Which tensor is stored in which type."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tritcore.errors import TritError
from tritcore.gguf_types import DEPTH_OF_TYPE, TRIT_TYPE


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
class TypeRule:
    """A type for the tensors whose GGUF name has a match of a pattern."""

    pattern: re.Pattern[str]
    qtype: GGMLQuantizationType


@dataclass(frozen=True)
class TypePlan:
    """The types that tensors should have. `single` is for tensors by name, before what goes by their kind."""

    depth: int
    embedding: GGMLQuantizationType
    output: GGMLQuantizationType
    fallback: GGMLQuantizationType
    single: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)

    def with_rules(self, rules: Iterable[TypeRule], tensors: Sequence[SourceTensor]) -> "TypePlan":
        """The plan for `tensors` with rules on top; later ones win.

        Raises:
            TritError: a rule is for no matrix.
        """
        single = dict(self.single)
        for rule in rules:
            names = [t.name for t in tensors if t.kept_type is None and rule.pattern.search(t.name)]
            if not names:
                raise TritError(
                    f"no matrix of the model has a name like {rule.pattern.pattern!r}: see tritconv inspect"
                )
            single |= dict.fromkeys(names, rule.qtype)
        return replace(self, single=single)

    def with_types(self, types: Mapping[str, GGMLQuantizationType], tensors: Iterable[SourceTensor]) -> "TypePlan":
        """The plan with types for single tensors; its depth becomes that of most weights."""
        plan = replace(self, single={**self.single, **types})
        weights: Counter[int] = Counter()
        for tensor in tensors:
            if (depth := DEPTH_OF_TYPE.get(plan.wanted(tensor))) is not None:
                weights[depth] += math.prod(tensor.shape)
        return replace(plan, depth=weights.most_common(1)[0][0] if weights else self.depth)

    def exceptions(self, tensors: Iterable[SourceTensor]) -> list[str]:
        """NAME=TYPE for each tensor whose type is not that of its kind; TRIT types are a number, the depth."""
        return [
            f"{tensor.name}={DEPTH_OF_TYPE.get(qtype) or qtype.name.lower()}"
            for tensor in tensors
            if (qtype := self.wanted(tensor)) is not replace(self, single={}).wanted(tensor)
        ]

    def wanted(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type that a tensor should have."""
        if tensor.kept_type is not None:
            return tensor.kept_type
        of_kind = {
            Kind.MATRIX: TRIT_TYPE[self.depth],
            Kind.EMBEDDING: self.embedding,
            Kind.OUTPUT: self.output,
        }
        return self.single.get(tensor.name, of_kind[tensor.kind])

    def type_of(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type of a tensor; where its rows do not fit into blocks, the fallback, then F16."""
        wanted = self.wanted(tensor)
        return wanted if fits(tensor, wanted) else self.fallback_of(tensor)

    def fallback_of(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type of a tensor that its own type cannot hold."""
        return self.fallback if fits(tensor, self.fallback) else GGMLQuantizationType.F16


def fits(tensor: SourceTensor, qtype: GGMLQuantizationType) -> bool:
    """Whether the rows of a tensor are whole blocks of a type."""
    return tensor.shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0


def kind_of(name: str) -> Kind:
    """The kind of a matrix, by its GGUF name: matrices outside the layers are stored as embeddings are."""
    if name == "output.weight":
        return Kind.OUTPUT
    return Kind.MATRIX if "blk." in name else Kind.EMBEDDING
