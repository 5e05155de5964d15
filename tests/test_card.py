"""Model cards: what tritrun compare --card says of files, and that text from others stays text in it."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from command_line import tritconv
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from tiny_gguf import write_tiny_model
from typer.testing import CliRunner, Result

from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritrun.card import CardOptions, _code, _plain, as_card, check_card, write_card
from tritrun.cli import app
from tritrun.comparison import STAND_IN_BITS, STAND_IN_TYPE, Comparison, Conditions, Contents, File, Row
from tritrun.perplexity import Divergence
from tritrun.perplexity_log import Estimate
from tritrun.provenance import Provenance, provenance

HOSTILE = (
    "</td></table><script>alert(1)</script> | [a](javascript:b) ![c](//d) **e** `f` _g_ https://h www.i \\| $j$\n# k"
)
HUB = "https://huggingface.co"
MEASURE = ("--chunks", "4", "--ctx", "64", "--threads", "1", "--no-speed")
RENDERER = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table")


class Reader(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def split(card: str) -> tuple[dict[str, Any], str]:
    """The YAML header of a card, and its Markdown."""
    _, header, body = card.split("---\n", 2)
    return yaml.safe_load(header), body


def run(*arguments: object, exit_code: int = 0) -> Result:
    with patch.object(os, "environ", os.environ.copy()):
        result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


def write_named_model(path: Path, add: Callable[[GGUFWriter], None]) -> Path:
    """A tiny model whose header says more, which `add` adds."""
    add_name = GGUFWriter.add_name

    def named(writer: GGUFWriter, name: str) -> None:
        add_name(writer, "Tiny & small")
        add(writer)

    with patch.object(GGUFWriter, "add_name", named):
        return write_tiny_model(path, hidden=256)


def row(label: str, kind: str = "TRIT2", **changes: Any) -> Row:
    contents = Contents(kind, "gptq", {kind: 1.0}, layer_bits=3.5, bits=4.0)
    divergence = Divergence(Estimate(20.0, 0.5), Estimate(0.25, 0.01), 0.1, 2.0, 5.0, Estimate(90.0, 0.5))
    files = (File(f"{label}.gguf", 1000, "0" * 64),)
    of = Provenance("Model", source="org/source", revision="c0ffee", codec="tritconv 1", calibration=("a.txt", "s"))
    found = Row(label, f"{label}.gguf", "0" * 64, 1000, contents, Estimate(21.0, 0.6), divergence, None, files, of)
    return replace(found, **changes)


def comparison(*rows: Row) -> Comparison:
    conditions = Conditions(
        command="tritrun compare",
        date="2026-11-22T05:29+00:00",
        text="wiki.test.raw",
        text_sha256="1" * 64,
        ctx=512,
        chunks=24,
        recipes=("Q4_K_M", "TRIT3"),
        calibration="train.txt",
        threads=2,
        cpu="haswell",
        machine={"cpu": "A CPU", "cores": 2, "architecture": "x86_64", "system": "Linux"},
        speed=None,
        versions={"trit-gguf": "0.1.0", "llama-cpp-python": "0.3.36", "libraries": "2" * 64},
    )
    return Comparison("A model", row("F16", "F16", divergence=None), rows, conditions)


@pytest.mark.build
def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_license("Apache-2.0")
        writer.add_languages(["en", "no"])
        writer.add_tags(["chat", "transformers"])
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, "https://huggingface.co/org/tiny")

    base = write_named_model(tmp_path / "tiny-F16.gguf", add)
    folder = tmp_path / "publish"
    folder.mkdir()
    for depth, options in ((2, ()), (3, ("--split-max-size", "600kB"))):
        target = folder / f"tiny-TRIT{depth}.gguf"
        assert tritconv("gguf-to-gguf", base, "--fast", "--depth", depth, "-o", target, *options).returncode == 0
    parts = [folder / f"tiny-TRIT3-0000{number}-of-00002.gguf" for number in (1, 2)]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    models = (folder / "tiny-TRIT2.gguf", parts[1])
    card, report = folder / "README.md", tmp_path / "report.json"
    own = ("--card", card, "--repo", "org/tiny-GGUF", "--quantized-by", "Jo: # Doe", "--json", report)
    run("--base", base, "--text", text, *MEASURE, "--recipe", "Q4_K_M,TRIT4", *own, *models)

    said = card.read_text()
    header, body = split(said)
    assert header == {
        "license": "apache-2.0",
        "base_model": "org/tiny",
        "base_model_relation": "quantized",
        "language": ["en", "no"],
        "library_name": "trit-gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "Jo: # Doe",
        "tags": ["gguf", "trit", "ternary", "chat"],
    }
    shown = Reader(RENDERER.render(body))
    for path in (models[0], *parts):
        assert f"`{path.name}`" in body
        assert sha256(path.read_bytes()).hexdigest() in body
    figures = {model["label"]: model for model in json.loads(report.read_text())["models"]}
    assert figures.keys() == {"F16", "TRIT2", "TRIT3", "Q4_K_M", "TRIT4"}
    for label, model in figures.items():
        name = f"**{label}**" if label in ("TRIT2", "TRIT3") else label  # TRIT4 is made to compare with
        (line,) = (line for line in body.splitlines() if line.startswith(f"| {name} |"))
        for estimate, digits in ((model["perplexity"], 3), ((model["divergence"] or {}).get("mean"), 4)):
            assert estimate is None or f"{estimate['value']:.{digits}f} ± {estimate['error']:.{digits}f}" in line
    assert ("img", {"src": "README.svg", "alt": "KL divergence against size"}) in shown.tags
    assert card.with_suffix(".svg").read_text().startswith("<svg")
    assert "tritrun chat org/tiny-GGUF:TRIT2\n" in shown.text
    assert "tritrun chat org/tiny-GGUF:TRIT3\n" in shown.text
    assert "text.txt, SHA-256 " + sha256(text.read_bytes()).hexdigest() in shown.text
    assert "Tiny & small" in shown.text
    assert "method search of tritconv" in shown.text
    assert str(tmp_path) not in said + card.with_suffix(".svg").read_text()
    assert str(tmp_path.parent.name) not in said


MARKUP = st.sampled_from(list(" \\`*_[]()<>&|~#$!@:/.-+=w\"'"))


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | MARKUP, max_size=40))
def test_text_stays_text(text: str) -> None:
    text = " ".join(text.split())
    for write, tags in ((_plain, []), (_code, ["code"])):
        page = Reader(RENDERER.render(f"| a | b |\n| - | - |\n| x {write(text)} | y |"))
        inside = [tag for tag, _ in page.tags if tag not in ("table", "thead", "tbody", "tr", "th", "td")]
        assert inside in ([], tags)
        assert page.text.split() == ["a", "b", "x", *text.split(), "y"]


def test_hostile_names_harm_no_card() -> None:
    origin = Provenance(HOSTILE, HOSTILE, None, None, (HOSTILE,), (HOSTILE,), HOSTILE, HOSTILE, HOSTILE, (HOSTILE,))
    hostile = replace(row(HOSTILE), files=(File(HOSTILE, 1, "0" * 64),), provenance=origin)
    of = comparison(hostile)
    of = replace(of, conditions=replace(of.conditions, text=HOSTILE, command=f"tritrun {HOSTILE}"))
    card = as_card(of, CardOptions(quantized_by=HOSTILE, title=HOSTILE), "README.svg")
    header, body = split(card)
    assert header["license"] == "other"
    assert header["license_name"] == HOSTILE
    assert header["tags"] == ["gguf", "trit", "ternary"]
    assert "language" not in header
    assert "\n" not in header["quantized_by"]
    page = Reader(RENDERER.render(body))
    usual = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code", "strong", "img"}
    assert {tag for tag, _ in page.tags} <= usual
    assert [attributes["src"] for tag, attributes in page.tags if tag == "img"] == ["README.svg"]
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert " ".join(page.text.split()).count(" ".join(HOSTILE.split())) >= 9
    assert len(re.findall(r"<tr>", RENDERER.render(body))) == 5  # two headings, one file, two rows of figures


def test_directions_of_writing_do_not_leak() -> None:
    assert _plain("a\u202eb\u2066c") == "abc"


@pytest.mark.parametrize(
    ("stored", "link", "wanted"),
    [
        ("MIT", None, {"license": "mit"}),
        ("Tongyi Qianwen", None, {"license": "other", "license_name": "Tongyi Qianwen"}),
        ("other", "https://a.b/LICENSE", {"license": "other", "license_link": "https://a.b/LICENSE"}),
        ("mit", "javascript:alert(1)", {"license": "mit"}),
        (None, None, {}),
    ],
)
def test_licenses(stored: str | None, link: str | None, wanted: dict[str, str], tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        if stored:
            writer.add_license(stored)
        if link:
            writer.add_license_link(link)

    found = provenance(read_model_file(write_named_model(tmp_path / "x.gguf", add)))
    header, _ = split(as_card(comparison(row("TRIT2", provenance=found)), CardOptions(), None))
    assert {key: value for key, value in header.items() if key.startswith("license")} == wanted


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ({"trit.source": "org/one", "trit.revision": "c0ffee", "general.repo_url": f"{HUB}/org/two"}, "org/one"),
        ({"trit.source": "org/one", "general.repo_url": f"{HUB}/org/two"}, "org/two"),
        ({"general.source.repo_url": "https://huggingface.co/org/three/"}, "org/three"),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/four"}, "org/four"),
        ({"general.base_model.0.repo_url": "https://evil.example/org/four"}, None),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/four/../five"}, None),
        ({"trit.source": "../one", "trit.revision": "c0ffee"}, None),
        ({}, None),
    ],
)
def test_base_models(entries: dict[str, str], wanted: str | None, tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        for key, value in entries.items():
            writer.add_string(key, value)

    assert provenance(read_model_file(write_named_model(tmp_path / "x.gguf", add))).base_model == wanted


def test_a_model_is_named_by_its_type_where_that_is_enough() -> None:
    two, three = row("a", "TRIT2"), row("b", "TRIT3")
    mixed = row("c", contents=Contents("TRIT2", "gptq", {"TRIT2": 0.9, "TRIT4": 0.1}, 3.8, 4.0))
    for rows, lines in (
        ((two, three), ["org/x:TRIT2", "org/x:TRIT3"]),
        ((two, row("d")), ["org/x/a.gguf", "org/x/d.gguf"]),
        ((mixed, three), ["org/x/c.gguf", "org/x:TRIT3"]),
    ):
        card = as_card(comparison(*rows), CardOptions(repo="org/x"), None)
        assert re.findall(r"tritrun chat (.*)", card) == lines
    assert "tritrun chat a.gguf\n" in as_card(comparison(two), CardOptions(), None)


def test_files_made_to_compare_with_are_no_files_of_the_repository() -> None:
    card = as_card(comparison(row("ours"), row("TRIT3", "TRIT3"), row("Q4_K_M", "Q4_K")), CardOptions(), None)
    assert "`ours.gguf`" in card
    assert "TRIT3.gguf" not in card
    assert "| TRIT3 |" in card
    assert "| **ours** |" in card


def test_a_card_without_a_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = row("TRIT2")
    assert broken.divergence is not None
    broken = replace(broken, divergence=replace(broken.divergence, mean=Estimate(float("nan"), None)))
    write_card(comparison(broken), tmp_path / "README.md", CardOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "![" not in (tmp_path / "README.md").read_text()
    assert "the files name no license and no base_model" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["--repo", "org/x"], 2, "--repo and --quantized-by are for the card"),
        (["--card", "README.md", "--repo", "https://x/y"], 2, "--repo https://x/y: not of the form ORG/NAME"),
        (["--card", "card.svg"], 1, "--card card.svg: a card is Markdown"),
        (["--card", "README.md"], 1, "none of the models has TRIT types"),
        (["--card", "none/README.md", "--recipe", "Q4_K"], 1, "none of the models has TRIT types"),
    ],
)
def test_cards_that_cannot_be(
    arguments: list[str], exit_code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "tiny.gguf")
    result = run("--base", model, "--text", "text.txt", *arguments, model, exit_code=exit_code)
    assert words in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == [model]


def test_a_stand_in_is_no_file_to_publish(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_string(STAND_IN_TYPE, "TRIT2")
        writer.add_float32(STAND_IN_BITS, 3.5)

    model = write_named_model(tmp_path / "stand-in.gguf", add)
    with pytest.raises(TritError, match="none of the models has TRIT types"):
        check_card(tmp_path / "README.md", [str(model)])
