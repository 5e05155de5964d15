"""Scatter charts of KL divergence as SVG, on paper of any colour: labelled points, and the line of the best ones."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from tritrun.placement import Box, place, text_width

FAMILIES = ("TRIT", "K-quant", "I-quant", "other")

_LEFT, _RIGHT, _BOTTOM = 50.0, 10.0, 44.0  # margins of the plot
_FRAME = 14.0  # around all of it, where it stands alone
_FONT_SIZE, _LINE_HEIGHT = 12.0, 15.0
_RADIUS = 5.0
_LEADER = 9.0  # px between a point and its label from which on a line joins them
_LONGEST_LABEL = 26  # letters
_HAIR = 0.002  # relative: what files differ in by the length of their metadata
_LEAST = 1e-6  # a smaller divergence is drawn as this one: a logarithmic axis has no zero

_LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#59636e",
    "grid": "#d8dee4",
    "TRIT": "#b3400b",
    "K-quant": "#2f5fa7",
    "I-quant": "#1d7051",
    "other": "#59636e",
}
_DARK = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "faint": "#9198a1",
    "grid": "#2a313a",
    "TRIT": "#ff9a57",
    "K-quant": "#85b3f0",
    "I-quant": "#62c79f",
    "other": "#a2abb5",
}
_MARKS = {
    "TRIT": "M0-7L7 0L0 7L-7 0Z",
    "K-quant": "M-5 0A5 5 0 1 1 5 0A5 5 0 1 1-5 0Z",
    "I-quant": "M0-6L5.6 4.2H-5.6Z",
    "other": "M-4.4-4.4H4.4V4.4H-4.4Z",
}


@dataclass(frozen=True)
class Point:
    """One file.

    Attributes:
        family: one of FAMILIES.
        x_range, error: how far the figures are from certain; the divergence is `y` plus or minus `error`.
        about: what a reader is told who points at it.
        link: where the point leads, such as "#row-1"; empty for nowhere.
    """

    label: str
    family: str
    x: float
    y: float
    x_range: tuple[float, float] | None = None
    error: float = 0.0
    about: str = ""
    link: str = ""


@dataclass(frozen=True)
class Chart:
    """Mean KL divergence, on a logarithmic axis, against something.

    Attributes:
        name: for ids; no other chart on a page has it.
        x_title: what lies on the horizontal axis, with its unit.
        more_is_better: whether points to the right are the better ones.
        marked_x: a value on the horizontal axis to mark, and its name.
    """

    name: str
    title: str
    description: str
    x_title: str
    y_title: str
    points: Sequence[Point]
    more_is_better: bool = False
    marked_x: tuple[float, str] | None = None

    def draw(self, width: int, height: int, standalone: bool = False) -> str:
        """The chart as SVG text of this size in px.

        Args:
            standalone: as a file of its own, with title, colours and paper; else it needs `STYLE` around it.
        """
        return "\n".join(_Drawing(self, width, height, standalone).parts())

    def front(self) -> list[Point]:
        """The points that no other one beats at both x and y, from the cheapest on. A hair more on x is no more."""

        sign = -1 if self.more_is_better else 1

        def beats(other: Point, point: Point) -> bool:
            if other.y == point.y:
                return sign * other.x < sign * point.x
            return other.y < point.y and sign * other.x <= sign * point.x + _HAIR * abs(point.x)

        best = [point for point in self.points if not any(beats(other, point) for other in self.points)]
        return sorted(best, key=lambda point: point.x, reverse=self.more_is_better)


def style(scope: str = "") -> str:
    """CSS for charts within the selector `scope`, light or dark as the reader's system is."""
    # no custom properties: not all viewers of SVG files know them
    return f"""
{scope} text {{ font: {_FONT_SIZE:g}px system-ui, sans-serif; }}
{scope} text.title {{ font-size: 15px; font-weight: 600; }}
{scope} text.strong {{ font-weight: 600; }}
{scope} path {{ fill: none; }}
{scope} path.front {{ stroke-width: 1.5; stroke-opacity: 0.55; }}
{scope} path.range {{ stroke-opacity: 0.5; }}
{scope} path.marked {{ stroke-dasharray: 4 4; }}
{_colours(scope, _LIGHT)}
@media (prefers-color-scheme: dark) {{
{_colours(scope, _DARK)}
}}
"""


def mark(family: str) -> str:
    """A family's mark as a path around the origin, about 12 px wide."""
    return f'<path class="mark {family}" d="{_MARKS[family]}"/>'


