"""Reasoning is told from the answer, wherever the text is cut."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritrun.reasoning import is_in_mark, split

CASES = [
    # text, end of the prompt, reasoning, answer
    ("<think>\nwhy</think>\n\nSo.", "", "\nwhy", "So."),
    ("why </thi </think>So.", "<|im_start|>assistant\n<think>\n", "why </thi ", "So."),
    ("So. <think> is a tag.", "<think>\n\n</think>\n\n", "", "So. <think> is a tag."),
    ("Plain < text </think> so", "", "", "Plain < text </think> so"),
    ("[THINK]why[/THINK]So.", "[/INST]", "why", "So."),
    ("<|channel>thought\nwhy<channel|>So.", "<|turn>model\n", "thought\nwhy", "So."),
    ("So.", "<|channel>thought\n<channel|>", "", "So."),
    ("<|START_THINKING|>why<|END_THINKING|><|START_RESPONSE|>So.<|END_RESPONSE|>", "", "why", "So."),
    ("<think>why</think>\n<answer>So.</answer>", "", "why", "So."),
    ("<|channel|>analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>So.", "", "why", "So."),
    ("<|channel|>final<|message|>So.", "<|end|><|start|>assistant", "", "So."),
    ("analysis<|message|>why<|end|><|start|>assistant<|channel|>final<|message|>So.", "<|start|>assistant<|channel|>",
     "why", "So."),
    ("<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>", "<|start|>assistant", "{}", ""),
    ("<|channel|>analysis<|message|>why", "<|start|>assistant", "why", ""),
    ("<think>no end", "", "no end", ""),
    ("<thi", "", "", "<thi"),
    (" \n<seed:think>why</seed:think>So.", "", "why", "So."),
    ("", "<think>", "", ""),
]  # fmt: skip


def parts(pieces: list[str], opening: str) -> tuple[str, str]:
    found: dict[str, str] = defaultdict(str)
    for kind, text in split(pieces, opening):
        assert text
        found[kind] += text
    return found["reasoning"], found["answer"]


@pytest.mark.parametrize(("text", "opening", "reasoning", "answer"), CASES)
def test_cut_anywhere(text: str, opening: str, reasoning: str, answer: str) -> None:
    for at in range(len(text) + 1):
        assert parts([text[:at], text[at:]], opening) == (reasoning, answer)
    for size in range(1, 9):
        assert parts([text[n : n + size] for n in range(0, len(text), size)], opening) == (reasoning, answer)


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 99)))
def test_cut_often(case: tuple[str, str, str, str], cuts: list[int]) -> None:
    text, opening, reasoning, answer = case
    marks = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    assert parts([text[start:end] for start, end in pairwise(marks)], opening) == (reasoning, answer)


@given(pieces=st.lists(st.text("<|>/[]thinkTHINK \nab")))
def test_nothing_is_lost_without_a_mark_at_the_beginning(pieces: list[str]) -> None:
    assert parts(["So. ", *pieces], "") == ("", "".join(["So. ", *pieces]))


def test_text_comes_as_soon_as_it_is_sure() -> None:
    def pieces() -> list[str]:
        return ["<think>", "wh", "y", "</", "think>", "S", "o."]

    assert list(split(pieces())) == [
        ("reasoning", "wh"),
        ("reasoning", "y"),
        ("answer", "S"),
        ("answer", "o."),
    ]


def test_control_tokens_of_marks() -> None:
    assert all(map(is_in_mark, ("<|channel|>", "<|message|>", "[THINK]", "<think>", "<channel|>")))
    assert not any(map(is_in_mark, ("", "<s>", "</s>", "<|im_end|>", "[INST]")))
