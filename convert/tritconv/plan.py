"""Which tensor is stored in which type, and why."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tritconv.lattice import lattice_depth, sample_step
from tritconv.sources.source import Kind, SourceTensor
from tritcore.errors import TritError
from tritcore.gguf_types import DEPTH_OF_TYPE, TRIT_TYPE


@dataclass(frozen=True)
class TypeRule:
    """A type for the tensors whose GGUF name has a match of a pattern."""

    pattern: re.Pattern[str]
    qtype: GGMLQuantizationType


class Why(Enum):
    """Why a tensor has its type."""

    KIND = "the type of its kind"
    RULE = "a rule names it"
    LOSS = "it costs little for its size"
    KEPT = "llama.cpp wants it so"
    ROWS = "its rows are no multiple of the block of the type that it should have"


@dataclass(frozen=True)
class Choice:
    """What a plan says of a tensor.

    Attributes:
        wanted: the type that it should have.
        qtype: the type that it is stored in, as far as the shape tells. The values may need another one.
        why: why it has `qtype`.
        lattice: the depth of the trit lattice that its matrices seem to lie on; None if they lie on none, or if nobody
            looked.
    """

    wanted: GGMLQuantizationType
    qtype: GGMLQuantizationType
    why: Why
    lattice: int | None = None

    @property
    def depth(self) -> int | None:
        """Trits per weight; None for a type that is not TRIT."""
        return DEPTH_OF_TYPE.get(self.qtype)


@dataclass(frozen=True)
class Plan:
    """The types that tensors have in a file.

    Attributes:
        depth: trits per weight of the layers' matrices that nothing else is said about.
        embedding, output, fallback: types of the embeddings, of the output matrix, and of what does not fit.
        single: types by the name of the tensor, from the user's rules. They come before all others.
        chosen: types by name, chosen by the loss that is predicted.
        lattices: depths of the trit lattices that tensors lie on, by name.
        named: the kinds of tensors whose type the user has named.
    """

    depth: int
    embedding: GGMLQuantizationType
    output: GGMLQuantizationType
    fallback: GGMLQuantizationType
    single: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    chosen: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    lattices: Mapping[str, int] = field(default_factory=dict)
    named: frozenset[Kind] = frozenset()

    def is_free(self, tensor: SourceTensor) -> bool:
        """Whether the user has named no type for a tensor, so that another one may be chosen."""
        return tensor.kept_type is None and tensor.name not in self.single and tensor.kind not in self.named

    def with_rules(self, rules: Iterable[TypeRule], tensors: Sequence[SourceTensor]) -> "Plan":
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

    def with_types(self, types: Mapping[str, GGMLQuantizationType]) -> "Plan":
        """The plan with types chosen for tensors by name. All others keep theirs."""
        return replace(self, chosen={**self.chosen, **types})

    def with_most_frequent_depth(self, tensors: Iterable[SourceTensor]) -> "Plan":
        """The plan with the depth that most weights of the layers have. All tensors keep their types."""
        matrices = [tensor for tensor in tensors if tensor.kind is Kind.MATRIX and tensor.kept_type is None]
        wanted = {tensor.name: self.choice(tensor).wanted for tensor in matrices}
        weights: Counter[int] = Counter()
        for tensor in matrices:
            if (depth := DEPTH_OF_TYPE.get(wanted[tensor.name])) is not None:
                weights[depth] += math.prod(tensor.shape)
        depth = weights.most_common(1)[0][0] if weights else self.depth
        named = {name: qtype for name, qtype in wanted.items() if name not in self.single}
        return replace(self, depth=depth, chosen={**self.chosen, **named})

    def with_lattices(self, tensors: Iterable[SourceTensor]) -> "Plan":
        """The plan with the trit lattices that tensors lie on, as far as a sample of their rows tells.

        Raises:
            TritError: a tensor cannot be read.
        """
        mine = [tensor for tensor in tensors if tensor.kept_type is None and self.choice(tensor).depth is not None]
        depths = {tensor.name: _lattice_of(tensor) for tensor in mine}
        return replace(self, lattices={name: depth for name, depth in depths.items() if depth is not None})

    def choice(self, tensor: SourceTensor) -> Choice:
        """The type of a tensor and why it has it."""
        wanted, why = self._wanted(tensor)
        if not fits(tensor, wanted):
            return Choice(wanted, self.fallback_of(tensor), Why.ROWS)
        return Choice(wanted, wanted, why, self.lattices.get(tensor.name))

    def type_of(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type of a tensor; where its rows do not fit into blocks, the fallback, then F16."""
        return self.choice(tensor).qtype

    def fallback_of(self, tensor: SourceTensor) -> GGMLQuantizationType:
        """The type of a tensor that its own type cannot hold."""
        return self.fallback if fits(tensor, self.fallback) else GGMLQuantizationType.F16

    def exceptions(self, tensors: Iterable[SourceTensor]) -> list[str]:
        """NAME=TYPE for each tensor whose type is not that of its kind; TRIT types are a number, the depth."""
        return [
            f"{tensor.name}={DEPTH_OF_TYPE.get(wanted) or wanted.name.lower()}"
            for tensor in tensors
            if tensor.kept_type is None
            and (wanted := self.choice(tensor).wanted) is not self._type_of_kind(tensor.kind)
        ]

    def _wanted(self, tensor: SourceTensor) -> tuple[GGMLQuantizationType, Why]:
        if tensor.kept_type is not None:
            return tensor.kept_type, Why.KEPT
        if (qtype := self.single.get(tensor.name)) is not None:
            return qtype, Why.RULE
        if (qtype := self.chosen.get(tensor.name)) is not None:
            return qtype, Why.LOSS
        return self._type_of_kind(tensor.kind), Why.KIND

    def _type_of_kind(self, kind: Kind) -> GGMLQuantizationType:
        of_kind = {
            Kind.MATRIX: TRIT_TYPE[self.depth],
            Kind.EMBEDDING: self.embedding,
            Kind.OUTPUT: self.output,
        }
        return of_kind[kind]


def fits(tensor: SourceTensor, qtype: GGMLQuantizationType) -> bool:
    """Whether the rows of a tensor are whole blocks of a type."""
    return tensor.shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0


def _lattice_of(tensor: SourceTensor) -> int | None:
    """The depth of the lattices that all matrices of a tensor lie on; None if they are not alike, or on none."""
    some = tensor.sample(sample_step(tensor.shape[-2:]))
    if not np.isfinite(some).all():
        return None  # which is refused when the tensor is stored
    depths = {lattice_depth(matrix) for matrix in some}
    return depths.pop() if len(depths) == 1 else None
