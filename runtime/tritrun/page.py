"""A comparison as one HTML page with its styles, charts and script inside: a browser loads nothing else."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from rich.filesize import decimal as human_size

from tritrun.charts import charts_of
from tritrun.comparison import Comparison, Row
from tritrun.rounds import PHASES, Spread
from tritrun.scatter import Chart, mark, style

_WIDE, _NARROW = (580, 430), (358, 430)  # px; a wide chart cannot be read when a phone shrinks it

_FIGURES = {  # name of a chart -> its heading, and what is better than the others on its horizontal axis
    "size": ("KL divergence against size", "smaller"),
    "speed": ("KL divergence against decode speed", "faster"),
    "bits": ("KL divergence against bits per weight", "of fewer bits per weight"),
}
_SHORT_LABEL = 24  # letters; a label up to this length is not broken into lines where there is room


def as_page(comparison: Comparison) -> str:
    """The page, whole."""
    ids = {row.label: f"row-{number}" for number, row in enumerate(comparison.rows, 1)}
    charts = charts_of(comparison, link=lambda row: f"#{ids[row.label]}")
    title = escape(comparison.title)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # the page holds all it needs: a browser is told to load nothing
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">",
        '<link rel="icon" href="data:,">',
        f"<title>{title}: files compared</title>",
        f"<style>\n{_resource('page.css')}{style('.chart')}</style>",
        "</head>\n<body>\n<main>",
        f"<h1>{title}: files compared</h1>",
        *_introduction(comparison),
        '<div class="charts">',
        *(_figure(chart) for chart in charts),
        "</div>",
        *_table(comparison, ids),
        *_conditions(comparison),
        "</main>",
        f"<script>\n{_resource('page.js')}</script>",
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _resource(name: str) -> str:
    return (resources.files("tritrun") / name).read_text(encoding="utf-8")


def _introduction(comparison: Comparison) -> Iterable[str]:
    conditions = comparison.conditions
    base = f"<bdi>{escape(comparison.base.label)}</bdi>"
    yield (
        f"<p>Each file holds the same model with its weights stored in another way. KL divergence tells how far its "
        f"predictions of the next token are from those of {base}, on average over "
        f"{conditions.scored_tokens:,} tokens of {escape(conditions.text)}: 0 means the same predictions, and less is "
        "better.</p>"
    )


def _figure(chart: Chart) -> str:
    wide, narrow = (chart.draw(*size) for size in (_WIDE, _NARROW))
    best = ", ".join(f"<bdi>{escape(point.label)}</bdi>" for point in chart.front())
    heading, cheaper = _FIGURES[chart.name]
    return "\n".join(
        [
            f'<figure class="chart" id="{chart.name}">',
            f"<h2>{heading}</h2>",
            f'<div class="wide">\n{wide}\n</div>',
            f'<div class="narrow">\n{narrow}\n</div>',
            f"<figcaption>On the line: {best}. No other file here is both {cheaper} and closer to the base than one "
            "of these.</figcaption>",
            "</figure>",
        ]
    )


def _table(comparison: Comparison, ids: dict[str, str]) -> Iterable[str]:
    has_speed = comparison.conditions.speed is not None
    yield '<h2 id="figures">All figures</h2>'
    yield f'<p class="faint" id="figures-note">{escape(_table_note(comparison))}</p>'
    yield '<div class="scroll" tabindex="0" role="region" aria-labelledby="figures">'
    yield '<table aria-describedby="figures-note">'
    yield "<thead>"
    yield from _table_head(has_speed)
    yield "</thead>"
    yield '<tbody class="base">'
    yield _row(comparison.base, "base", "row-base", has_speed)
    yield '</tbody>\n<tbody class="files">'
    for row in comparison.rows:
        yield _row(row, "ours" if row.is_ours else "", ids[row.label], has_speed)
    yield "</tbody>\n</table>\n</div>"


def _table_note(comparison: Comparison) -> str:
    text = "Small figures: standard error"
    if comparison.conditions.speed:
        text += "; of speeds, the range over all rounds"
    if any(row.contents.stand_in for row in comparison.rows):
        text += (
            ". A file without a size stands in for one in the type of its layers: its weights were encoded in that "
            "type, decoded, and stored as floats"
        )
    return text + "."


def _table_head(has_speed: bool) -> Iterable[str]:
    groups: list[tuple[str, Sequence[str]]] = [
        ("file", ()),
        ("size", ()),
        ("KL divergence", ("mean", "median", "99.9 %")),
        ("same top token", ()),
        ("perplexity", ()),
        ("bits per weight", ("layers", "all")),
        *([("tokens per second", PHASES)] if has_speed else []),
        ("layers hold", ()),
    ]
    number = 0
    below = []
    yield "<tr>"
    for name, columns in groups:
        if columns:
            yield f'<th scope="colgroup" colspan="{len(columns)}">{name}</th>'
        else:
            kind = ' class="text"' if name == "layers hold" else ""
            yield f'<th scope="col" rowspan="2"{kind} data-column="{number}">{name}</th>'
        below += [f'<th scope="col" data-column="{number + i}">{column}</th>' for i, column in enumerate(columns)]
        number += max(1, len(columns))
    yield "</tr>\n<tr>"
    yield from below
    yield "</tr>"


def _row(row: Row, kind: str, row_id: str, has_speed: bool) -> str:
    """A file's figures."""
    sample = f'<svg viewBox="-7 -7 14 14" aria-hidden="true">{mark(row.contents.family)}</svg>'
    if kind == "base":
        sample = '<svg aria-hidden="true"></svg>'
    short = " short" if len(row.label) <= _SHORT_LABEL else ""
    about = f'title="{escape(row.file)}, SHA-256 {row.sha256}"'
    stand_in = row.contents.stand_in
    cells = [
        f'<th scope="row" {about} data-value="{escape(row.label)}"><div class="name chart{short}">{sample}'
        f"<bdi>{escape(row.label)}</bdi></div></th>",
        _cell(row.n_bytes, human_size(row.n_bytes)) if not stand_in else _cell(),
    ]
    if d := row.divergence:
        cells += [
            _cell(d.mean.value, f"{d.mean.value:.4f}", _error(d.mean.error, 4)),
            _cell(d.median, f"{d.median:.4f}"),
            _cell(d.percentile_99_9, f"{d.percentile_99_9:.3f}"),
            _cell(d.same_top.value, f"{d.same_top.value:.1f} %", _error(d.same_top.error, 1)),
        ]
    else:
        cells += [_cell()] * 4
    cells += [
        _cell(row.perplexity.value, f"{row.perplexity.value:.3f}", _error(row.perplexity.error, 3)),
        _cell(row.contents.layer_bits, f"{row.contents.layer_bits:.2f}"),
        _cell(row.contents.bits, f"{row.contents.bits:.2f}") if not stand_in else _cell(),
    ]
    if has_speed:
        cells += [_speed_cell(row.speed[phase]) if row.speed else _cell() for phase in PHASES]
    cells.append(_layers_cell(row))
    return f'<tr id="{row_id}" class="{kind}">{"".join(cells)}</tr>'


