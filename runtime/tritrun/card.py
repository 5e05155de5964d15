"""A comparison as the card of a model repository: Markdown with a YAML header, and the chart beside it.

Text from headers, names of files and options may be hostile. It is escaped, so that it is text wherever it stands.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from rich.filesize import decimal as human_size

from tritcore.console import note
from tritcore.errors import TritError
from tritcore.files import write_text_atomically
from tritcore.repository import CARD_KEYS
from tritrun.charts import as_svg, charts_of
from tritrun.comparison import Comparison, Conditions, Row, contents
from tritrun.models import read_text_model
from tritrun.naming import clean_text, split_label
from tritrun.perplexity_log import Estimate

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
_TAG = re.compile(r"[\w.+-]{1,50}", re.ASCII)
_OWN_TAGS = ("gguf", "trit", "ternary")
_FOREIGN_TAGS = ("safetensors", "pytorch", "transformers", "text-generation")  # not so here, or said elsewhere
_NO_QUALITY = ("speed", "machine", "threads")  # facts on a measurement that no figure of a card depends on

# Whatever Markdown, HTML or a table could take for markup. An underscore in a word is none; the last two make links.
_MARKUP = re.compile(r"[&<>\\`*\[\]|~#$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
_BIDI = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))  # they would turn the text around them


@dataclass(frozen=True)
class CardOptions:
    """What a card says besides the figures.

    Attributes:
        repo: the repository on the hub that it is for, such as org/name.
        title: of the model; empty takes the name in the header of its first file.
    """

    repo: str | None = None
    quantized_by: str | None = None
    title: str = ""


def check_card(path: Path, models: Sequence[str]) -> list[Path]:
    """Check, before long work, that there is something to write a card of.

    Args:
        models: as "FILE" or "LABEL=FILE".

    Returns:
        The files to be written.

    Raises:
        TritError: no model is of a TRIT type, or `path` is no Markdown file.
    """
    if path.suffix != ".md":
        raise TritError(f"--card {path}: a card is Markdown: call it README.md")
    found = (contents(read_text_model(split_label(model)[1])) for model in models)
    if not any(one.family == "TRIT" and not one.stand_in for one in found):
        raise TritError("--card: none of the models has TRIT types in its layers: name one that is to be published")
    return [path, _chart_of(path)]


def write_card(comparison: Comparison, path: Path, options: CardOptions) -> None:
    """Write the card, and the chart beside it if there is something to draw. Raises TritError."""
    chart = None
    if any(drawn.name == "size" for drawn in charts_of(comparison)):
        chart = _chart_of(path)
        write_text_atomically(chart, as_svg(comparison))
    write_text_atomically(path, as_card(comparison, options, chart.name if chart else None))
    header = dict(_header(_published(comparison), options))
    if missing := [key for key in CARD_KEYS if key not in header]:
        note(f"{path}: the files name no {' and no '.join(missing)}: add it to the header of the card")


def _chart_of(card: Path) -> Path:
    return card.with_suffix(".svg")


def _published(comparison: Comparison) -> list[Row]:
    """The rows of the files that the card is for."""
    recipes = comparison.conditions.recipes
    return [row for row in comparison.rows if row.is_ours and not row.contents.stand_in and row.label not in recipes]


def as_card(comparison: Comparison, options: CardOptions, chart: str | None) -> str:
    """The text of the card. `chart` is the path of the chart relative to it; None for none."""
    rows = _published(comparison)
    name = _plain(options.title or rows[0].provenance.name)
    types = ", ".join(dict.fromkeys(row.contents.file_type for row in rows))
    header = yaml.safe_dump(dict(_header(rows, options)), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{header}---",
        f"# {name} in balanced ternary",
        f"{name} as GGUF files whose weights are numbers of 1 to 4 trits: {_plain(types)}. They run on trit-gguf, a "
        "build of llama.cpp with these tensor types; a stock llama.cpp refuses them.",
        "## Files",
        _table(("file", "size", "bits per weight", "SHA-256"), _files(rows)),
        *_quality(comparison, rows, chart),
        *_usage(rows, options.repo, comparison.conditions),
        "## How the files were made",
        "\n".join(f"- {_origin(row)}" for row in rows),
        "## How the figures were measured",
        *_measurement(comparison.conditions),
    ]
    return "\n\n".join(parts) + "\n"


def _header(rows: Sequence[Row], options: CardOptions) -> Iterator[tuple[str, Any]]:
    """The keys and values of the YAML header, as the hub knows them."""
    origin = rows[0].provenance
    if origin.license is not None:
        name = origin.license.lower()
        if _LICENSE.fullmatch(name):
            yield "license", name
        else:
            yield from {"license": "other", "license_name": origin.license}.items()
        if origin.license_link is not None:
            yield "license_link", origin.license_link
    if origin.base_model is not None:
        yield from {"base_model": origin.base_model, "base_model_relation": "quantized"}.items()
    if languages := [language for language in origin.languages if _LANGUAGE.fullmatch(language)]:
        yield "language", languages
    yield from {"library_name": "trit-gguf", "pipeline_tag": "text-generation"}.items()
    if options.quantized_by:
        yield "quantized_by", clean_text(options.quantized_by)
    kept = [tag for tag in origin.tags if _TAG.fullmatch(tag) and tag not in _FOREIGN_TAGS]
    yield "tags", list(dict.fromkeys((*_OWN_TAGS, *kept)))


def _files(rows: Iterable[Row]) -> Iterator[Sequence[str]]:
    for row in rows:
        for file in row.files:
            yield _code(file.name), human_size(file.n_bytes), f"{row.contents.bits:.2f}", _code(file.sha256)


def _quality(comparison: Comparison, ours: Sequence[Row], chart: str | None) -> Iterator[str]:
    conditions = comparison.conditions
    yield "## Quality"
    yield (
        "KL divergence tells how far the predictions of the next token are from those of "
        f"{_plain(comparison.base.label)}, on average over {conditions.scored_tokens:,} tokens of "
        f"{_plain(conditions.text)}: 0 means the same predictions, and less is better. Bold rows are files of this "
        "repository."
    )
    columns = ("model", "size", "bits per weight", "mean KL divergence", "perplexity", "same top token")
    yield _table(columns, (_figures(row, row in ours) for row in (comparison.base, *comparison.rows)))
    if chart is not None:
        yield f"![KL divergence against size]({quote(chart)})"


def _figures(row: Row, is_bold: bool) -> Sequence[str]:
    real = not row.contents.stand_in
    divergence = row.divergence
    label = _plain(row.label)
    return (
        f"**{label}**" if is_bold else label,
        human_size(row.n_bytes) if real else "",
        f"{row.contents.bits if real else row.contents.layer_bits:.2f}",
        _estimate(divergence.mean, 4) if divergence else "",
        _estimate(row.perplexity, 3),
        f"{_estimate(divergence.same_top, 1)} %" if divergence else "",
    )


def _estimate(found: Estimate, digits: int) -> str:
    error = "" if found.error is None else f" ± {found.error:.{digits}f}"
    return f"{found.value:.{digits}f}{error}"


def _usage(rows: Sequence[Row], repo: str | None, conditions: Conditions) -> Iterator[str]:
    yield "## How to run"
    yield (
        f"Install trit-gguf {_plain(conditions.versions['trit-gguf'])} or later, which brings its llama.cpp. Its "
        "wheels need no compiler; `dist` is the folder that they are in:"
    )
    yield _block(["pip install --find-links dist trit-gguf"])
    yield "Its sources make the same in a virtual environment:"
    yield _block(["make build && .venv/bin/pip install -e ."])
    yield "Then, on a terminal or in a browser:"
    names = [shlex.quote(_reference(row, rows, repo)) for row in rows]
    yield _block([*(f"tritrun chat {name}" for name in names), f"tritrun serve {names[0]}"])


def _reference(row: Row, rows: Sequence[Row], repo: str | None) -> str:
    """What `tritrun` takes for a model: by its type where that is enough."""
    if repo is None:
        return row.files[0].name
    kind = row.contents.file_type
    is_enough = set(row.contents.layers) == {kind} and [other.contents.file_type for other in rows].count(kind) == 1
    return f"{repo}:{kind}" if is_enough else f"{repo}/{row.files[0].name}"


def _origin(row: Row) -> str:
    origin, words = row.provenance, [_code(row.file)]
    if origin.source is not None:
        words.append(f"from {_code(origin.source)}" + (f" at {_code(origin.revision)}" if origin.revision else ""))
    if row.contents.method:
        words.append(f"by the method {_code(row.contents.method)}")
    if origin.codec is not None:
        words.append(f"of {_code(origin.codec)}")
    made = " ".join(words)
    return f"{made}, calibrated on {'; '.join(map(_code, origin.calibration))}" if origin.calibration else made


def _measurement(conditions: Conditions) -> Iterator[str]:
    facts = ((name, value) for name, value in conditions.facts() if name not in _NO_QUALITY)
    yield "\n".join(f"- {name}: {_plain(value)}" for name, value in facts)
    yield _block([conditions.command])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of finished Markdown; the first column is text, the others are numbers."""
    lines = [columns, ("---", *("---:" for _ in columns[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(commands: Iterable[str]) -> str:
    """Commands as a block of code. A fence ends it, as an indented block would go on with a list before it."""
    return "\n".join(["```sh", *map(_visible, commands), "```"])


def _visible(text: str) -> str:
    return clean_text(text).translate(_BIDI)


def _plain(text: str) -> str:
    """Text as Markdown that shows it as it is: an entity is never markup."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", _visible(text))


def _code(text: str) -> str:
    """Text as code, where a table may hold it."""
    text = _visible(text)
    return f"`{text}`" if text and not set("`|\\") & set(text) else _plain(text)
