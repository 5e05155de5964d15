"""The charts of a comparison: KL divergence against size, decode speed, and bits per weight."""

import math
from collections.abc import Callable, Iterable, Sequence

from rich.filesize import decimal as human_size

from tritcore.errors import TritError
from tritrun.comparison import Comparison, Row
from tritrun.scatter import Chart, Point

_MEGABYTE = 1e6
_SIZE = (760, 480)  # px, of the file
_Y_TITLE = "mean KL divergence from {base}, log scale; lower is better"

Link = Callable[[Row], str]


def charts_of(comparison: Comparison, link: Link = lambda row: "") -> list[Chart]:
    """All charts that there are figures for.

    Args:
        link: where the point of a row leads.
    """
    return [
        chart
        for chart in (_size_chart(comparison, link), _speed_chart(comparison, link), _bits_chart(comparison, link))
        if chart is not None
    ]


def as_svg(comparison: Comparison) -> str:
    """The chart of divergence and size, as a file of its own.

    Raises:
        TritError: no file has a size and a divergence that is a number.
    """
    chart = _size_chart(comparison)
    if chart is None:
        raise TritError("nothing to draw: no divergence is a number")
    return chart.draw(*_SIZE, standalone=True) + "\n"


def _size_chart(comparison: Comparison, link: Link = lambda row: "") -> Chart | None:
    rows = [row for row in _drawable(comparison.rows) if not row.contents.stand_in]
    points = [_point(row, row.n_bytes / _MEGABYTE, link) for row in rows]
    return _chart(comparison, "size", "size", "size of the file, MB; smaller is better", points)


def _speed_chart(comparison: Comparison, link: Link) -> Chart | None:
    points, marked = [], None
    for row in _drawable(comparison.rows):
        if row.speed:
            decode = row.speed["decode"]
            points.append(_point(row, decode.median, link, (decode.low, decode.high)))
    if comparison.base.speed:
        marked = (comparison.base.speed["decode"].median, comparison.base.label)
    x_title = "decode speed, tokens/s; more is better"
    return _chart(comparison, "speed", "decode speed", x_title, points, more_is_better=True, marked_x=marked)


def _bits_chart(comparison: Comparison, link: Link) -> Chart | None:
    """Only with stand-ins: they have no size."""
    if not any(row.contents.stand_in for row in comparison.rows):
        return None
    points = [_point(row, row.contents.layer_bits, link) for row in _drawable(comparison.rows)]
    return _chart(comparison, "bits", "bits per weight", "bits per weight of the layers; fewer is better", points)


def _chart(
    comparison: Comparison,
    name: str,
    against: str,
    x_title: str,
    points: Sequence[Point],
    more_is_better: bool = False,
    marked_x: tuple[float, str] | None = None,
) -> Chart | None:
    if not points:
        return None
    return Chart(
        name=name,
        title=f"{comparison.title}: KL divergence against {against}",
        description="; ".join(point.about for point in points),
        x_title=x_title,
        y_title=_Y_TITLE.format(base=comparison.base.label),
        points=points,
        more_is_better=more_is_better,
        marked_x=marked_x,
    )


def _drawable(rows: Iterable[Row]) -> list[Row]:
    """Rows whose divergence is a number: that of a broken model may not be."""
    return [row for row in rows if row.divergence and math.isfinite(row.divergence.mean.value)]


def _point(row: Row, x: float, link: Link, x_range: tuple[float, float] | None = None) -> Point:
    assert row.divergence is not None  # _drawable
    mean = row.divergence.mean
    about = f"{row.label}: KL divergence {mean.value:.4g}, {row.contents.layer_bits:.2f} bits per weight in the layers"
    if not row.contents.stand_in:
        about += f", {human_size(row.n_bytes)}"
    if row.speed:
        about += f", {row.speed['decode'].median:.0f} tokens/s"
    error = mean.error if mean.error is not None and math.isfinite(mean.error) else 0.0
    return Point(row.label, row.contents.family, x, mean.value, x_range, error, about, link(row))
