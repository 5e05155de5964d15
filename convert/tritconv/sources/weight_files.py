"""Which files of a checkpoint hold its weights."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from tritcore.errors import TritError

# in the order in which llama.cpp's converter and transformers look for them
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def indexed(index: Path) -> list[str] | None:
    """The files that an index of shards lists, sorted, as paths relative to its folder; None if there is no index.

    Raises:
        TritError: the index is damaged, or lists a file outside of its folder.
    """
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise TritError(f"{index} cannot be read as JSON: {error}") from error
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise TritError(f"{index} has no weight_map from the names of tensors to the names of files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _is_inside(name):
            raise TritError(f"{index} lists {name!r}, which is outside of the checkpoint: do not trust this checkpoint")
    return names


def _is_inside(name: str) -> bool:
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return bool(name) and not any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def no_weights(where: str, names: Iterable[str]) -> str:
    """Why a checkpoint with files of these names, none of which has weights to convert, cannot be converted."""
    names = [PurePosixPath(name).name for name in names]
    if any(name.startswith("adapter_model.") for name in names):
        return (
            f"{where} holds an adapter, no whole model: merge it into its base model first "
            "(peft's merge_and_unload, then save_pretrained) and convert the result"
        )
    if any(name.startswith("consolidated") for name in names):
        return (
            f"{where} has its weights only as consolidated files, in the layout of the model's authors: "
            "convert a copy in the transformers layout, with model*.safetensors"
        )
    if any(name.lower().endswith(".gguf") for name in names):
        return f"{where} holds GGUF files: convert one with `tritconv gguf-to-gguf`"
    if other := [name for name in names if name.endswith(".safetensors")]:
        return f"{where}: no index lists {other[0]}; if it holds the whole model, call it model.safetensors"
    return f"{where}: no weights (model*.safetensors or pytorch_model*.bin)"
