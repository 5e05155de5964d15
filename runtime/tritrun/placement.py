"""Places for the labels of a chart's points: near them, and over nothing else."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from unicodedata import east_asian_width

_GAP = 3.0  # between a point and its label, in px
_SWEEPS = 4
_OVERLAP, _CROSSING = 1000.0, 4.0  # costs, beside the distance in px


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """The larger x."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """The larger y."""
        return self.y + self.height

    @property
    def middle(self) -> tuple[float, float]:
        """The point in the middle."""
        return self.x + self.width / 2, self.y + self.height / 2

    def overlaps(self, other: "Box") -> bool:
        """Whether they share more than an edge."""
        return self.x < other.right and other.x < self.right and self.y < other.bottom and other.y < self.bottom

    def contains(self, other: "Box") -> bool:
        """Whether `other` lies in it, edges included."""
        return self.x <= other.x and other.right <= self.right and self.y <= other.y and other.bottom <= self.bottom

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place in the box that is closest to a point."""
        return min(max(x, self.x), self.right), min(max(y, self.y), self.bottom)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Width in px of a text in a font of this size: not less than in any common sans-serif font."""
    width = 0.0
    for letter in text:
        if east_asian_width(letter) in "WF":
            width += 1.1
        elif letter in "MWmw@%—…" or not letter.isascii():
            width += 1.0
        elif letter in " .,:;'|!ijlIt()[]/-":
            width += 0.47
        else:
            width += 0.7
    return width * size * (1.08 if bold else 1.0)


def place(
    labels: Sequence[tuple[Box, float, float]],
    area: Box,
    taken: Sequence[Box] = (),
    avoided: Sequence[Box] = (),
) -> list[Box | None]:
    """A box for each label, None where there is no room without covering something.

    Args:
        labels: of each the box of its point, and the label's width and height; the first ones choose first.
        area: where labels may be.
        taken: what they must not cover, beside the points.
        avoided: what they had better not cover, such as pieces of a line.
    """
    fixed = [*taken, *(point for point, _, _ in labels)]

    def fixed_cost(box: Box) -> float:
        crossings = sum(box.overlaps(other) for other in avoided)
        return _OVERLAP * sum(box.overlaps(other) for other in fixed) + _CROSSING * min(crossings, 3)

    choices = [
        [(cost + fixed_cost(box), box) for cost, box in _choices(point, width, height, area)]
        for point, width, height in labels
    ]
    placed: list[Box | None] = [None] * len(labels)
    for _ in range(_SWEEPS):
        before = list(placed)
        for i, candidates in enumerate(choices):
            others = [box for j, box in enumerate(placed) if j != i and box is not None]
            costs = [cost + _OVERLAP * sum(box.overlaps(other) for other in others) for cost, box in candidates]
            placed[i] = candidates[costs.index(min(costs))][1] if candidates else None
        if placed == before:
            break
    return _without_overlaps(placed, fixed)


def _choices(point: Box, width: float, height: float, area: Box) -> Iterable[tuple[float, Box]]:
    """Boxes around a point, each with a cost that grows with the distance from it."""
    x, y = point.middle
    beside = [
        (left, y - height / 2 + shift, cost + abs(shift) / 4)
        for left, cost in ((point.right + _GAP, 0.0), (point.x - _GAP - width, 1.0))
        for shift in (0, -6, 6)
    ]
    around = [
        (left, top, 2.0 + rise + abs(left + width / 2 - x) / 20)
        for rise in (0, 9, 18, 27, 36, 48, 60)
        for left, top in product(
            (x - width / 2, point.right, point.x - width, x + 22, x - 22 - width),
            (point.y - _GAP - height - rise, point.bottom + _GAP + rise),
        )
    ]
    for left, top, cost in beside + around:
        box = Box(left, top, width, height)
        if area.contains(box):
            yield cost, box


def _without_overlaps(placed: Sequence[Box | None], fixed: Sequence[Box]) -> list[Box | None]:
    kept: list[Box | None] = []
    for box in placed:
        taken = [*fixed, *(other for other in kept if other is not None)]
        kept.append(None if box is None or any(box.overlaps(other) for other in taken) else box)
    return kept