def _colours(scope: str, palette: dict[str, str]) -> str:
    lines = [f"{scope} text.{name} {{ fill: {palette[name]}; }}" for name in ("ink", "faint", *FAMILIES)]
    lines += [f"{scope} path.mark.{name} {{ fill: {palette[name]}; }}" for name in FAMILIES]
    lines += [f"{scope} path.{name} {{ stroke: {palette[name]}; }}" for name in ("grid", "faint", *FAMILIES)]
    lines += [f"{scope} path.mark {{ stroke: {palette['paper']}; }}", f"{scope} rect {{ fill: {palette['paper']}; }}"]
    return "\n".join(lines)


class _Drawing:
    """One chart at one size."""

    def __init__(self, chart: Chart, width: int, height: int, standalone: bool) -> None:
        self._chart, self._width, self._height, self._standalone = chart, width, height, standalone
        self._families = [name for name in FAMILIES if any(point.family == name for point in chart.points)]
        self._frame = _FRAME if standalone else 0.0
        left, right = self._frame + _LEFT, width - self._frame - _RIGHT
        self._legend, foot = self._lay_legend(left, right, self._frame + (36 if standalone else 14))
        top = foot + 32
        self._area = Box(left, top, right - left, height - self._frame - _BOTTOM - top)
        xs = [x for point in chart.points for x in (point.x, *(point.x_range or ()))]
        xs += [chart.marked_x[0]] if chart.marked_x else []
        self._x = _Scale.over(xs, self._area.x, self._area.right, 0.08)
        ys = [math.log10(max(point.y, _LEAST)) for point in chart.points]
        self._marked = self._marked_box()
        self._y = _Scale.over(ys, self._area.bottom, self._area.y, 0.1, least=0.3)

    def parts(self) -> Iterable[str]:
        chart = self._chart
        ids = f"{chart.name}-{self._width}"
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width} {self._height}" '
            f'width="{self._width}" height="{self._height}" role="{"img" if self._standalone else "group"}" '
            f'aria-labelledby="{ids}-title {ids}-desc">'
        )
        yield f'<title id="{ids}-title">{escape(chart.title)}</title>'
        yield f'<desc id="{ids}-desc">{escape(chart.description)}</desc>'
        if self._standalone:
            yield f"<style>{style()}</style>"
            yield f'<rect width="{self._width}" height="{self._height}" rx="6"/>'
            yield _text("title ink", self._frame, self._frame + 13, chart.title)
        yield from self._legend
        yield from self._axes()
        yield from self._front()
        yield from self._points()
        yield "</svg>"

    def _lay_legend(self, left: float, right: float, y: float) -> tuple[list[str], float]:
        """The legend from the baseline `y` on, in as many lines as it needs, and its last baseline."""
        parts = []
        line = "fastest of its quality" if self._chart.more_is_better else "smallest of its quality"
        x = left
        for name in (*self._families, line):
            width = 20 + text_width(name, _FONT_SIZE)
            if x > left and x + width > right:
                x, y = left, y + 18
            sample = mark(name) if name in FAMILIES else '<path class="front faint" d="M-7 0H7"/>'
            parts.append(f'<g transform="translate({x + 7:.1f} {y - 4:.1f})">{sample}</g>')
            parts.append(_text("faint", x + 20, y, name))
            x += width + 6
        return parts, y

    def _axes(self) -> Iterable[str]:
        area = self._area
        yield _text("faint", self._frame, area.y - 13, self._chart.y_title)
        for value, name in _log_ticks(self._y):
            y = self._y(value)
            yield f'<path class="grid" d="M{area.x:g} {y:.1f}H{area.right:.1f}"/>'
            yield _text("faint", area.x - 6, y + 4, name, "end")
        for value in _ticks(self._x, int(area.width // 55)):
            x = self._x(value)
            yield f'<path class="grid" d="M{x:.1f} {area.bottom:.1f}v4"/>'
            yield _text("faint", x, area.bottom + 18, f"{value:g}", "middle")
        yield _text("faint", area.right, area.bottom + 36, self._chart.x_title, "end")
        if self._chart.marked_x:
            value, name = self._chart.marked_x
            yield f'<path class="marked faint" d="M{self._x(value):.1f} {area.y:.1f}V{area.bottom:.1f}"/>'
            yield _text("faint", self._marked.x + 4, self._marked.bottom - 3.5, _short(name))

    def _marked_box(self) -> Box:
        """Where the name of the marked value stands: at the foot of its line."""
        value, name = self._chart.marked_x or (0.0, "")
        width = text_width(_short(name), _FONT_SIZE) + 4
        left = self._x(value)
        left = left if left + width < self._area.right else left - width - 4
        return Box(left, self._area.bottom - _LINE_HEIGHT, width, _LINE_HEIGHT if name else 0)

    def _front(self) -> Iterable[str]:
        corners = [self._at(point) for point in self._chart.front()]
        if len(corners) > 1:
            yield f'<path class="front faint" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in corners)}"/>'

    def _points(self) -> Iterable[str]:
        # The best come last to lie above the others, but choose the places of their labels first.
        points = sorted(self._chart.points, key=lambda point: point.family == "TRIT")
        labels = dict(zip(points[::-1], self._place(points[::-1]), strict=True))
        for point in points:
            yield from self._point(point, labels[point])

    def _place(self, points: Sequence[Point]) -> list[Box | None]:
        labels = []
        for point in points:
            x, y = self._at(point)
            box = Box(x - _RADIUS - 2, y - _RADIUS - 2, 2 * _RADIUS + 4, 2 * _RADIUS + 4)
            width = text_width(_short(point.label), _FONT_SIZE, bold=point.family == "TRIT")
            labels.append((box, width, _LINE_HEIGHT))
        area = Box(self._area.x, self._area.y - 8, self._width - self._area.x - 2, self._area.height + 6)
        return place(labels, area, taken=[self._marked], avoided=self._avoided())

    def _avoided(self) -> list[Box]:
        """The lines: that of the best points in small pieces, the marked value, the uncertainties."""
        corners = [self._at(point) for point in self._chart.front()]
        pieces = []
        for (x0, y0), (x1, y1) in pairwise(corners):
            n = max(2, int(math.dist((x0, y0), (x1, y1)) / 8))
            pieces += [Box(x0 + (x1 - x0) * i / n - 1, y0 + (y1 - y0) * i / n - 1, 2, 2) for i in range(n)]
        if self._chart.marked_x:
            pieces.append(Box(self._x(self._chart.marked_x[0]) - 2, self._area.y, 4, self._area.height))
        for point in self._chart.points:
            if point.x_range:
                _, y = self._at(point)
                low, high = (self._x(x) for x in point.x_range)
                pieces.append(Box(low - 3, y - 1, high - low + 6, 2))
        return pieces

    def _point(self, point: Point, label: Box | None) -> Iterable[str]:
        x, y = self._at(point)
        # the link makes a point a stop for the keyboard, and works without scripts
        tag = f'a href="{escape(point.link)}"' if point.link else "g"
        yield f'<{tag} class="point" data-label="{escape(point.label)}"><title>{escape(point.about)}</title>'
        if point.x_range:
            low, high = (self._x(x) for x in point.x_range)
            yield f'<path class="range {point.family}" d="M{low:.1f} {y:.1f}H{high:.1f}"/>'
        if point.error > 0:
            low, high = (self._y(math.log10(max(point.y + e, _LEAST))) for e in (-point.error, point.error))
            low = min(low, self._area.bottom)
            yield f'<path class="range {point.family}" d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
        if label is not None:
            near_x, near_y = label.nearest(x, y)
            if math.dist((x, y), (near_x, near_y)) > _RADIUS + _LEADER:
                yield f'<path class="range {point.family}" d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}"/>'
        yield f'<g transform="translate({x:.1f} {y:.1f})">{mark(point.family)}</g>'
        if label is not None:
            strong = " strong" if point.family == "TRIT" else ""
            middle, anchor = label.x, "start"
            if label.right < x:
                middle, anchor = label.right, "end"
            elif label.x < x - _RADIUS:
                middle, anchor = label.middle[0], "middle"
            yield _text(f"{point.family}{strong}", middle, label.bottom - 3.5, _short(point.label), anchor)
        yield f"</{tag.split()[0]}>"

    def _at(self, point: Point) -> tuple[float, float]:
        return self._x(point.x), self._y(math.log10(max(point.y, _LEAST)))


@dataclass(frozen=True)
class _Scale:
    """Maps low..high to start..end; end may be the smaller one."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, margin: float, least: float = 0.0) -> "_Scale":
        """A scale with all values and a share of free room at both sides; it spans `least` at the least."""
        low, high = min(values), max(values)
        span = max(high - low, least, abs(high) * 1e-3, 1e-9)
        middle = (low + high) / 2
        return cls(middle - span * (0.5 + margin), middle + span * (0.5 + margin), start, end)

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def _ticks(scale: _Scale, most: int) -> list[float]:
    """Round numbers within a scale, `most` or fewer."""
    rough = (scale.high - scale.low) / max(most, 2)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(scale.low / step)
    return [step * i for i in range(first, math.floor(scale.high / step) + 1)]


def _log_ticks(scale: _Scale) -> list[tuple[float, str]]:
    """Logarithms of round numbers within a scale, with the numbers: 1, 2 and 5 of each power of ten, or its 1."""
    factors = (1, 2, 5) if scale.high - scale.low < 3.4 else (1,)
    powers = range(math.floor(scale.low), math.ceil(scale.high) + 1)
    numbers = [factor * 10.0**power for power in powers for factor in factors]
    return [(math.log10(n), f"{n:g}") for n in numbers if scale.low <= math.log10(n) <= scale.high]


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    position = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{position}>{escape(text)}</text>'
