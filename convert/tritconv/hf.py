"""Checkpoints through llama.cpp's own conversion package: it maps names, tokenizer and metadata.

The package prepares a GGUF file lazily: it lists all tensors with the types that llama.cpp wants them in and
reads nothing yet. This module takes that list over, with a source for the values of each tensor.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LazyBase, LazyChunkedTensor, LlamaFileType

from tritconv.console import note
from tritconv.errors import TritError
from tritconv.foreign_code import guard
from tritconv.gguf_types import TRIT_TYPE
from tritconv.plan import Kind, SourceTensor, kind_of
from tritconv.tokenizer import TokenizerReading

# The libraries' remarks on the way are for their developers; what matters comes back as an exception.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, mapped. `header` holds the metadata of the GGUF file to write."""

    header: GGUFWriter
    tensors: list[SourceTensor]


def open_checkpoint(folder: Path, depth: int, name: str | None = None, pre: str | None = None) -> Checkpoint:
    """Map the checkpoint in `folder` to GGUF names and metadata. Reads no weights.

    Args:
        folder: a checkpoint that has been checked.
        depth: trits per weight, for the file type.
        name: of the model; None leaves it to llama.cpp, which asks the model card and the folder's name.
        pre: llama.cpp's name of the pre-tokenizer; None leaves it to llama.cpp's converter.

    Raises:
        TritError: llama.cpp's converter does not know the architecture or the tokenizer, or cannot read a file.
    """
    guard()
    # the package of the patched llama.cpp: loading it takes seconds, so only a conversion does
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    try:
        hparams = ModelBase.load_hparams(folder, False)
        architecture = get_model_architecture(hparams, ModelType.TEXT)
    except Exception as error:
        raise TritError(f"{folder / 'config.json'} names no architecture: {_first_line(error)}") from error
    try:
        upstream = get_model_class(architecture)
    except NotImplementedError as error:
        raise TritError(f"{folder}: llama.cpp's converter does not support {architecture}") from error

    try:
        model = _mapping(upstream, pre)(folder, LlamaFileType[f"MOSTLY_TRIT{depth}"], Path(os.devnull), model_name=name)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
    except TritError:
        raise
    except Exception as error:  # the package raises whatever its many authors chose
        raise TritError(f"{folder}: llama.cpp's converter failed on {architecture}: {_first_line(error)}") from error
    _note_what_is_left_out(hparams)
    return Checkpoint(model.gguf_writer, list(_source_tensors(model, depth)))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_OTHER_PARTS = {
    "vision": ("vision_config", "vit_config", "visual", "vision_tower", "mm_vision_tower"),
    "audio": ("audio_config", "audio_encoder_config"),
}


def _note_what_is_left_out(hparams: dict[str, Any]) -> None:
    from conversion import MMPROJ_MODEL_MAP

    left_out = [part for part, keys in _OTHER_PARTS.items() if any(hparams.get(key) for key in keys)]
    if not left_out:
        return
    known = any(name in MMPROJ_MODEL_MAP for name in hparams.get("architectures") or ())
    own_file = "convert_hf_to_gguf.py --mmproj of llama.cpp makes a file of its own for that"
    note(f"the {' and '.join(left_out)} part is left out: the file takes text{f'; {own_file}' if known else ''}")


def _mapping(upstream: type, pre_tokenizer: str | None) -> type:
    """A converter class of llama.cpp that remembers the tensors before they are quantized."""

    class Mapping(TokenizerReading, upstream):
        pre = pre_tokenizer
        model_arch = upstream.model_arch  # type: ignore[attr-defined]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sources: dict[str, Any] = {}

        def modify_tensors(self, data_torch: Any, name: str, bid: int | None) -> Iterable[tuple[str, Any]]:
            for new_name, tensor in super().modify_tensors(data_torch, name, bid):
                self.sources[new_name] = tensor
                yield new_name, tensor

    return Mapping


def _source_tensors(model: Any, depth: int) -> Iterable[SourceTensor]:
    listed = model.gguf_writer.tensors[0]
    for name in list(listed):
        info = listed.pop(name)
        source = model.sources.pop(name, None)
        shape = tuple(int(n) for n in info.shape)
        # llama.cpp's converter takes F16 where the rows do not fit a type's blocks; here the user chooses
        if source is not None and info.dtype in (TRIT_TYPE[depth], GGMLQuantizationType.F16):
            yield SourceTensor(name, shape, kind_of(name), _Load(source))
        else:
            yield SourceTensor(name, shape, Kind.KEPT, _Load(info.tensor), kept_type=info.dtype)


class _Load:
    """Reads a lazy tensor, once. Lazy tensors keep what they have read, so it is let go of afterwards."""

    def __init__(self, lazy: Any) -> None:
        self._lazy = lazy

    def __call__(self) -> np.ndarray:
        lazy, self._lazy = self._lazy, None
        if isinstance(lazy, LazyChunkedTensor):
            return np.concatenate([load() for load in lazy._chunks]).reshape(lazy.shape)
        eager = type(lazy).to_eager(lazy) if isinstance(lazy, LazyBase) else lazy
        return eager if isinstance(eager, np.ndarray) else eager.detach().numpy()
