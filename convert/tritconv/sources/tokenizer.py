"""What llama.cpp's converter is helped with when it reads a tokenizer: pre-tokenizers, ends of answers, errors."""

import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys

from tritconv.sources.foreign_code import is_trusted, refusal_in
from tritcore.console import note
from tritcore.errors import TritError, first_line

_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json", "rwkv_vocab_*.txt")

# Tokens that llama.cpp takes for the end of an answer by their text, in any model (llama-vocab.cpp).
ENDS_BY_TEXT = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    }
)
_MODELS_WITH_MERGES = ("gpt2", "gemma4")  # llama.cpp's names of BPE tokenizers

# The places that GGUF has for the ids of tokens that end an answer, besides.
_END_KEYS = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)


class TokenizerReading:
    """For a converter class of llama.cpp, to come before it among the bases: reads the tokenizer.

    Attributes:
        pre: the name of the pre-tokenizer where the user says it.
    """

    pre: str | None = None
    dir_model: Path
    gguf_writer: GGUFWriter

    def set_vocab(self) -> None:
        """Read the tokenizer into the header.

        Raises:
            TritError: there is none, it is damaged, or llama.cpp does not know its pre-tokenizer.
        """
        self._pre_was_asked_for = False
        try:
            super().set_vocab()  # type: ignore[misc]
        except TritError:
            raise
        except Exception as error:  # the package raises whatever its many authors chose
            raise TritError(_why(self.dir_model, error)) from error
        if self.pre is not None and not self._pre_was_asked_for:
            raise TritError(f"--pre {self.pre}: the tokenizer of {self.dir_model} takes no pre-tokenizer: leave it out")
        header = self.gguf_writer.kv_data[0]
        if Keys.Tokenizer.LIST not in header:
            return  # a model that does without
        if header[Keys.Tokenizer.MODEL].value in _MODELS_WITH_MERGES and Keys.Tokenizer.MERGES not in header:
            raise TritError(_no_merges(self.dir_model))
        _add_ends(self.dir_model, self.gguf_writer)

    def get_vocab_base_pre(self, tokenizer: Any) -> str:
        """llama.cpp's name of a BPE tokenizer's pre-tokenizer, as the user gave it or as the converter knows it."""
        self._pre_was_asked_for = True
        known = super().get_vocab_base_pre  # type: ignore[misc]
        if self.pre is not None:
            names = pre_tokenizers(known)
            if self.pre not in names:
                raise TritError(f"--pre {self.pre}: llama.cpp has no such pre-tokenizer; it has {', '.join(names)}")
            return self.pre
        with _Hash() as found:
            try:
                return known(tokenizer)
            except NotImplementedError as error:
                if _lacks_merges(self.dir_model):
                    raise TritError(_no_merges(self.dir_model)) from error
                raise TritError(
                    f"{self.dir_model}: llama.cpp's converter does not know its BPE pre-tokenizer (hash {found.hash}): "
                    "say with --pre NAME which one it equals, such as llama-bpe, qwen2 or gpt-2"
                ) from error


# The converter tells these apart too, but they are no BPE tokenizers.
_NOT_BPE = {"bert-bge", "bert-bge-large", "jina-v2-en"}


def pre_tokenizers(get_vocab_base_pre: Callable[..., str]) -> list[str]:
    """The BPE pre-tokenizers that the converter's function tells apart, and llama.cpp's default one."""
    detected = re.findall(r'^\s*res = "([^"]+)"', inspect.getsource(get_vocab_base_pre), re.MULTILINE)
    return sorted({"default", *detected} - _NOT_BPE)


