"""Tokenizers: ends of answers, pre-tokenizers, missing and damaged files; and the parts that do not read text."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoints import make_bpe_tokenizer
from gguf import GGUFWriter, Keys

from tritconv.sources.mapped import open_checkpoint
from tritconv.sources.tokenizer import ENDS_BY_TEXT, pre_tokenizers
from tritcore.errors import TritError

EOS, EOT, EOM = Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, with a SentencePiece tokenizer."""
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    return copy


@pytest.fixture
def bpe(folder: Path) -> Path:
    """The same with a BPE tokenizer; tokens 0 to 5 are <unk>, <s>, </s>, <|one|>, <|two|>, <|three|>."""
    (folder / "tokenizer.model").unlink()
    make_bpe_tokenizer(folder)
    return folder


def _change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def _header(folder: Path, pre: str | None = "gpt-2") -> dict[str, Any]:
    return {key: field.value for key, field in open_checkpoint(folder, pre=pre).metadata.items()}


def _rename_token(folder: Path, old: str, new: str) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace(json.dumps(old), json.dumps(new)))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([2, 3], {EOS: 2, EOT: 3}),
        ([3, 2], {EOS: 2, EOT: 3}),  # the tokenizer's own one stays the main one
        ([2, 3, 4], {EOS: 2, EOT: 3, EOM: 4}),
        ([2, 2, 3, 3, 3], {EOS: 2, EOT: 3}),
        ([2, 3, 100_000, -1], {EOS: 2, EOT: 3}),
        ([2], {EOS: 2}),
        (4, {EOS: 2, EOT: 4}),
        (None, {EOS: 2}),
    ],
)
def test_tokens_that_end_an_answer(file: str, listed: object, expected: dict[str, int], bpe: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        _change(bpe / name, eos_token_id=listed if name == file else 2)
    header = _header(bpe)
    assert {key: header[key] for key in (EOS, EOT, EOM) if key in header} == expected


def test_ends_of_no_sense(bpe: Path) -> None:
    _change(bpe / "generation_config.json", eos_token_id=[2, None, "x", True, [4], {}, 1.5, 3])
    header = _header(bpe)
    assert (header[EOS], header[EOT]) == (2, 3)
    assert EOM not in header


def test_no_main_end_but_a_list(bpe: Path) -> None:
    (bpe / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    _change(bpe / "config.json", eos_token_id=[4, 3])
    (bpe / "generation_config.json").unlink()
    header = _header(bpe)
    assert (header[EOS], header[EOT]) == (4, 3)


def test_ends_that_llama_cpp_knows_by_their_text_need_no_place(bpe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _rename_token(bpe, "<|one|>", "<|im_end|>")
    _change(bpe / "generation_config.json", eos_token_id=[2, 3, 4, 5])
    header = _header(bpe)
    assert (header[EOS], header[EOT], header[EOM]) == (2, 4, 5)
    assert capfd.readouterr().err == ""


def test_an_end_without_a_place_is_said(bpe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _change(bpe / "generation_config.json", eos_token_id=[2, 3, 4, 5])
    header = _header(bpe)
    assert (header[EOS], header[EOT], header[EOM]) == (2, 3, 4)
    (line,) = capfd.readouterr().err.splitlines()
    assert "'<|three|>'" in line


def _write_vocabulary(path: Path, tokens: Sequence[str], pre: str = "gpt-2", **ids: int) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(tokens))
    control = [t.startswith("<") for t in tokens]
    writer.add_token_types([gguf.TokenType.CONTROL if c else gguf.TokenType.NORMAL for c in control])
    writer.add_token_merges(["a b"])
    for key, value in ids.items():
        getattr(writer, f"add_{key}_token_id")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ends(path: Path) -> set[int]:
    """The tokens that end an answer in llama.cpp, which must load the vocabulary of a file."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        count = llama_cpp.llama_vocab_n_tokens(vocabulary)
        return {token for token in range(count) if llama_cpp.llama_vocab_is_eog(vocabulary, token)}
    finally:
        model.close()


@pytest.mark.build
def test_all_ends_end_an_answer_in_llama_cpp(bpe: Path, tmp_path: Path) -> None:
    _rename_token(bpe, "<|one|>", "<|im_end|>")
    _change(bpe / "generation_config.json", eos_token_id=[2, 3, 4, 5])
    header = _header(bpe)
    tokens = header[Keys.Tokenizer.LIST]
    _write_vocabulary(tmp_path / "x.gguf", tokens, eos=header[EOS], eot=header[EOT], eom=header[EOM])
    assert _ends(tmp_path / "x.gguf") == {2, 3, 4, 5}


@pytest.mark.build
def test_texts_that_llama_cpp_takes_for_an_end(tmp_path: Path) -> None:
    for text in ENDS_BY_TEXT:
        _write_vocabulary(tmp_path / "x.gguf", ["a", "b", "ab", text, "<|three|>"], eos=0, eot=1)
        assert 3 in _ends(tmp_path / "x.gguf"), text


def test_an_unknown_pre_tokenizer(bpe: Path) -> None:
    with pytest.raises(TritError, match=r"hash [0-9a-f]{64}\).*--pre NAME") as raised:
        _header(bpe, pre=None)
    assert "\n" not in str(raised.value)
    assert _header(bpe, pre="qwen2")[Keys.Tokenizer.PRE] == "qwen2"


def test_pre_tokenizers_that_are_no_help(bpe: Path, checkpoint: Path) -> None:
    with pytest.raises(TritError, match=r"--pre nonesuch: llama.cpp has no such pre-tokenizer.*llama-bpe.*qwen2"):
        _header(bpe, pre="nonesuch")
    with pytest.raises(TritError, match=r"--pre qwen2: .* takes no pre-tokenizer"):
        _header(checkpoint, pre="qwen2")


@pytest.mark.build
def test_llama_cpp_knows_all_pre_tokenizers(tmp_path: Path) -> None:
    from conversion import TextModel

    names = pre_tokenizers(TextModel.get_vocab_base_pre)
    assert len(names) > 50
    for name in names:
        _write_vocabulary(tmp_path / "x.gguf", ["a", "b", "ab", "\n", "<s>"], pre=name)
        _ends(tmp_path / "x.gguf")


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def _without_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _vocabulary_alone(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "tokenizer.json").unlink()


def _token_that_is_no_number(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = "x"
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_rewrite("tokenizer.json", lambda data: data[: len(data) // 2]), "tokenizer.json is damaged"),
        (_rewrite("tokenizer.json", lambda data: b""), "tokenizer.json is damaged"),
        (_rewrite("tokenizer.json", lambda data: b"{}"), "tokenizer.json is damaged"),
        (_rewrite("tokenizer.json", lambda data: b"[]"), "tokenizer.json is damaged"),
        (_rewrite("tokenizer.json", lambda data: data.replace(b"<unk>", b"\xff\xfe")), "tokenizer.json is damaged"),
        (_rewrite("tokenizer_config.json", lambda data: data[:-3]), "tokenizer_config.json is damaged"),
        (_token_that_is_no_number, "tokenizer.json is damaged"),
        (_without_merges, "without merges"),
        (_vocabulary_alone, "without merges"),
    ],
)
def test_bpe_tokenizers_that_cannot_be_read(spoil: Callable[[Path], None], words: str, bpe: Path) -> None:
    spoil(bpe)
    for pre in (None, "gpt-2"):
        with pytest.raises(TritError, match=re.escape(words)) as raised:
            _header(bpe, pre)
        assert str(bpe) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_a_truncated_tokenizer_model(keep: int, folder: Path) -> None:
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TritError, match=r"tokenizer.model is damaged \(.*download it again"):
        _header(folder, None)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()
    with pytest.raises(TritError, match=r"no tokenizer: none of tokenizer.json, .*vocab.json") as raised:
        _header(folder, None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [\n  a: b\n---\n",
        b"---\nlicense: 5\n---\n",
        b"---\ntags: [3, [4]]\n---\n",
        b"---\nbase_model: [3]\ndatasets: [{}, 5]\nversion: 1.0\n---\n",
        b"---\na: &a [x, x]\nb: &b [*a, *a]\ntags: [*b, *b]\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"\xff\xfe",
    ],
)
def test_a_model_card_of_no_sense_is_left_out(card: bytes, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = _header(folder, None)
    (folder / "README.md").write_bytes(card)
    assert _header(folder, None) == expected
    (line,) = capfd.readouterr().err.splitlines()
    assert str(folder / "README.md") in line


def test_a_model_card(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    card = "---\nlicense: mit\ntags: [a, b]\nlanguage: en\nbase_model: org/Base-7B\ndatasets: [org/data]\n---\ntext\n"
    (folder / "README.md").write_text(card)
    header = _header(folder, None)
    assert header["general.license"] == "mit"
    assert header["general.tags"] == ["a", "b"]
    assert header["general.base_model.0.repo_url"] == "https://huggingface.co/org/Base-7B"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"vision_config": {"hidden_size": 8}}, ["vision"]),
        ({"vision_config": {"hidden_size": 8}, "audio_config": {"hidden_size": 8}}, ["vision", "audio"]),
    ],
)
def test_parts_that_are_left_out_are_said(
    change: dict[str, Any], expected: list[str], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _change(folder / "config.json", **change)
    _header(folder, None)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(expected)
    for part in expected:
        assert part in lines[0]


def test_the_text_part_of_a_vision_model(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers

    text = transformers.AutoConfig.from_pretrained(folder)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    vision_model = tmp_path / "llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(vision_model)
    shutil.copy(folder / "tokenizer.model", vision_model)
    capfd.readouterr()
    checkpoint = open_checkpoint(vision_model)
    (line,) = capfd.readouterr().err.splitlines()
    assert "the vision part is left out" in line
    assert "--mmproj" in line
    expected = {tensor.name for tensor in open_checkpoint(folder).tensors}
    assert {tensor.name for tensor in checkpoint.tensors} == expected
