"""An SVG chart of speed against bits per weight: a row of panels for each instruction set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from xml.sax.saxutils import escape

from results import PHASES, Run
from tritrun.placement import Box, place, text_width

_PANEL_WIDTH, _PANEL_HEIGHT = 440, 300
_LEFT, _TOP, _RIGHT, _BOTTOM = 48, 40, 20, 46  # margins of a panel
_TITLE_HEIGHT = 34
_FONT_SIZE, _LABEL_HEIGHT = 11, 12
_RADIUS = {True: 5.0, False: 3.5}  # of ours, of a peer

_LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#59636e",
    "grid": "#d8dee4",
    "ours": "#b3400b",
    "peer": "#57606a",
}
_DARK = {
    "paper": "#0d1117",
    "ink": "#e6edf3",
    "faint": "#9198a1",
    "grid": "#2a313a",
    "ours": "#ff9a57",
    "peer": "#a2abb5",
}


def _colours(palette: dict[str, str]) -> str:
    # no custom properties: not all viewers know them
    fills = "".join(f".{name} {{ fill: {colour}; }} " for name, colour in palette.items())
    return fills + "".join(
        f"path.{name} {{ fill: none; stroke: {palette[name]}; }} " for name in ("grid", "ours", "peer")
    )


_STYLE = f"""
  text {{ font-family: system-ui, sans-serif; font-size: {_FONT_SIZE}px; }}
  text.title {{ font-size: 14px; font-weight: 600; }}
  text.panel, text.ours {{ font-weight: 600; }}
  path.thread {{ stroke-opacity: 0.5; }}
  {_colours(_LIGHT)}
  @media (prefers-color-scheme: dark) {{ {_colours(_DARK)} }}
"""


@dataclass(frozen=True)
class _Point:
    name: str
    x: float
    y: float
    low: float
    high: float

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("TRIT")

    @property
    def box(self) -> Box:
        radius = _RADIUS[self.is_ours]
        return Box(self.x - radius, self.y - radius, 2 * radius, 2 * radius)


def draw(title: str, runs: Sequence[Run]) -> str:
    """The chart as SVG text: decode at the left, prompt at the right, the instruction sets below one another."""
    width, height = _PANEL_WIDTH * len(PHASES), _TITLE_HEIGHT + _PANEL_HEIGHT * len(runs)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="title ink" x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for row, run in enumerate(runs):
        for column, phase in enumerate(PHASES):
            parts.append(f'<g transform="translate({column * _PANEL_WIDTH} {_TITLE_HEIGHT + row * _PANEL_HEIGHT})">')
            parts.extend(_panel(run, phase))
            parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def _panel(run: Run, phase: str) -> Iterable[str]:
    known = ((name, file["bits_per_weight"]) for name, file in run.files.items())
    bits: dict[str, float] = {name: value for name, value in known if value is not None}
    speeds = {name: run.speed(name, phase) for name in bits}
    right, bottom = _PANEL_WIDTH - _RIGHT, _PANEL_HEIGHT - _BOTTOM
    first, last = floor(min(bits.values())), ceil(max(bits.values())) + 1
    ticks = _ticks(max(speed.high for speed in speeds.values()))

    def at_x(bits_per_weight: float) -> float:
        return _LEFT + (right - _LEFT) * (bits_per_weight - first) / (last - first)

    def at_y(speed: float) -> float:
        return bottom - (bottom - _TOP) * speed / ticks[-1]

    tokens = run.settings.answer_tokens if phase == "decode" else run.settings.prompt_tokens
    yield (
        f'<text class="panel ink" x="{_LEFT}" y="26">{phase}, tokens/s over {tokens}; CPU {escape(run.settings.cpu)}, '
        f"{run.settings.threads} threads</text>"
    )
    for tick in ticks:
        yield f'<path class="grid" d="M{_LEFT} {at_y(tick):.1f}H{right}"/>'
        yield f'<text class="faint" x="{_LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for bit in range(first, last + 1):
        yield f'<text class="faint" x="{at_x(bit):.1f}" y="{bottom + 16}" text-anchor="middle">{bit}</text>'
    middle = (_LEFT + right) / 2
    yield f'<text class="faint" x="{middle}" y="{bottom + 34}" text-anchor="middle">bits per weight, layers</text>'

    points = [
        _Point(name, at_x(bits[name]), at_y(speed.median), at_y(speed.low), at_y(speed.high))
        for name, speed in speeds.items()
    ]
    # ours come last to lie above, but choose the places of their labels first
    points.sort(key=lambda point: point.is_ours)
    ours = [point for point in points if point.is_ours]
    if len(ours) > 1:
        yield f'<path class="ours thread" d="M{" L".join(f"{point.x:.1f} {point.y:.1f}" for point in ours)}"/>'
    boxes = [(point.box, text_width(point.name, _FONT_SIZE, bold=point.is_ours), _LABEL_HEIGHT) for point in points]
    places = place(boxes[::-1], Box(_LEFT, _TOP, right + _RIGHT - _LEFT, bottom - _TOP))
    labels = dict(zip(points[::-1], places, strict=True))
    for point in points:
        kind = "ours" if point.is_ours else "peer"
        yield f'<path class="{kind}" d="M{point.x:.1f} {point.low:.1f}V{point.high:.1f}"/>'
        yield f'<circle class="{kind}" cx="{point.x:.1f}" cy="{point.y:.1f}" r="{_RADIUS[point.is_ours]}"/>'
        if box := labels[point]:
            x, anchor = (box.right, "end") if box.right < point.x else (box.x, "start")
            yield (
                f'<text class="{kind}" x="{x:.1f}" y="{box.bottom - 3:.1f}" text-anchor="{anchor}">'
                f"{escape(point.name)}</text>"
            )


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to beyond `largest`, about five."""
    rough = largest / 5
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * i for i in range(ceil(largest / step) + 1)]
