"""Text to calibrate on: whatever editors and data pipelines write is read, or one line says why not."""

import gzip
import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tensors import tensor_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tritconv.calibration import documents, rare_words
from tritconv.calibration.context import Context, fitting
from tritconv.calibration.documents import Document, read
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.rows import RowMap
from tritconv.calibration.text import Text, TextOptions, render, sequences
from tritconv.cli import app
from tritconv.plan import Plan
from tritconv.sources.source import Origin, Source
from tritcore.errors import TritError

LENGTH = 32
TEXT = "Größe, naïve, 日本語 and 🙂\n\nThe second paragraph.\n"
MESSAGES = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": "No."}]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture
def tokenizer() -> Any:
    """A token for each byte, and two control tokens; the first of them starts a text."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def file_of(folder: Path, content: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts_of(path: Path, n_tokens: int = 1024) -> list[str]:
    return [document.text for document in read([path], n_tokens)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding: str, newline: str, tmp_path: Path) -> None:
    content = TEXT * 3000  # several pieces, with characters and line ends that they cut
    mark = "\ufeff" if encoding.endswith("be") else ""
    assert texts_of(file_of(tmp_path, (mark + content.replace("\n", newline)).encode(encoding))) == [content]


def test_a_character_that_the_end_cuts_is_left_out(tmp_path: Path) -> None:
    assert texts_of(file_of(tmp_path, "Größe 日".encode()[:-1])) == ["Größe "]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no text"),
        (b" \r\n\t\n", "holds no text"),
        (b"caf\xe9 au lait", r"not UTF-8 text \(byte 3 is 0xe9\): if it is in Latin-1, .*iconv -f ISO-8859-1 -t UTF-8"),
        (b"a" * 100_000 + b"\xe9 b", r"byte 100000 is 0xe9"),
        ("é".encode() * 50_000 + b"\xff", r"byte 100000 is 0xff"),
        (b"some\0bytes and more of them", "no text: byte 4 is NUL$"),
        ("no mark, though".encode("utf-16-le"), r"byte 1 is NUL: if it is in UTF-16, .*iconv -f UTF-16LE"),
        ("no mark, though".encode("utf-16-be"), r"byte 0 is NUL: if it is in UTF-16, .*iconv -f UTF-16BE"),
        (b"\xff\xfe\x00\xd8a\x00", r"begins as UTF-16-LE text but is damaged \(byte 2"),
        (gzip.compress(b"text", mtime=0), r"compressed with gzip: give --calibrate <\(gzip -dc "),
        (b"\x28\xb5\x2f\xfd....", r"compressed with zstd"),
        (b"PAR1\x15\x04", "a Parquet table.*export it as JSON lines"),
        (b"ARROW1\0\0", "an Arrow table"),
        (b"\xff\xff\xff\xff\x10\0\0\0", "an Arrow stream"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
    ],
)
def test_what_is_no_text(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TritError, match=reason) as refused:
        read([file_of(tmp_path, content)], 1024)
    assert "\n" not in str(refused.value)
    assert "text.txt" in str(refused.value)


def test_folders_and_missing_files(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "nowhere", "no such file")):
        with pytest.raises(TritError, match=reason):
            read([path], 1024)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (TEXT, [TEXT]),
        ('\n{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('[{"text": "one"}]', ["one"]),
        ("{curly} text", ["{curly} text"]),
        ("[1] a footnote", ["[1] a footnote"]),
    ],
)
def test_a_pipe_is_read_once(content: str, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def feed() -> None:
        with path.open("wb", buffering=0) as pipe:
            for byte in content.encode():  # little at a time
                pipe.write(bytes([byte]))

    thread = threading.Thread(target=feed)
    thread.start()
    assert texts_of(path) == texts
    thread.join()
    assert documents.name_of(path) == "a pipe"


def test_json_lines_as_pipelines_write_them(tmp_path: Path) -> None:
    strings = ["one\u2028line", "and\x85this", "\ttab", "\u0000nul", "half \ud83d", "😀"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in strings[:2]]
    lines += ["", "  ", *(json.dumps({"text": text, "score": float("nan")}) for text in strings[2:]), '{"text": ""}']
    content = "\r\n".join(lines).encode("utf-8-sig")
    found = texts_of(file_of(tmp_path, content, "data.jsonl"))
    assert found == ["one\u2028line", "and\x85this", "\ttab", " nul", "half ?", "😀"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "DATA.NDJSON"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("as_array", [True, False])
def test_arrays_and_records_one_after_the_other(name: str, indent: int | None, as_array: bool, tmp_path: Path) -> None:
    records = [{"text": f"number {i}", "more": [{"role": "x"}]} for i in range(5000)]
    lines = "\n".join(json.dumps(record, indent=indent) for record in records)
    content = json.dumps(records, indent=indent) if as_array else lines
    assert texts_of(file_of(tmp_path, content, name)) == [record["text"] for record in records]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"content": "a file"}, "a file"),
        ("a string", "a string"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 = 4"),
        ({"prompt": "2 + 2 =", "response": " 4"}, "2 + 2 = 4"),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "<s>user: Add.\n\n2, 2</s><s>assistant: 4</s>"),
        ({"instruction": "Add.", "input": "", "output": "4"}, "<s>user: Add.</s><s>assistant: 4</s>"),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, "<s>user: Say something.</s><s>assistant: No.</s>"),
        ({"messages": MESSAGES}, "<s>user: Say something.</s><s>assistant: No.</s>"),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            "<s>user: Hi</s><s>assistant: Ho</s>",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            "<s>user: ab</s>",
        ),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}]},
            "<s>user: Say something.</s><s>assistant: No.</s><s>assistant: </s>",
        ),
        (MESSAGES, "<s>user: Say something.</s><s>assistant: No.</s>"),
        ([MESSAGES], "<s>user: Say something.</s><s>assistant: No.</s>"),
    ],
)
def test_records(record: Any, text: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    path = file_of(tmp_path, json.dumps(record), "data.jsonl")
    assert [one.text for one in render(read([path], 1024), tokenizer)] == [text]


def test_instructions_need_no_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    path = file_of(tmp_path, json.dumps({"instruction": "Add.", "input": "2, 2", "output": "4"}), "data.json")
    assert render(read([path], 1024), tokenizer) == [Text("Add.\n\n2, 2\n\n4")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n{', "line 2 is not JSON"),
        ('{"text": "a"}\n\n{"text": "b"} x', "line 3 is not JSON"),
        ('[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', "line 3 is not JSON: expected a comma"),
        ('[{"text": "a"},', "line 1 is not JSON"),
        ("[]", "holds no text"),
        ("plain text", "line 1 is not JSON"),
        ("3", "line 1: expected .*, not int"),
        ('{"text": NaN}', r'line 1 has "text": expected "text"'),
        ('{"id": 1, "prompt": "a"}', r'line 1 has "id", "prompt": expected "text", "messages"'),
        ('{"messages": []}', "line 1: a conversation without messages"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 1, message 1: its content is neither"),
        ('{"messages": [{"content": "a"}]}', "line 1, message 1 has no role"),
        ('{"messages": ["a"]}', "line 1, message 1: expected an object"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message 1 has a part of type image"),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "'alien', none of human"),
        ('{"text": ' + 50_000 * "[", "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
    ],
)
def test_json_that_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TritError, match=reason) as refused:
        read([file_of(tmp_path, content, "data.jsonl")], 1024)
    assert "\n" not in str(refused.value)


def test_a_record_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LONGEST_RECORD", 1 << 20)
    path = file_of(tmp_path, '{"text": "' + "a" * (3 << 20), "data.jsonl")
    with pytest.raises(TritError, match="line 1: a record has no end within 1 Mi characters"):
        read([path], 1024)


@pytest.mark.parametrize("name", ["data.jsonl", "text.txt"])
def test_of_much_text_an_even_sample_is_taken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LEAST_SAMPLE", 1 << 18)
    lines = [f"line {i} " + "x" * 100 for i in range(40_000)]
    content = "\n".join(json.dumps({"text": line}) if name.endswith("jsonl") else line for line in lines)
    path = file_of(tmp_path, content, name)
    found = texts_of(path)
    assert found == texts_of(path)
    assert 1 << 16 < sum(map(len, found)) <= 1 << 18
    numbers = [int(number) for text in found for number in re.findall(r"^line (\d+) ", text, re.MULTILINE)]
    assert numbers == sorted(numbers)
    assert min(numbers) == 0
    assert max(numbers) > 30_000
    assert sum(map(len, texts_of(path, n_tokens=10**6))) > len(content) * 0.8  # the more are wanted, the more are kept


def test_an_endless_file_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "_MOST_READ", 1 << 20)
    path = file_of(tmp_path, "word " * 1_000_000)
    assert 1 << 20 <= len(texts_of(path)[0]) < (1 << 20) + (1 << 17)


def options_of(texts: int, n_tokens: int = 4 * LENGTH, length: int = LENGTH, seed: int = 3) -> TextOptions:
    return TextOptions([Document("", "")] * texts, ("text.txt",), n_tokens, length, seed)


def test_sequences_are_seeded_and_start_as_the_tokenizer_wants(tokenizer: Any) -> None:
    texts = [Text("The quick brown fox jumps over the lazy dog. " * 100)]
    first = sequences(texts, options_of(1), tokenizer)
    assert first.shape == (4, LENGTH)
    assert (first[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(first, sequences(texts, options_of(1), tokenizer))
    assert not torch.equal(first, sequences(texts, options_of(1, seed=4), tokenizer))


def test_control_tokens_come_from_templates_only(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    text = file_of(tmp_path, "a</s>b<s>" * 20)
    chat = file_of(tmp_path, json.dumps({"messages": MESSAGES * 20}), "chat.jsonl")

    def controls(*files: Path) -> int:
        options = options_of(1, n_tokens=4096)
        found = sequences(render(read(files, 4096), tokenizer), options, tokenizer)
        return int((found[:, 1:] < 2).sum())

    assert controls(text) == 0
    alone = controls(chat)
    assert alone > 40
    assert abs(controls(text, chat) - alone) <= 2  # the end that fills no sequence may hold some


def test_a_template_that_wants_lists_of_parts_gets_them(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{% if m.content is not string %}{{ m.content[0].text }}{% endif %}]{% endfor %}"
    )
    document = Document("", "chat.jsonl, line 7", MESSAGES)
    assert render([document], tokenizer) == [Text("[Say something.][No.]", control=True)]
    tokenizer.chat_template = "nothing of it"
    with pytest.raises(TritError, match="line 7: the chat template refuses it: it leaves out what the messages say"):
        render([document], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(TritError, match="line 7: the chat template refuses it: no such role"):
        render([document], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(TritError, match="line 7 holds messages, and the model has no chat template"):
        render([document], tokenizer)


def test_too_little_text(tokenizer: Any) -> None:
    with pytest.raises(TritError, match=r"text\.txt: 5 tokens are too few for one sequence of 32"):
        sequences([Text("short")], options_of(1), tokenizer)


def test_placeholders_become_words_of_the_vocabularys_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"<unk>": 0, "▁Ma": 1, "ĠBer": 2, "lin": 3, "ton": 4})
    texts = [Text("<unk> met <unk>s , and Anna met"), Text("nobody"), Text("( <unk> )", control=True)]
    filled, n_words = rare_words.fill(texts, tokenizer, seed=3)
    assert n_words == 3
    assert [text.control for text in filled] == [False, False, True]
    joined = "\n".join(text.text for text in filled)
    words = re.fullmatch(r"(\w+) met (\w+)s , and Anna met\nnobody\n\( (\w+) \)", joined)
    assert words, filled
    assert all(word.startswith(("Ma", "Ber")) for word in words.groups())
    assert rare_words.fill(texts, tokenizer, seed=3) == (filled, n_words)
    assert rare_words.fill(texts, tokenizer, seed=4)[0] != filled


def test_a_vocabulary_without_words_leaves_placeholders(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"<unk>": 0, "▁一": 1, "二": 2})
    assert rare_words.fill([Text("<unk> a")], tokenizer, seed=0) == ([Text("<unk> a")], 0)


def test_sequences_are_cut_to_what_the_model_takes() -> None:
    def length(longest: int | None) -> int:
        return fitting(options_of(1), SimpleNamespace(longest=longest)).length  # type: ignore[arg-type]

    assert (length(None), length(LENGTH), length(20)) == (LENGTH, LENGTH, 20)


@pytest.mark.parametrize(
    ("options", "exit_code", "reason"),
    [
        (["--calib-tokens", "256"], 2, "--calib-tokens 256 is less than one sequence of 512 tokens"),
        (["--calibrate", "nowhere.txt"], 1, "--calibrate nowhere.txt: no such file"),
        (["--calibrate", "."], 1, "--calibrate . is a folder"),
    ],
)
def test_refused_before_the_model_is_looked_for(
    options: list[str], exit_code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    text = file_of(tmp_path, TEXT)
    run = CliRunner().invoke(app, ["hf-to-gguf", "no/such/model", "-d", "2", "--calibrate", str(text), *options])
    assert run.exit_code == exit_code
    assert reason in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def _context(n_sequences: int, length: int, memory: int) -> Context:
    """A calibration of one matrix (64, 64) with hidden states of 64."""
    tensor = tensor_of(np.zeros((64, 64), np.float32))
    source = Source("tiny", "llama", {}, (tensor,), Origin(Path("tiny")))
    rows = RowMap([(0, Matrix("up"))], np.zeros(64, np.int32), np.arange(64))
    tokens = torch.zeros(1, dtype=torch.int64).expand(n_sequences, length)
    model = SimpleNamespace(width=64, n_layers=2)
    return Context(model, source, {tensor.name: rows}, {}, tokens, tokens[:0], None, memory, ())  # type: ignore[arg-type]


def test_room_is_looked_for_and_said_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []
    store: Any = SimpleNamespace(entry=SimpleNamespace(check_space=asked.append))
    plan = Plan(2, *[GGMLQuantizationType.Q8_0] * 3)
    hidden = 100 * 32 * (8 * 64 + 2 * (64 + 6 * 64))  # two streams in float32, and products kept in bfloat16
    _context(100, 32, hidden).check_room(plan, store, trains=False)
    _context(100, 32, 1000).check_room(plan, store, trains=False)
    _context(100, 32, hidden).check_room(plan, store, trains=True)
    blocks, gradients = 64 * 28, 2 * (800 * 64 * 2)
    assert asked == [blocks + gradients, blocks + gradients + hidden - 1000, blocks + gradients + 2 * 64 * 64]
    assert "of memory, and 207 kB on disk in" in capsys.readouterr().err
    for n_sequences, length, memory in ((10**6, 10**9, 10**15), (1, 10**9, 0)):
        with pytest.raises(TritError, match=r"needs .* TB of memory, and the machine has .*: lower --memory"):
            _context(n_sequences, length, memory).check_room(plan, store, trains=False)