def _speed_cell(spread: Spread) -> str:
    digits = 0 if spread.median >= 100 else 1
    extent = f"{spread.low:.{digits}f}\u2013{spread.high:.{digits}f}"
    return _cell(spread.median, f"{spread.median:.{digits}f}", extent)


def _layers_cell(row: Row) -> str:
    contents = row.contents
    shares = [f"{escape(name)} {share:.0%}" for name, share in contents.layers.items() if share >= 0.005]
    text = ", ".join(shares) if len(contents.layers) > 1 else "".join(map(escape, contents.layers))
    method = f"<small>{escape(contents.method)}</small>" if contents.method else ""
    return f'<td class="text" data-value="{text}">{text}{method}</td>'


def _cell(value: float | None = None, text: str = "", small: str = "") -> str:
    if value is None:
        return '<td data-value=""><span class="faint">\u2013</span></td>'
    if not math.isfinite(value):
        return f'<td data-value="">{text}</td>'
    return f'<td data-value="{value!r}">{text}{f"<small>{small}</small>" if small else ""}</td>'


def _error(error: float | None, digits: int) -> str:
    return "" if error is None else f"\u00b1 {error:.{digits}f}"


def _conditions(comparison: Comparison) -> Iterable[str]:
    """How it was measured."""
    conditions = comparison.conditions
    yield "<h2>How it was measured</h2>"
    yield f"<pre><code>{escape(conditions.command)}</code></pre>"
    yield "<dl>"
    for name, value in conditions.facts():
        yield f"<dt>{name}</dt><dd>{escape(value)}</dd>"
    yield "</dl>"
