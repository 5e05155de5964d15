"""Mixed depth: each matrix gets the type with which the predicted loss is least at a given size of the file."""

import heapq
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.table import Table

from tritconv.encode import n_bytes
from tritconv.plan import Plan, fits
from tritconv.sources.source import Kind, SourceTensor
from tritcore.errors import TritError, UsageError
from tritcore.gguf_types import TRIT_TYPE

CANDIDATES = (*TRIT_TYPE.values(), GGMLQuantizationType.Q8_0)

_ALIGNMENT = 32  # of a tensor's data in a GGUF file

Losses = Mapping[str, Mapping[GGMLQuantizationType, float]]  # by tensor and type, in any unit


def bits_range(any_type: bool) -> tuple[float, float]:
    """The least and the most bits per weight that a model can have: by the candidates alone, or by any type."""
    if any_type:
        return _bits(TRIT_TYPE[1]), _bits(GGMLQuantizationType.F32)
    bits = [_bits(qtype) for qtype in CANDIDATES]
    return min(bits), max(bits)


def _bits(qtype: GGMLQuantizationType) -> float:
    block, size = GGML_QUANT_SIZES[qtype]
    return 8 * size / block


class Budget(Protocol):
    """How much room the matrices may take, in the user's unit."""

    @property
    def label(self) -> str:
        """For the name of the file."""
        ...

    def room(self, tensors: Sequence[SourceTensor]) -> int:
        """Bytes for the matrices among the tensors of a file."""
        ...

    def size(self, tensor: SourceTensor, qtype: GGMLQuantizationType) -> int:
        """Bytes that a tensor takes of it."""
        ...

    def refuse(self, least: int, most: int, tensors: Sequence[SourceTensor]) -> TritError:
        """Says what can be had, when the matrices can have `least` to `most` bytes."""
        ...


@dataclass(frozen=True)
class BitsPerWeight:
    """A mean over all weights of the file."""

    value: float

    @property
    def label(self) -> str:
        return f"TRIT-{self.value:g}bpw"

    def room(self, tensors: Sequence[SourceTensor]) -> int:
        return int(self.value * _n_weights(tensors) / 8) - _kept_bytes(tensors)

    def size(self, tensor: SourceTensor, qtype: GGMLQuantizationType) -> int:
        return n_bytes(tensor.shape, qtype)

    def refuse(self, least: int, most: int, tensors: Sequence[SourceTensor]) -> TritError:
        lowest, highest = (8 * (size + _kept_bytes(tensors)) / _n_weights(tensors) for size in (least, most))
        return _out_of_range(f"--bpw {self.value:g}", lowest, highest, "bits per weight")


