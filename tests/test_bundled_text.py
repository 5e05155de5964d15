"""The calibration text that comes with tritconv."""

import json
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from tritconv.calibration import bundled
from tritconv.calibration.text import render

FOLDER = bundled.PATH.parent


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    with bundled.PATH.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_about_a_megabyte_of_many_kinds(records: list[dict[str, Any]]) -> None:
    assert 0.9e6 < bundled.PATH.stat().st_size < 1.2e6
    assert len(records) > 300
    assert sum("messages" in record for record in records) > 50
    assert len({record["source"] for record in records}) > 30


def test_every_source_is_listed_with_its_size(records: list[dict[str, Any]]) -> None:
    table = re.findall(r"^\| ([\w.-]+) \|.*\| ([\d,]+) \|$", (FOLDER / "SOURCES.md").read_text("utf-8"), re.MULTILINE)
    listed = {name: int(size.replace(",", "")) for name, size in table}
    sizes: Counter[str] = Counter()
    for record in records:
        parts = [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]
        sizes[record["source"]] += sum(len(part.encode()) for part in parts)
    assert listed.keys() == sizes.keys()
    for name, size in sizes.items():
        assert listed[name] == pytest.approx(size, rel=0.1), name


def test_conversations_go_through_the_chat_template() -> None:
    def template(messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    documents = [one for one in bundled.documents() if one.messages]
    texts = render(documents, SimpleNamespace(chat_template="yes", apply_chat_template=template))
    assert all(text.control and text.text.startswith(("<system>", "<user>")) for text in texts)


def test_conversations_without_a_template_or_that_it_refuses_are_text() -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ValueError("no system messages")

    documents = [one for one in bundled.documents() if one.messages]
    for tokenizer in (
        SimpleNamespace(chat_template=None),
        SimpleNamespace(chat_template="yes", apply_chat_template=refuse),
    ):
        for text, document in zip(render(documents, tokenizer), documents, strict=True):
            assert not text.control
            assert text.text == "\n\n".join(message["content"] for message in document.messages)
