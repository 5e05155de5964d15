"""The page and the charts of tritrun compare: what they say, and how a real browser shows them."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from browser import Page, find_browser, open_browser
from hypothesis import given
from hypothesis import strategies as st

from tritcore.errors import TritError
from tritrun.charts import as_svg, charts_of
from tritrun.comparison import Comparison, Conditions, Contents, Row
from tritrun.naming import labels_of
from tritrun.page import as_page
from tritrun.perplexity import Divergence
from tritrun.perplexity_log import Estimate
from tritrun.placement import Box, place
from tritrun.rounds import Spread
from tritrun.scatter import _DARK, _LIGHT, FAMILIES, Chart, Point

HOSTILE = "<img src=x onerror=alert(1)>&\"'</script><b>"
WIDE, PHONE = 1280, 390


def row(label: str, mean: float, megabytes: float = 80.0, speed: float = 50.0, kind: str = "Q4_K") -> Row:
    contents = Contents(kind, None, {kind: 0.75, "Q8_0": 0.25}, layer_bits=megabytes / 20, bits=megabytes / 18)
    divergence = Divergence(
        base_perplexity=Estimate(20.0, 0.5),
        mean=Estimate(mean, mean / 20),
        median=mean / 2,
        percentile_99_9=mean * 10,
        maximum=mean * 20,
        same_top=Estimate(90.0, 0.5),
    )
    speeds = {"decode": Spread(speed, speed * 0.9, speed * 1.05), "prompt": Spread(speed * 9, speed * 8, speed * 10)}
    return Row(
        label, f"{label}.gguf", "0" * 64, int(megabytes * 1e6), contents, Estimate(21.0, 0.6), divergence, speeds
    )


def comparison(*rows: Row) -> Comparison:
    base = replace(row("F16", 0.0, 270, 20, "F16"), divergence=None)
    conditions = Conditions(
        command="tritrun compare --base F16.gguf",
        date="2026-11-22T05:29+00:00",
        text="wiki.test.raw",
        text_sha256="1" * 64,
        ctx=512,
        chunks=24,
        recipes=("Q4_K_M",),
        calibration="train.txt",
        threads=2,
        cpu="haswell",
        machine={"cpu": "A CPU", "cores": 2, "architecture": "x86_64", "system": "Linux"},
        speed={"rounds": 5, "prompt_tokens": 512, "answer_tokens": 64},
        versions={"trit-gguf": "0.1.0", "llama-cpp-python": "0.3.36", "libraries": "2" * 64},
    )
    return Comparison("A model", base, rows, conditions)


TYPICAL = comparison(
    row("TRIT2 search", 0.75, 78.4, 101, "TRIT2"),
    row("TRIT2 imatrix", 0.46, 78.5, 149, "TRIT2"),
    row("TRIT2 gptq", 0.31, 78.6, 140, "TRIT2"),
    row("IQ3_S", 0.19, 88.2, 48, "IQ3_S"),
    row("IQ4_XS", 0.11, 90.9, 46, "IQ4_XS"),
    row("Q3_K_M", 0.10, 93.5, 59, "Q3_K"),
    row("TRIT3 gptq", 0.05, 101.7, 74, "TRIT3"),
    row("Q4_K_M", 0.036, 105.5, 50),
    row("Q5_K_M", 0.0071, 112.1, 40, "Q5_K"),
    row("TRIT4 search", 0.0132, 121.6, 72, "TRIT4"),
    row("Q8_0", 0.0011, 144.0, 44, "Q8_0"),
)
CROWDED = comparison(
    row(HOSTILE, 0.2, 90, 60),
    row("a name that is far too long to stand in a chart beside its point " * 3, 0.21, 90.2, 60.5, "TRIT2"),
    *(row(f"Q{i}_K_M", 0.2 + 0.002 * i, 90 + 0.1 * i, 60 + 0.2 * i) for i in range(20)),
    *(row(f"TRIT2 \u6f22\u5b57 {i}", 0.2 + 0.002 * i, 90 - 0.1 * i, 60 - 0.2 * i, "TRIT2") for i in range(4)),
    row("broken", float("nan"), 95),
    row("the same", 0.0, 95, kind="IQ4_XS"),
    replace(
        row("Q3_K across", 0.3, 244, kind="Q3_K"),
        contents=Contents("Q3_K", None, {"Q3_K": 1.0}, 3.4375, 14.5, stand_in=True),
        speed=None,
    ),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    program = find_browser()
    if program is None:
        pytest.skip("there is no Chromium and no Chrome")
    with open_browser(program) as page:
        yield page


@pytest.fixture(scope="module", params=["typical", "crowded"])
def report(request: pytest.FixtureRequest) -> Comparison:
    return {"typical": TYPICAL, "crowded": CROWDED}[request.param]


@pytest.fixture(scope="module")
def file(report: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `report`."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(as_page(report), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def typical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of TYPICAL."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(as_page(TYPICAL), encoding="utf-8")
    return path


class Reader(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def test_the_page_is_self_contained_and_well_formed(file: Path) -> None:
    page = file.read_text(encoding="utf-8")
    tags = Reader(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        assert tag not in ("img", "iframe", "object", "embed", "image", "use")
        for name in ("src", "href", "xlink:href", "data", "action"):
            address = attributes.get(name)
            assert address is None or address == "data:," or (address[0] == "#" and address[1:] in ids)
        assert not any(name.startswith("on") for name in attributes)
    without_namespaces = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|@font-face", without_namespaces)


def test_the_page_can_be_read_without_eyes(typical: Path) -> None:
    tags = Reader(typical.read_text(encoding="utf-8")).tags
    assert ("html", {"lang": "en"}) in tags
    charts = [attributes for tag, attributes in tags if tag == "svg" and attributes.get("role") == "group"]
    assert len(charts) == 4  # two, each wide and narrow
    names = {attributes.get("id") for tag, attributes in tags if tag in ("title", "desc")}
    assert all(set((chart["aria-labelledby"] or "").split()) <= names for chart in charts)
    heads = [attributes for tag, attributes in tags if tag == "th"]
    assert {head["scope"] for head in heads} == {"col", "colgroup", "row"}
    assert sum(head["scope"] == "row" for head in heads) == 1 + len(TYPICAL.rows)


def test_the_svg_file_stands_alone() -> None:
    root = ElementTree.fromstring(as_svg(CROWDED))
    space = "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{space}title") == "A model: KL divergence against size"
    assert HOSTILE in (root.findtext(f"{space}desc") or "")
    assert "prefers-color-scheme: dark" in (root.findtext(f"{space}style") or "")
    assert not list(root.iter(f"{space}a"))  # an image cannot lead anywhere
    points = [group.get("data-label") for group in root.iter(f"{space}g") if group.get("class") == "point"]
    assert len(points) == len(CROWDED.rows) - 2  # the broken file, and the one without a size
    with pytest.raises(TritError, match="nothing to draw"):
        as_svg(comparison(row("broken", float("inf"))))


def test_figures_that_json_cannot_hold() -> None:
    report = json.loads(CROWDED.as_json())
    by_label = {model["label"]: model for model in report["models"]}
    assert len(by_label) == len(CROWDED.rows) + 1
    assert by_label["broken"]["divergence"]["mean"]["value"] is None
    assert by_label["F16"]["base"]
    assert by_label["F16"]["divergence"] is None
    assert by_label["Q3_K across"]["contents"]["stand_in"]
    assert by_label["Q3_K across"]["speed"] is None


def point(label: str, x: float, y: float) -> Point:
    return Point(label, "other", x, y)


def test_the_line_of_the_best() -> None:
    points = [point("a", 80, 0.5), point("b", 90, 0.2), point("c", 91, 0.3), point("d", 100, 0.1), point("e", 99, 0.1)]
    chart = Chart("x", "", "", "", "", points)
    assert [best.label for best in chart.front()] == ["a", "b", "e"]
    assert [best.label for best in replace(chart, more_is_better=True).front()] == ["d"]
    # a file that is larger by the length of its name is not larger
    twins = replace(chart, points=[point("short", 80.000, 0.5), point("long", 80.001, 0.4)])
    assert [best.label for best in twins.front()] == ["long"]


@pytest.mark.parametrize(
    ("base", "names", "expected"),
    [
        ("M-F16.gguf", ["M-Q4_K_M.gguf", "M-TRIT2-gptq.gguf"], ["F16", "Q4_K_M", "TRIT2-gptq"]),
        ("base.gguf", ["M-1B-TRIT2.gguf", "M-1B-TRIT3.gguf"], ["base", "TRIT2", "TRIT3"]),
        ("base.gguf", ["M-TRIT2.gguf"], ["base", "M-TRIT2"]),
        ("a-.gguf", ["a-b.gguf"], ["a-", "b"]),
        ("base.gguf", [], ["base"]),
    ],
)
def test_labels_from_file_names(base: str, names: list[str], expected: list[str]) -> None:
    assert labels_of(base, names) == expected


@given(st.lists(st.tuples(st.floats(0, 400), st.floats(0, 300), st.floats(1, 120)), max_size=25))
def test_labels_never_overlap(points: list[tuple[float, float, float]]) -> None:
    area = Box(0, 0, 400, 300)
    marks = [Box(x - 5, y - 5, 10, 10) for x, y, _ in points]
    placed = place([(mark, width, 15) for mark, (_, _, width) in zip(marks, points, strict=True)], area)
    boxes = [box for box in placed if box is not None]
    assert all(area.contains(box) for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(a.overlaps(b) for a in boxes for b in marks)
    if len(points) == 1 and 140 < points[0][0] < 260 and 30 < points[0][1] < 270:
        assert boxes


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [_LIGHT, _DARK], ids=["light", "dark"])
def test_text_stands_out_from_the_paper(palette: dict[str, str]) -> None:
    paper = luminance(palette["paper"])
    for name in ("ink", "faint", *FAMILIES):
        lighter, darker = sorted([paper, luminance(palette[name])], reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


# What the browser lays out: a box for each thing that is to be seen, in px of the window.
SHOWN = """(selector => [...document.querySelectorAll(selector)].map(e => [e, e.getBoundingClientRect()])
  .filter(([e, r]) => r.width && r.height)
  .map(([e, r]) => ({x: r.x, y: r.y + scrollY, width: r.width, height: r.height, text: e.textContent})))"""


def shown(page: Page, selector: str) -> list[tuple[Box, str]]:
    found = page.evaluate(f"{SHOWN}({json.dumps(selector)})")
    return [(Box(e["x"], e["y"], e["width"], e["height"]), e["text"]) for e in found]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, 800, PHONE])
def test_a_browser_shows_all_of_it(browser: Page, report: Comparison, file: Path, width: int, dark: bool) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(file, width, dark=dark)
    assert browser.complaints == []
    assert browser.requests == [file.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert browser.evaluate("document.images.length") == 0

    charts = charts_of(report)
    plots = [box for box, _ in shown(browser, "figure svg")]
    assert len(plots) == len(charts) == (3 if report is CROWDED else 2)
    for number, chart in enumerate(charts):
        figure = f"figure#{chart.name} svg"
        marks = [box for box, _ in shown(browser, f"{figure} .point g")]
        labels = [box for box, _ in shown(browser, f"{figure} .point text")]
        scale = [box for box, _ in shown(browser, f"{figure} > text")]
        assert len(marks) == len(chart.points)
        assert len(labels) == len(marks) or report is CROWDED
        for box in (*marks, *labels, *scale):
            assert 0 <= box.x < box.right <= width
            assert plots[number].contains(box)
        assert not any(a.overlaps(b) for a, b in combinations(labels + scale, 2))
        font_sizes = browser.evaluate(
            f"[...document.querySelectorAll('{figure} text')].filter(t => t.getBoundingClientRect().height)"
            ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
        )
        assert min(font_sizes) >= 11

    rows = shown(browser, "tbody tr")
    assert len(rows) == 1 + len(report.rows)
    labels_shown = [text for _, text in shown(browser, "tbody th bdi")]
    assert labels_shown == [report.base.label, *(row.label for row in report.rows)]
    assert all(box.x >= 0 and box.right <= width for box, _ in shown(browser, "tbody th"))
    if width == WIDE and report is TYPICAL:  # nothing to scroll sideways
        assert all(box.right <= width for box, _ in rows)


def test_labels_of_a_typical_report_are_all_there(browser: Page, tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    path.write_text(as_svg(TYPICAL), encoding="utf-8")
    browser.complaints.clear()
    browser.open(path, 800)
    assert browser.complaints == []
    labels = shown(browser, ".point text")
    assert {text for _, text in labels} == {row.label for row in TYPICAL.rows}
    assert not any(a.overlaps(b) for (a, _), (b, _) in combinations(labels, 2))


def test_rows_can_be_ordered(browser: Page, typical: Path) -> None:
    browser.open(typical, WIDE)
    by_divergence = [row.label for row in sorted(TYPICAL.rows, key=lambda row: row.divergence.mean.value)]  # type: ignore[union-attr]
    click = "[...document.querySelectorAll('thead button')].find(b => b.textContent === 'mean').click()"
    for expected, order in ((by_divergence, "ascending"), (by_divergence[::-1], "descending")):
        browser.evaluate(click)
        assert [text for _, text in shown(browser, "tbody.files bdi")] == expected
        assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == order
        assert shown(browser, "tbody.base bdi")[0][1] == "F16"


def test_the_keyboard_leads_from_a_point_to_its_row(browser: Page, typical: Path) -> None:
    browser.open(typical, WIDE)
    browser.press("Tab")
    label = browser.evaluate("document.activeElement.dataset.label")
    browser.press("Enter")
    assert label in {row.label for row in TYPICAL.rows}
    assert browser.evaluate("document.querySelector('tr:target bdi').textContent") == label
