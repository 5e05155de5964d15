"""config.json of a checkpoint: read, and checked for what would mislead the libraries that read it afterwards."""

import json
from pathlib import Path
from typing import Any

from tritcore.errors import TritError

# Parts of config.json that describe the language model of a larger one
_TEXT_PARTS = ("text_config", "llm_config", "lm_config", "language_config", "thinker_config")

# The most that is taken for meant: of layers, tokens and anything else. Libraries make a list of as many entries.
_MOST_LAYERS, _MOST_TOKENS, _MOST = 1 << 14, 1 << 24, 1 << 31
_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers"), (1, _MOST_LAYERS)),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), (1, _MOST_TOKENS)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), (1, _MOST)),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "num_key_value_heads",
            "n_head",
            "n_heads",
            "n_head_kv",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "moe_intermediate_size",
            "ffn_dim",
            "n_inner",
            "max_position_embeddings",
            "n_positions",
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "num_experts_per_tok",
        ),
        (0, _MOST),
    ),
}
_MAY_BE_NULL = {name for name, (least, _) in _LIMITS.items() if least == 0}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        TritError: there is none, it is no JSON object, names no architecture, or has sizes that no model has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise TritError(f"{folder}: no config.json: not a checkpoint of the transformers library")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TritError(f"{path} is not valid JSON: {error}") from error
    _check_object(path, config, "it")
    parts = [config]
    for name in _TEXT_PARTS:
        if name in config:
            _check_object(path, config[name], name)
            parts.append(config[name])
    for part in parts:
        _check_architectures(path, part)
        for name, (least, most) in _LIMITS.items():
            _check_number(path, part, name, least, most)
    return config


def _check_object(path: Path, value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise TritError(f"{path}: {name} is {_shown(value)}, not an object with the settings of a model")


def _check_architectures(path: Path, part: dict[str, Any]) -> None:
    names = part.get("architectures")
    if names is None:
        return  # upstream has other ways to tell
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise TritError(
            f'{path} names no architecture: "architectures" is {_shown(names)}, not a list such as ["LlamaForCausalLM"]'
        )


def _check_number(path: Path, part: dict[str, Any], name: str, least: int, most: int) -> None:
    if name not in part:
        return
    value = part[name]
    if value is None and name in _MAY_BE_NULL:
        return
    is_per_layer = isinstance(value, list) and name in _MAY_BE_NULL
    for number in value if is_per_layer else [value]:
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number < most:
            raise TritError(f"{path}: {name} is {_shown(number)}, not a whole number from {least} to {most - 1}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