class _Hash(logging.Handler):
    """Takes the hash of a pre-tokenizer from what the converter logs when it does not know it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.hash = "unknown"
        self._logger = logging.getLogger("hf-to-gguf")

    def __enter__(self) -> "_Hash":
        self._before = (self._logger.level, self._logger.propagate, self._logger.handlers[:])
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        self._logger.handlers[:] = [self]
        return self

    def __exit__(self, *exc_info: object) -> None:
        level, self._logger.propagate, self._logger.handlers[:] = self._before
        self._logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"\b[0-9a-f]{64}\b", record.getMessage()):
            self.hash = found[0]


def _why(folder: Path, error: Exception) -> str:
    """What is wrong with the tokenizer in `folder`, which the converter failed on with `error`."""
    if (refused := refusal_in(error)) is not None:
        return str(refused)
    has_code = _names_code(folder)
    own_code = "; or run the code that it has for that with --trust-remote-code" if has_code else ""
    if has_code and is_trusted():
        return f"{folder}: its own code for the tokenizer fails: {first_line(error)}"
    if not any(any(folder.glob(pattern)) for pattern in _FILES):
        return (
            f"{folder}: no tokenizer: none of {', '.join(_FILES)}; "
            f"copy the files of the model that this one stems from{own_code}"
        )
    for file in sorted(folder.iterdir()):
        if (damage := _damage(file)) is not None:
            return f"{file} is damaged ({damage}): download it again"
    if _lacks_merges(folder):
        return _no_merges(folder)
    return f"{folder}: its tokenizer cannot be read: {first_line(error)}{own_code}"


def _damage(file: Path) -> str | None:
    """Why a file that belongs to a tokenizer cannot be read; None if it can, or is another file."""
    try:
        if file.suffix == ".json" and not file.name.endswith(".index.json"):
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                return "no JSON object"
            if file.name == "tokenizer.json":
                from tokenizers import Tokenizer

                Tokenizer.from_file(str(file))
        elif file.suffix == ".model":
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor().LoadFromFile(str(file))
    except Exception as error:  # the libraries raise plain exceptions, sentencepiece RuntimeError
        return first_line(error)
    return None


def _lacks_merges(folder: Path) -> bool:
    """Whether a BPE tokenizer has a vocabulary, but not the merges that go with it."""
    if (folder / "merges.txt").is_file():
        return False
    if not (folder / "tokenizer.json").is_file():
        return (folder / "vocab.json").is_file()
    model = _object(folder / "tokenizer.json").get("model")
    return isinstance(model, dict) and model.get("type", "BPE") == "BPE" and not model.get("merges")


def _no_merges(folder: Path) -> str:
    return (
        f"{folder}: a BPE tokenizer without merges: tokenizer.json has none, and there is no merges.txt; "
        "copy the files of the model that this one stems from"
    )


def _names_code(folder: Path) -> bool:
    return any("auto_map" in _object(folder / name) for name in ("config.json", "tokenizer_config.json"))


def _object(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is none, or it holds no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _add_ends(folder: Path, header: GGUFWriter) -> None:
    """Let all tokens that end an answer by the checkpoint's configuration do so in llama.cpp."""
    values = {key: field.value for key, field in header.kv_data[0].items()}
    tokens = values[Keys.Tokenizer.LIST]
    taken = {values[key] for key in _END_KEYS if key in values}
    missing = [end for end in _ends(folder) if end < len(tokens) and end not in taken]
    if Keys.Tokenizer.EOS_ID not in values and missing:
        header.add_eos_token_id(missing.pop(0))
    missing = [end for end in missing if _text(tokens[end]) not in ENDS_BY_TEXT]
    for key, add in (
        (Keys.Tokenizer.EOT_ID, header.add_eot_token_id),
        (Keys.Tokenizer.EOM_ID, header.add_eom_token_id),
    ):
        if key not in values and missing:
            add(missing.pop(0))
    if missing:
        texts = ", ".join(repr(_text(tokens[end])) for end in missing)
        note(f"GGUF has no place left for more tokens that end an answer: llama.cpp will go on after {texts}")


def _ends(folder: Path) -> list[int]:
    """The tokens that end an answer, the main one first, each once."""
    config = _object(folder / "config.json")
    text_config = config.get("text_config")
    found: list[int] = []
    for holder in (_object(folder / "generation_config.json"), config, text_config):
        ends = holder.get("eos_token_id") if isinstance(holder, dict) else None
        for end in ends if isinstance(ends, list) else [ends]:
            if isinstance(end, int) and not isinstance(end, bool) and end >= 0 and end not in found:
                found.append(end)
    return found


def _text(token: str | bytes) -> str:
    return token if isinstance(token, str) else token.decode(errors="replace")
