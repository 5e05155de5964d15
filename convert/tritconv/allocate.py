"""Mixed depth: each matrix of the layers gets the type with which the predicted loss is least at a given size."""

import heapq
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

CANDIDATES = (TRIT_TYPE[2], TRIT_TYPE[3], TRIT_TYPE[4], GGMLQuantizationType.Q8_0)

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
    """How much room the matrices of the layers may take, in the user's unit."""

    @property
    def label(self) -> str:
        """For the name of the file."""
        ...

    def room(self, n_weights: int) -> int:
        """Bytes for matrices of so many weights."""
        ...

    def size(self, tensor: SourceTensor, qtype: GGMLQuantizationType) -> int:
        """Bytes that a tensor takes of it."""
        ...

    def refuse(self, least: int, most: int, n_weights: int) -> TritError:
        """Says what can be had, when the sizes that can be had are `least` to `most` bytes."""
        ...


@dataclass(frozen=True)
class BitsPerWeight:
    """A mean over the weights of the layers' matrices."""

    value: float

    @property
    def label(self) -> str:
        return f"TRIT-{self.value:g}bpw"

    def room(self, n_weights: int) -> int:
        return int(self.value * n_weights / 8)

    def size(self, tensor: SourceTensor, qtype: GGMLQuantizationType) -> int:
        return n_bytes(tensor.shape, qtype)

    def refuse(self, least: int, most: int, n_weights: int) -> TritError:
        return _out_of_range(f"--bpw {self.value:g}", 8 * least / n_weights, 8 * most / n_weights, "bits per weight")


@dataclass(frozen=True)
class FileSize:
    """A size of the whole file, in bytes; `rest` is what all but the matrices of the layers take of it."""

    value: int
    rest: int = 0

    @property
    def label(self) -> str:
        return "TRIT-mixed"

    def room(self, n_weights: int) -> int:
        return self.value - self.rest

    def size(self, tensor: SourceTensor, qtype: GGMLQuantizationType) -> int:
        return -(-n_bytes(tensor.shape, qtype) // _ALIGNMENT) * _ALIGNMENT

    def refuse(self, least: int, most: int, n_weights: int) -> TritError:
        bounds = (least + self.rest) / 1e6, (most + self.rest) / 1e6
        return _out_of_range(f"--target-size {self.value / 1e6:.2f} MB", *bounds, "MB")


def _out_of_range(option: str, least: float, most: float, unit: str) -> TritError:
    # rounded inwards, so that both ends can be had
    bounds = f"{math.ceil(100 * least) / 100:.2f} to {math.floor(100 * most) / 100:.2f}"
    return UsageError(f"{option} is out of range: this model can have {bounds} {unit}")


@dataclass(frozen=True)
class Allocation:
    """Types for tensors by name, and what is predicted of them.

    Attributes:
        types: of the matrices of the layers that were free to choose.
        losses: the predicted loss of each of them, with the type it got.
    """

    types: Mapping[str, GGMLQuantizationType]
    losses: Mapping[str, float]

    def table(self) -> Table:
        """How many matrices of each role got which type, and each role's share of the predicted loss."""
        types = sorted(set(self.types.values()), key=lambda qtype: qtype.name)
        table = Table("matrices", *(qtype.name for qtype in types), "predicted loss", title="types by role")
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
    if not matrices:
        raise UsageError("the model has no matrices to choose types for: give --depth")
    sizes = []
    for tensor in matrices:
        types = [] if tensor.name in plan.single else [qtype for qtype in CANDIDATES if fits(tensor, qtype)]
        sizes.append([budget.size(tensor, qtype) for qtype in types or [plan.type_of(tensor)]])
    least, most = (sum(map(end, sizes)) for end in (min, max))
    n_weights = sum(math.prod(tensor.shape) for tensor in matrices)
    if not least <= budget.room(n_weights) <= most:
        raise budget.refuse(least, most, n_weights)


def _matrices(tensors: Sequence[SourceTensor]) -> list[SourceTensor]:
    """Those of the layers that may have any type."""
    return [tensor for tensor in tensors if tensor.kind is Kind.MATRIX and tensor.kept_type is None]


def allocate(tensors: Sequence[SourceTensor], losses: Losses, plan: Plan, budget: Budget) -> Allocation:
    """Choose types for the matrices of the layers.

    Every tensor starts with its smallest type. Then whatever lowers the loss most for a byte is taken, as long as there
    is room: on the lower convex hull of a tensor's sizes and losses that is the best choice for the room it takes, and
    what room is left in the end is less than one step of one tensor.

    Args:
        tensors: all of the model.
        losses: the candidates. A tensor without any keeps the type that the plan has for it, and so does one that
            `plan.single` names.
        budget: for all matrices of the layers, free to choose or not.

    Raises:
        TritError: that size cannot be had.
    """
    matrices = _matrices(tensors)
    free = [tensor for tensor in matrices if losses.get(tensor.name) and tensor.name not in plan.single]
    hulls = {tensor.name: _hull(tensor, losses[tensor.name], budget) for tensor in free}
    fixed = sum(budget.size(tensor, plan.type_of(tensor)) for tensor in matrices if tensor.name not in hulls)

    n_weights = sum(math.prod(tensor.shape) for tensor in matrices)
    least, most = (fixed + sum(hull[end].size for hull in hulls.values()) for end in (0, -1))
    room = budget.room(n_weights)
    if room < least or room > most:
        raise budget.refuse(least, most, n_weights)
    chosen = _descend(hulls, room - least)
    return Allocation(
        {name: step.qtype for name, step in chosen.items()}, {name: step.loss for name, step in chosen.items()}
    )


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
