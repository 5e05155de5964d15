"""Whether a checkpoint's tensors, its settings and its tokenizer agree, so that the model is whole."""

import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor

from tritcore.console import note
from tritcore.errors import TritError, first_line

_LAYER = re.compile(r"((?:.*\.)?(?:layers|layer|h|blocks|block))\.(\d+)\.")
_BLOCK = re.compile(r"(?:^|\.)blk\.(\d+)\.")

_OTHER_STACK = re.compile("vision|visual|audio|speech|vit|tower|encoder|mtp")

# what only layers have that predict more than the next token
_OF_MTP = re.compile(r"eh_proj|enorm|hnorm|shared_head|nextn|mtp")

_LAYER_KEYS = ("n_layers", "num_hidden_layers", "n_layer", "num_layers")  # in upstream's order
_LONG_ARRAY = 10_000  # a tokenizer's: no setting, and slow to check
_TOKENS, _TYPES, _SCORES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores"))


def check_layers(folder: Path, names: Collection[str], settings: Mapping[str, Any]) -> None:
    """See, before anything is made for each layer, that the settings have as many layers as the files, about.

    Layers that predict more than the next token may be left over: converters drop them. Nothing else may be.

    Args:
        names: of all tensors in the files.

    Raises:
        TritError: the settings have far more layers, or fewer.
    """
    expected = _expected(settings)
    if expected is None:
        return
    layers: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
    there = 1 + max((number for stack in layers.values() for number in stack), default=-1)
    if expected > 4 * there + 64:
        raise _too_few(folder, settings, there, range(there, expected))
    if settings.get("is_encoder_decoder"):  # the decoder has a number of its own
        return
    with_mtp = expected + sum(n for key, n in settings.items() if re.search("nextn|mtp", key) and type(n) is int)
    for name, stack in layers.items():
        if _OTHER_STACK.search(name) or not set(range(expected)) <= stack.keys():
            continue
        extra = [n for n in sorted(stack) if n >= with_mtp and not any(_OF_MTP.search(tensor) for tensor in stack[n])]
        if extra:
            raise TritError(
                f"{folder}: {_key(settings)} in config.json is {expected}, but the files hold "
                f"{name}.{_listed(extra)} too: correct the number, or take those layers out"
            )


def check_mapped_layers(folder: Path, names: Iterable[str], settings: Mapping[str, Any]) -> None:
    """See that all layers of the settings were mapped.

    Args:
        names: of GGUF tensors.

    Raises:
        TritError: layers are missing.
    """
    expected = _expected(settings)
    if expected is None or "block_configs" in settings:  # some layers of NAS models do nothing
        return
    mapped = {int(match[1]) for name in names if (match := _BLOCK.search(name))}
    if missing := sorted(set(range(expected)) - mapped):
        raise _too_few(folder, settings, len(mapped), missing)


def _expected(settings: Mapping[str, Any]) -> int | None:
    key = _key(settings)
    return settings[key] if key is not None and type(settings[key]) is int else None


def _key(settings: Mapping[str, Any]) -> str | None:
    return next((key for key in _LAYER_KEYS if key in settings), None)


def _too_few(folder: Path, settings: Mapping[str, Any], there: int, missing: Collection[int]) -> TritError:
    return TritError(
        f"{folder}: {_key(settings)} in config.json is {_expected(settings)}, but the files hold {there} layers; "
        f"missing: {_listed(missing)}: correct the number, or get all files"
    )