@dataclass(frozen=True)
class FileSize:
    """A size of the whole file, in bytes; `rest` is what all but the matrices take of it."""

    value: int
    rest: int = 0

    @property
    def label(self) -> str:
        return "TRIT-mixed"

    def room(self, tensors: Sequence[SourceTensor]) -> int:
        return self.value - self.rest

    def size(self, tensor: SourceTensor, qtype: GGMLQuantizationType) -> int:
        return -(-n_bytes(tensor.shape, qtype) // _ALIGNMENT) * _ALIGNMENT

    def refuse(self, least: int, most: int, tensors: Sequence[SourceTensor]) -> TritError:
        bounds = (least + self.rest) / 1e6, (most + self.rest) / 1e6
        return _out_of_range(f"--target-size {self.value / 1e6:.2f} MB", *bounds, "MB")


def _n_weights(tensors: Iterable[SourceTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _kept_bytes(tensors: Iterable[SourceTensor]) -> int:
    """Bytes of the tensors whose type is not up to a plan."""
    return sum(n_bytes(tensor.shape, tensor.kept_type) for tensor in tensors if tensor.kept_type is not None)


def _out_of_range(option: str, least: float, most: float, unit: str) -> TritError:
    # rounded inwards, so that both ends can be had
    bounds = f"{math.ceil(100 * least) / 100:.2f} to {math.floor(100 * most) / 100:.2f}"
    return UsageError(f"{option} is out of range: this model can have {bounds} {unit}")


@dataclass(frozen=True)
class Allocation:
    """Types for tensors by name, and what is predicted of them.

    Attributes:
        types: of the matrices that were free to choose.
        losses: the predicted loss of each of them, with the type it got, in nats per token.
    """

    types: Mapping[str, GGMLQuantizationType]
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The predicted loss of all."""
        return sum(self.losses.values())

    def table(self) -> Table:
        """How many matrices of each role got which type, and each role's share of the predicted loss."""
        types = sorted(set(self.types.values()), key=lambda qtype: qtype.name)
        title = f"types by role; predicted KL divergence {self.loss:.4f}"
        table = Table("matrices", *(qtype.name for qtype in types), "predicted loss", title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        roles: dict[str, list[str]] = defaultdict(list)
        for name in self.types:
            roles[_role(name)].append(name)
        for role, names in roles.items():
            table.add_row(role, *self._cells(types, names))
        table.add_section()
        table.add_row("total", *self._cells(types, self.types), style="bold")
        return table

    def _cells(self, types: Iterable[GGMLQuantizationType], names: Iterable[str]) -> list[str]:
        names = list(names)
        counts = Counter(self.types[name] for name in names)
        loss, total = sum(self.losses[name] for name in names), sum(self.losses.values())
        return [*(str(counts[qtype] or "") for qtype in types), f"{loss / total:.1%}" if total else "-"]


_NUMBER = re.compile(r"\.\d+(?=\.)")


def _role(name: str) -> str:
    """What a tensor is for in its layer: attn_q, ffn_down."""
    return _NUMBER.sub("", name).removeprefix("blk.").removesuffix(".weight")


def check(tensors: Sequence[SourceTensor], plan: Plan, budget: Budget) -> None:
    """See whether a size can be had at all, by the shapes of the tensors alone. Raises UsageError."""
    matrices = _matrices(tensors)
    if not any(tensor.kind is Kind.MATRIX for tensor in matrices):
        raise UsageError("the model has no matrices to choose types for: give --depth")
    sizes = []
    for tensor in matrices:
        types = [qtype for qtype in CANDIDATES if fits(tensor, qtype)] if plan.is_free(tensor) else []
        sizes.append([budget.size(tensor, qtype) for qtype in types or [plan.type_of(tensor)]])
    least, most = (sum(map(end, sizes)) for end in (min, max))
    if not least <= budget.room(tensors) <= most:
        raise budget.refuse(least, most, tensors)


def _matrices(tensors: Sequence[SourceTensor]) -> list[SourceTensor]:
    """Those that may have any type."""
    return [tensor for tensor in tensors if tensor.kept_type is None]


def allocate(tensors: Sequence[SourceTensor], losses: Losses, plan: Plan, budget: Budget) -> Allocation:
    """Choose types for the matrices.

    Every tensor starts with its smallest type. Then whatever lowers the loss most for a byte is taken, as long as there
    is room: on the lower convex hull of a tensor's sizes and losses that is the best choice for the room it takes, and
    what room is left in the end is less than one step of one tensor. A step of the embeddings is a large part of the
    file, so all types are tried for what lies outside the layers.

    Args:
        tensors: all of the model.
        losses: the candidates. A tensor without any keeps the type that the plan has for it, and so does one that is
            not free.
        budget: for all matrices, free to choose or not.

    Raises:
        TritError: that size cannot be had.
    """
    matrices = _matrices(tensors)
    free = [tensor for tensor in matrices if losses.get(tensor.name) and plan.is_free(tensor)]
    hulls = {tensor.name: _hull(tensor, losses[tensor.name], budget) for tensor in free}
    fixed = sum(budget.size(tensor, plan.type_of(tensor)) for tensor in matrices if tensor.name not in hulls)

    least, most = (fixed + sum(hull[end].size for hull in hulls.values()) for end in (0, -1))
    room = budget.room(tensors)
    if room < least or room > most:
        raise budget.refuse(least, most, tensors)
    outside = [tensor.name for tensor in free if tensor.kind is not Kind.MATRIX]
    best: dict[str, _Step] = {}
    for steps in itertools.product(*(hulls[name] for name in outside)):
        some = hulls | {name: [step] for name, step in zip(outside, steps, strict=True)}
        left = room - fixed - sum(hull[0].size for hull in some.values())
        if left >= 0:
            chosen = _descend(some, left)
            if not best or _loss(chosen) < _loss(best):
                best = chosen
    return Allocation({name: step.qtype for name, step in best.items()}, {n: step.loss for n, step in best.items()})


def cheapest_outside(
    tensors: Sequence[SourceTensor], losses: Losses, plan: Plan, share: float
) -> dict[str, GGMLQuantizationType]:
    """The smallest types for what lies outside the layers that cost at most a share of the loss of the layers.

    Args:
        losses: of layers in the types of the plan, and of what lies outside in each type to choose from. The layers
            that have losses stand for all.

    Returns:
        Types of the tensors that are free to choose: those of least loss where none costs so little.
    """
    free = [t for t in _matrices(tensors) if t.kind is not Kind.MATRIX and losses.get(t.name) and plan.is_free(t)]
    layers = [tensor for tensor in _matrices(tensors) if tensor.kind is Kind.MATRIX]
    known = [tensor for tensor in layers if plan.type_of(tensor) in losses.get(tensor.name, {})]
    of_layers = sum(losses[tensor.name][plan.type_of(tensor)] for tensor in known)
    of_layers *= _n_weights(layers) / max(1, _n_weights(known))
    ways = []
    for types in itertools.product(*(losses[tensor.name] for tensor in free)):
        size = sum(n_bytes(tensor.shape, qtype) for tensor, qtype in zip(free, types, strict=True))
        loss = sum(losses[tensor.name][qtype] for tensor, qtype in zip(free, types, strict=True))
        ways.append((loss > share * of_layers, size if loss <= share * of_layers else 0, loss, types))
    *_, types = min(ways, key=lambda way: way[:3])
    return {tensor.name: qtype for tensor, qtype in zip(free, types, strict=True)}


@dataclass(frozen=True)
class _Step:
    """A type for a tensor, the bytes it takes, and its loss."""

    qtype: GGMLQuantizationType
    size: int
    loss: float

    def gain(self, other: "_Step") -> float:
        """By how much a larger one lowers the loss, for each byte."""
        return (self.loss - other.loss) / (other.size - self.size)


def _hull(tensor: SourceTensor, losses: Mapping[GGMLQuantizationType, float], budget: Budget) -> list[_Step]:
    """The types on the lower convex hull of a tensor's sizes and losses, up to that of least loss; smallest first."""
    steps = [_Step(qtype, budget.size(tensor, qtype), loss) for qtype, loss in losses.items()]
    hull: list[_Step] = []
    for step in sorted(steps, key=lambda step: (step.size, step.loss)):
        if hull and step.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and hull[-2].gain(hull[-1]) <= hull[-2].gain(step):
            hull.pop()
        hull.append(step)
    return hull


def _loss(steps: Mapping[str, _Step]) -> float:
    return sum(step.loss for step in steps.values())


def _descend(hulls: Mapping[str, Sequence[_Step]], room: int) -> dict[str, _Step]:
    """Take steps along the hulls while there is room for more than their starts, those of most gain first."""
    chosen = {name: hull[0] for name, hull in hulls.items()}
    ahead = [(-hull[0].gain(hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(ahead)
    while ahead:
        _, name, number = heapq.heappop(ahead)
        hull = hulls[name]
        needed = hull[number].size - chosen[name].size
        if needed > room:
            continue
        room -= needed
        chosen[name] = hull[number]
        if number + 1 < len(hull):
            heapq.heappush(ahead, (-hull[number].gain(hull[number + 1]), name, number + 1))
    return chosen
