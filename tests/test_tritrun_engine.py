"""tritrun's engine on a tiny model: prompts, templates, streaming."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import TRAINED_CONTEXT, write_tiny_model

from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritrun.engine import Encoded, Engine, until
from tritrun.llama import load_bindings
from tritrun.loading import Loading
from tritrun.sampling import GREEDY, Sampling
from tritrun.template import Message

pytestmark = pytest.mark.build

BOS = 1
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
HELLO: list[Message] = [{"role": "user", "content": "hello"}]


def load(path: Path, n_ctx: int | None = 512) -> Engine:
    return Engine(read_model_file(path), Loading(n_ctx))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with load(tiny_model) as loaded:
        yield loaded


@given(before=st.text("\nUser:x"), after=st.text("\nUser:x"), cuts=st.lists(st.integers(0, 40)))
def test_until_finds_the_stop_wherever_it_is_cut(before: str, after: str, cuts: list[int]) -> None:
    text = before + "\nUser:" + after
    marks = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(marks)]
    assert "".join(until(["\nUser:"], pieces)) == text.partition("\nUser:")[0]


@given(pieces=st.lists(st.text("\nUse!")))
def test_until_passes_on_all_text_without_the_stop(pieces: list[str]) -> None:
    assert "".join(until(["\nUser:"], pieces)) == "".join(pieces)


def text_of(engine: Engine, prompt: Encoded) -> str:
    return b"".join(map(engine.piece, prompt.tokens)).decode()


def test_template_renders_with_one_bos(engine: Engine) -> None:
    prompt = engine.encode([{"role": "system", "content": "be good"}, *HELLO])
    assert prompt.tokens[0] == BOS
    assert BOS not in prompt.tokens[1:]
    assert text_of(engine, prompt) == "<system>be good\n<user>hello\n<assistant>"


def test_bos_is_added_if_the_template_forgets_it(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template="{{ messages[0].content }}")) as engine:
        prompt = engine.encode(HELLO)
        assert prompt.tokens[0] == BOS
        assert text_of(engine, prompt) == "hello"


def test_plain_lines_without_a_template(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template=None)) as engine:
        assert not engine.has_chat_template
        prompt = engine.encode([{"role": "system", "content": "be good "}, *HELLO])
        assert prompt.tokens[0] == BOS
        assert text_of(engine, prompt) == "be good\nUser: hello\nAssistant:"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no chats today') }}", "no chats today"),
        ("{{ messages[7].content.upper() }}", "has no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),  # the sandbox
        ("{% for %}", "line 1: "),
        ("{{ bos_token }}", "it leaves out the user's message"),
    ],
)
def test_a_template_of_no_use_is_named_and_chats_are_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, reason: str
) -> None:
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template=template)) as engine:
        (note,) = capsys.readouterr().err.splitlines()
        assert note.startswith("the model's chat template (tokenizer.chat_template) cannot be used: ")
        assert reason in note
        assert not engine.has_chat_template
        assert text_of(engine, engine.encode(HELLO)) == "User: hello\nAssistant:"


def test_a_template_that_refuses_a_chat_is_left_for_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}{{ messages[0].content }}"
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template=template)) as engine:
        assert text_of(engine, engine.encode(HELLO)) == "hello"
        chat: list[Message] = [*HELLO, {"role": "assistant", "content": "ho"}, *HELLO]
        assert text_of(engine, engine.encode(chat[:3])) == "hello"
        assert capsys.readouterr().err == ""
        assert text_of(engine, engine.encode([*chat, chat[1], *HELLO])).endswith("User: hello\nAssistant:")
        assert "refuses this chat: too long; using plain" in capsys.readouterr().err
        assert not engine.has_chat_template


def test_answers_repeat_and_count(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    first = engine.answer(prompt, GREEDY, max_tokens=20)
    again = engine.answer(prompt, GREEDY, max_tokens=20)
    text = "".join(first)
    assert text
    assert text == "".join(again)
    assert (first.prompt_tokens, first.answer_tokens, first.finish) == (len(prompt), 20, "max-tokens")
    assert first.prompt_seconds > 0
    assert first.tokens_per_second > 0


def test_seed_decides(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    texts = ["".join(engine.answer(prompt, Sampling(1.5, top_p=1.0, seed=seed), 30)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_answer_ends_with_the_context(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    answer = engine.answer(prompt, GREEDY)
    assert "".join(answer)
    assert answer.finish == "context"
    assert len(prompt) + answer.answer_tokens == engine.n_ctx


def test_next_turn_reads_only_what_is_new(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    long: list[Message] = [{"role": "user", "content": "x" * 300}]
    answer = engine.answer(engine.encode(long), GREEDY, 10)
    reply = "".join(answer)
    turn: list[Message] = [
        *long,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": "go on"},
    ]
    read: list[int] = []
    compute = engine._llama.compute

    def spy(tokens: Sequence[int]) -> None:
        read.append(len(tokens))
        compute(tokens)

    monkeypatch.setattr(engine._llama, "compute", spy)
    assert next(iter(engine.answer(engine.encode(turn), GREEDY, 10)))
    assert read[0] < 100 < len(engine.encode(turn))


def test_an_answer_left_early_does_not_disturb_the_next(engine: Engine) -> None:
    prompt = engine.encode(HELLO)
    expected = "".join(engine.answer(prompt, GREEDY, 20))
    left = engine.answer(engine.encode([{"role": "user", "content": "else"}]), GREEDY, 20)
    assert list(islice(left, 3))
    assert "".join(engine.answer(prompt, GREEDY, 20)) == expected


@pytest.mark.parametrize(("asked", "context"), [(None, 4096), (0, TRAINED_CONTEXT), (100, 100)])
def test_context_length(tiny_model: Path, asked: int | None, context: int) -> None:
    with load(tiny_model, n_ctx=asked) as engine:
        assert engine.n_ctx == context


def test_context_that_is_no_multiple_of_256_can_be_filled(tiny_model: Path) -> None:
    with load(tiny_model, n_ctx=100) as engine:
        prompt = engine.encode(HELLO)
        answer = engine.answer(prompt, GREEDY)
        assert len("".join(answer)) == 100 - len(prompt)


def test_llama_cpp_says_why_it_refuses(tmp_path: Path, tiny_model: Path) -> None:
    # A sound file to our reader, but not a model: the architecture is one that llama.cpp does not know.
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_model.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0lxama", 1))
    with pytest.raises(TritError, match=r"llama\.cpp cannot load it: .*unknown model architecture: 'lxama'"):
        load(path)


def test_loading_can_be_interrupted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings, _ = load_bindings()
    calls = []
    make_callback = bindings.llama_progress_callback

    def interrupting(goes_on: Callable[[float, None], bool]) -> object:
        def on_progress(progress: float, data: None) -> bool:
            calls.append(progress)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
            return goes_on(progress, data)

        return make_callback(on_progress)

    monkeypatch.setattr(bindings, "llama_progress_callback", interrupting)
    with pytest.raises(KeyboardInterrupt):
        load(tiny_model)
    assert len(calls) < len(read_model_file(tiny_model).tensors)


@pytest.mark.parametrize("size", [1023, 1024, 1025])
def test_a_template_of_any_size_is_whole(tmp_path: Path, size: int) -> None:
    source = "{{ messages[0].content }}"
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=source + "." * (size - len(source)))
    with load(path, n_ctx=2048) as engine:
        assert text_of(engine, engine.encode(HELLO)) == "hello" + "." * (size - len(source))


def test_content_in_parts(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template=template)) as engine:
        assert text_of(engine, engine.encode(HELLO)) == "<user>hello"


def test_a_system_prompt_that_the_template_does_not_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    with load(write_tiny_model(tmp_path / "m.gguf", chat_template=template)) as engine:
        for _ in range(2):
            assert (
                text_of(engine, engine.encode([{"role": "system", "content": "be good"}, *HELLO])) == "be good\n\nhello"
            )
        assert capsys.readouterr().err.splitlines() == [
            "the model's chat template takes no system prompt: it goes before the first question"
        ]


def test_control_tokens_cannot_be_typed(engine: Engine) -> None:
    chat: list[Message] = [
        {"role": "system", "content": "<s>"},
        {"role": "user", "content": "a</s>b<unk>"},
        {"role": "assistant", "content": "</s>"},
        *HELLO,
    ]
    prompt = engine.encode(chat)
    assert not {0, 1, 2} & {*prompt.tokens[1:]}
    assert text_of(engine, prompt) == "<system><s>\n<user>a</s>b<unk>\n<assistant></s>\n<user>hello\n<assistant>"


def _memory_with_huge_pages() -> int:
    """Bytes of this process for which huge pages were asked."""
    regions = Path("/proc/self/smaps").read_text(encoding="utf-8")
    sizes = re.findall(r"^Size: +(\d+) kB$.*?^VmFlags: ([a-z ]*)$", regions, re.MULTILINE | re.DOTALL)
    return 1024 * sum(int(size) for size, flags in sizes if "hg" in flags.split())


@pytest.mark.skipif(not _HUGE_PAGES.exists(), reason="this kernel has no huge pages that can be asked for")
def test_weights_lie_in_huge_pages(smollm2_trit3: Path) -> None:
    weights = sum(tensor.n_bytes for tensor in read_model_file(smollm2_trit3).tensors if tensor.type.name == "TRIT3")
    before = _memory_with_huge_pages()
    with load(smollm2_trit3):
        assert _memory_with_huge_pages() - before > 0.95 * weights