def _listed(numbers: Collection[int]) -> str:
    shown = ", ".join(str(n) for _, n in zip(range(5), numbers, strict=False))
    return shown + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def check_head(folder: Path, config: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """See that a model without an output matrix is one that shares its embeddings, or does not generate.

    Args:
        config: config.json as it is.
        settings: with the defaults of the architecture.

    Raises:
        TritError: the matrix is missing.
    """
    architecture = str((settings.get("architectures") or config.get("architectures") or [""])[0])
    if not architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return
    key = "tie_word_embeddings"
    parts = [config] + [part for part in config.values() if isinstance(part, dict)]
    said = [part[key] for part in parts if key in part]
    # a larger model's defaults say nothing of its language model
    tied = any(said) if said else "text_config" in config or settings.get(key) is not False
    if not tied:
        raise TritError(
            f"{folder} has no output matrix (lm_head.weight), and {key} in config.json is false: the checkpoint is "
            f"incomplete; get all of it or, if the model does share its embeddings, set {key} to true"
        )


def check_tokens(folder: Path, n_rows: int, added_too: bool) -> None:
    """See that the pieces of a tokenizer, and the tokens added to it, have rows in the embeddings.

    Args:
        added_too: raise for added tokens too; otherwise they are named in a note, as llama.cpp leaves them out.

    Raises:
        TritError: some have none.
    """
    pieces, added = read_tokens(folder)
    refused = pieces | added if added_too else pieces
    if beyond := [(number, token) for token, number in refused.items() if number >= n_rows]:
        number, token = max(beyond)
        raise _too_many_tokens(folder, number + 1, token, n_rows)
    if left_out := sorted(token for token, number in added.items() if number >= n_rows):
        shown = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        note(f"the embeddings have {n_rows} rows, none for the added tokens {shown}: they are left out")


def fit_tokens(folder: Path, header: GGUFWriter, n_rows: int) -> None:
    """Let the header have a token for each row of the embeddings: unused ones where the tokenizer has none.

    Raises:
        TritError: it has tokens without a row.
    """
    fields = header.kv_data[0]
    if _TOKENS not in fields:
        return
    tokens = fields[_TOKENS].value
    types = fields[_TYPES].value if _TYPES in fields else [TokenType.NORMAL] * len(tokens)
    if any(number != TokenType.UNUSED for number in types[n_rows:]):
        raise _too_many_tokens(folder, len(tokens), tokens[-1], n_rows)
    more = range(len(tokens), n_rows)
    filling: dict[str, list[Any]] = {
        _TOKENS: [f"[PAD{n}]" for n in more],
        _TYPES: [int(TokenType.UNUSED) for _ in more],
        _SCORES: [-10000.0 for _ in more],
    }
    for key, values in filling.items():
        if key in fields:
            fields[key].value = [*fields[key].value[:n_rows], *values]


def _too_many_tokens(folder: Path, n_tokens: int, last: str | bytes, n_rows: int) -> TritError:
    return TritError(
        f"{folder}: the tokenizer has {n_tokens} tokens, up to {last!r}, but the embeddings have {n_rows} rows: take "
        "the tokenizer that belongs to these weights, or resize them with resize_token_embeddings of transformers"
    )


def read_tokens(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The numbers of a tokenizer's pieces and of the tokens added to it; none where the files cannot be read."""
    added = _added_tokens(folder)
    model = folder / "tokenizer.model"
    if model.is_file():
        with suppress(Exception):  # a damaged file has been refused by whoever needs it
            processor = SentencePieceProcessor(model_file=str(model))
            return {processor.id_to_piece(n): n for n in range(processor.vocab_size())}, added
    model_part = _json(folder / "tokenizer.json").get("model")
    vocabulary = model_part.get("vocab") if isinstance(model_part, dict) else _json(folder / "vocab.json")
    if isinstance(vocabulary, list):  # pairs of a piece and its score
        vocabulary = {str(entry[0]): n for n, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    return {token: number for token, number in vocabulary.items() if type(number) is int and token not in added}, added


def _added_tokens(folder: Path) -> dict[str, int]:
    added = {token: n for token, n in _json(folder / "added_tokens.json").items() if type(n) is int}
    listed = _json(folder / "tokenizer.json").get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            added[str(entry.get("content"))] = entry["id"]
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else []:
        if str(number).isdecimal() and isinstance(entry, dict):
            added[str(entry.get("content"))] = int(number)
    return added


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def check_metadata(folder: Path, header: GGUFWriter) -> None:
    """See that each number of the metadata is one, and fits its type. Raises TritError."""
    for key, field in header.kv_data[0].items():
        values = field.value if isinstance(field.value, list) else [field.value]
        for value in values if len(values) < _LONG_ARRAY else ():
            if isinstance(value, float) and not math.isfinite(value):
                raise TritError(f"{folder}: {key} would be {value}: correct config.json")
        try:
            if len(values) < _LONG_ARRAY:
                header._pack_val(field.value, field.type, add_vtype=True, sub_type=field.sub_type)
        except (struct.error, OverflowError, TypeError, ValueError, AttributeError) as error:
            raise TritError(
                f"{folder}: {key} cannot be {values[0]!r} ({first_line(error)}): correct config.json"
            ) from error
