"""The weights of a checkpoint's folder: which files hold them, whether those are whole, and the tensors, unread."""

import json
import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gguf.utility import SafetensorsLocal

from tritconv.sources.weight_files import indexed, no_weights
from tritcore.errors import TritError, first_line

# stem and suffix of the file names, in the order in which llama.cpp's converter and transformers look for them
_LAYOUTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))

_SHARD = re.compile(r"(?P<set>.+)-(?P<number>\d+)-of-(?P<count>\d+)")

_MOST_SHARDS = 100_000  # that a name is believed

_ZIP = b"PK\x03\x04"  # how torch's files begin since 1.6


def find_weights(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, as an index lists them or else by their names.

    Raises:
        TritError: there are none, some are missing, there are two sets of them, or what is there is an adapter.
    """
    refuse_adapter(folder, str(folder))
    for stem, suffix in _LAYOUTS:
        whole = folder / f"{stem}{suffix}"
        listed = indexed(folder / f"{whole.name}.index.json")
        if listed is not None:
            files = [folder / name for name in listed]
            if not files:
                raise TritError(f"{folder / whole.name}.index.json lists no files: download it again")
        else:
            files = _shards_by_name(folder, stem, suffix)
            files = files or ([whole] if whole.is_file() else _of_any_name(folder, stem, suffix))
        if whole.is_file() and whole not in files:
            raise TritError(
                f"{folder} holds its weights twice, in {whole.name} and in {_names(files)}: move one of them elsewhere"
            )
        if missing := [file for file in files if not file.is_file()]:
            raise TritError(f"{folder} is incomplete: {_names(missing)} is missing; download it again")
        if files:
            return files
    raise TritError(no_weights(str(folder), sorted(path.name for path in folder.iterdir())))


def refuse_adapter(folder: Path, where: str) -> None:
    """See that what a folder holds, which came from `where`, is no adapter. Raises TritError."""
    weights = sorted(folder.glob("adapter_model.*"))
    config = folder / "adapter_config.json"
    if not weights and (not config.is_file() or any(_of_any_name(folder, *layout) for layout in _LAYOUTS)):
        return
    base, kind = "its base model", "PEFT"
    try:
        adapter = json.loads(config.read_text(encoding="utf-8"))
        base = str(adapter.get("base_model_name_or_path") or base)
        kind = str(adapter.get("peft_type") or kind)
    except (OSError, ValueError, AttributeError, RecursionError):
        pass  # the weights alone say what this is
    raise TritError(
        f"{where} holds a {kind} adapter, which only changes another model, {base}: merge the two with "
        "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(FOLDER) of the peft "
        "library, copy the tokenizer there, and convert that folder"
    )


def _shards_by_name(folder: Path, stem: str, suffix: str) -> list[Path]:
    """All files that a name such as model-00001-of-00003 makes one expect, whether they are there or not."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in _of_any_name(folder, stem, suffix):
        if match := _SHARD.fullmatch(file.name.removesuffix(suffix)):
            found[match["set"], match["count"]].append(match["number"])
    if not found:
        return []
    if len(found) > 1:
        sets = " and ".join(f"{name} in {count}" for name, count in sorted(found))
        raise TritError(f"{folder} holds shards of several sets, {sets}, and no index says which: keep one of them")
    ((name, count), numbers) = found.popitem()
    if int(count) > _MOST_SHARDS:
        raise TritError(f"{folder} is incomplete: it holds {len(numbers)} of {int(count)} shards")
    first = 0 if int(min(numbers)) == 0 else 1
    width = len(numbers[0])
    expected = range(first, first + max(int(count), len(numbers)))
    return [folder / f"{name}-{number:0{width}d}-of-{count}{suffix}" for number in expected]


def _of_any_name(folder: Path, stem: str, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"{stem}*{suffix}"))


def _names(files: Sequence[Path]) -> str:
    names = [file.name for file in files[:3]]
    return ", ".join(names) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


LazyTensors = dict[str, Callable[[], Any]]  # by name: makes a LazyTorchTensor of llama.cpp's conversion package


