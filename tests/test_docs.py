"""The documentation: links lead somewhere, and the reference has every option, metadata key and variable."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
CODE = ("core", "convert", "runtime")
FOLDERS = (*CODE, "bench", "docs", "models", "tests", "vendor")
TEXT = (".c", ".cpp", ".cu", ".cuh", ".h", ".md", ".patch", ".py", ".toml")
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")) + sorted(ROOT.glob("*.md"))


def sources(*folders: str) -> Iterator[tuple[Path, str]]:
    """Path and contents of each text file in the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in TEXT and path.is_file() and path != Path(__file__):
                yield path, path.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*/*.md"):
        assert f"({page.relative_to(ROOT / 'docs').as_posix()})" in index


def test_pages_that_code_names_exist() -> None:
    named = {
        (path, found) for path, text in sources(*FOLDERS) for found in re.findall(r"\bdocs/[\w/-]+\.(?:md|svg)", text)
    }
    upstream = ("docs/gguf.md",)  # of ggml
    assert len(named) > 5
    for path, found in named:
        assert found in upstream or (ROOT / found).is_file(), f"{path}: {found}"


def commands(app: typer.Typer, name: str) -> Iterator[tuple[str, Any]]:
    """Name and click command of each command of an application, groups included."""
    waiting = [(name, typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        yield name, command
        waiting += [(f"{name} {word}", sub) for word, sub in getattr(command, "commands", {}).items()]


def sections() -> dict[str, str]:
    """Text of options.md by the commands that its headings name."""
    parts = re.split(r"^## (.*)\n", (REFERENCE / "options.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {"tritconv": parts[0], "tritrun": parts[0]}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        for command in heading.split(", "):
            words = [word for word in command.split() if re.fullmatch(r"[a-z-]+", word)]
            named[" ".join(words)] = text
    return named


@pytest.mark.build
@pytest.mark.parametrize("program", ["tritconv", "tritrun"])
def test_the_reference_has_every_option(program: str) -> None:
    from tritconv.cli import app as tritconv
    from tritrun.cli import app as tritrun

    app = {"tritconv": tritconv, "tritrun": tritrun}[program]
    found = {}
    for name, command in commands(app, program):
        options = [param for param in command.params if param.param_type_name == "option"]
        found[name] = {word for option in options for word in (*option.opts, *option.secondary_opts)}
    assert len(found) > 4
    documented = {name: text for name, text in sections().items() if name.split()[0] == program}
    assert documented.keys() == found.keys()
    for name, text in documented.items():
        words = set(re.findall(r"`(--?[a-zA-Z-]+)`", text))
        assert found[name] <= words, name
    everywhere = {word for text in documented.values() for word in re.findall(r"^\| `(--[a-z-]+)`", text, re.MULTILINE)}
    assert everywhere <= {word for words in found.values() for word in words}


def test_the_reference_has_every_metadata_key() -> None:
    text = (REFERENCE / "metadata.md").read_text(encoding="utf-8")
    keys = {key for _, code in sources(*CODE) for key in re.findall(r'"(trit\.[a-z_.]+)"', code)}
    assert len(keys) > 8
    assert keys == set(re.findall(r"`(trit\.[a-z_.]+)`", text))


def test_the_reference_has_every_variable() -> None:
    text = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    names = {name for _, code in sources(*CODE) for name in re.findall(r'"(TRIT[A-Z]*_[A-Z_]+)"', code)}
    assert {"TRITCONV_CACHE", "TRITCONV_CACHE_SIZE"} <= names
    assert names <= set(re.findall(r"`([A-Z_]+)`", text))