def read_weights(folder: Path) -> LazyTensors:
    """All tensors of a checkpoint, by name, in the order of the names. Safetensors and zipped pickles are not read yet.

    Raises:
        TritError: as `find_weights`; or a file is damaged, holds more than tensors, or holds what another one has too.
    """
    found: dict[str, Path] = {}
    tensors: LazyTensors = {}
    for file in find_weights(folder):
        read = _read_safetensors if file.suffix == ".safetensors" else _read_pickle
        for name, tensor in read(file).items():
            if name in found:
                raise TritError(
                    f"{folder}: tensor {name} is in {found[name].name} and in {file.name}: which one counts is unknown"
                )
            found[name] = file
            tensors[name] = tensor
    for stem, suffix in _LAYOUTS:
        _check_index(folder / f"{stem}{suffix}.index.json", found)
    return dict(sorted(tensors.items()))


def _check_index(index: Path, found: dict[str, Path]) -> None:
    """See that each file of an index, if that is the one in use, holds the tensors that it should."""
    names = indexed(index) or []
    if not any(index.parent / name in found.values() for name in names):
        return
    for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        if found.get(tensor) != index.parent / name:
            raise TritError(f"{index} lists tensor {tensor} in {name}, which does not hold it: download both again")


def _read_safetensors(file: Path) -> LazyTensors:
    from conversion.base import LazyTorchTensor
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # checks offsets and sizes, which the other reader trusts
            pass
        tensors = SafetensorsLocal(file).tensors
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise TritError(f"{file} is truncated or damaged ({first_line(error)}): download it again") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in LazyTorchTensor._dtype_str_map:
            raise TritError(_unreadable(file, name, tensor.dtype))
    return {name: partial(LazyTorchTensor.from_local_tensor, tensor) for name, tensor in tensors.items()}


def _read_pickle(file: Path) -> LazyTensors:
    import torch
    from conversion.base import LazyTorchTensor

    from tritconv.sources.lazy import MappedTensor

    loaded, is_mapped = _load_pickle(file)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise TritError(f"{file} holds a {type(loaded).__name__}, not tensors by name: save the model's state_dict()")
    size = file.stat().st_size
    for name, tensor in loaded.items():
        if not isinstance(tensor, torch.Tensor):
            raise TritError(f"{file}: {name} is a {type(tensor).__name__}, no tensor: save the model's state_dict()")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise TritError(f"{file}: tensor {name} is sparse, or without values of its own: save it as a dense one")
        if tensor.dtype not in LazyTorchTensor._dtype_byteswap_map:
            raise TritError(_unreadable(file, name, str(tensor.dtype).removeprefix("torch.")))

    def lazy(tensor: torch.Tensor) -> Any:
        if not is_mapped:
            return LazyTorchTensor.from_eager(tensor)
        meta = LazyTorchTensor.meta_with_dtype_and_shape(tensor.dtype, tensor.shape)
        return LazyTorchTensor(meta=meta, args=(MappedTensor(tensor),), func=MappedTensor.read)

    return {name: partial(lazy, tensor.detach()) for name, tensor in loaded.items()}


def _load_pickle(file: Path) -> tuple[Any, bool]:
    """The content of a pickle, and whether its tensors are mapped, which only those in a zip can be."""
    import torch

    try:
        with file.open("rb") as opened:
            is_zip = opened.read(len(_ZIP)) == _ZIP
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # weights_only runs none of the code that a pickle may name
            return torch.load(file, map_location="cpu", mmap=is_zip, weights_only=True), is_zip
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise TritError(
                f"{file} holds more than tensors: it wants to run {named[1]}, which was refused; "
                "take a copy of the model in safetensors"
            ) from error
        raise TritError(f"{file} holds more than tensors, or is damaged: take a copy in safetensors") from error
    except Exception as error:  # whatever a damaged pickle makes torch raise
        raise TritError(f"{file} is truncated or damaged ({first_line(error)}): download it again") from error


def _unreadable(file: Path, name: str, dtype: str) -> str:
    return (
        f"{file}: tensor {name} is {dtype}, which llama.cpp's converter does not read: "
        "convert the original checkpoint, or save it in float32, bfloat16 or float16"
    )
