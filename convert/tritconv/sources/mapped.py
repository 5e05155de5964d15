"""Checkpoints through llama.cpp's own conversion package: it maps names, tokenizer and metadata.

The package prepares a GGUF file lazily: it lists all tensors with the types that llama.cpp wants them in and
reads nothing yet. This module takes that list over, with a source for the values of each tensor.
"""

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, MODEL_TENSORS, GGMLQuantizationType, LlamaFileType

from tritconv.sources.agreement import (
    check_head,
    check_layers,
    check_mapped_layers,
    check_metadata,
    check_tokens,
    fit_tokens,
)
from tritconv.sources.foreign_code import guard
from tritconv.sources.lazy import LazyLoad
from tritconv.sources.model_card import usable_card
from tritconv.sources.model_config import read_config
from tritconv.sources.source import Kind, Origin, Source, SourceTensor, Value, in_file_order, kind_of
from tritconv.sources.tokenizer import TokenizerReading
from tritconv.sources.upstream import TensorReading, at_work, reading, reason
from tritconv.sources.weights import read_weights
from tritcore import ggml
from tritcore.console import note
from tritcore.errors import TritError

# The libraries' remarks on the way are for their developers; what matters comes back as an exception.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_FILE_TYPE = LlamaFileType.MOSTLY_TRIT2  # any type of blocks makes the converter say what may be stored in blocks
_OF_THE_FILE = ("general.architecture", "general.file_type", "general.quantization_version")  # for the writer to say


def open_checkpoint(folder: Path, *, name: str | None = None, pre: str | None = None) -> Source:
    """Map the checkpoint in `folder` to GGUF names and metadata. Reads no weights.

    Args:
        folder: a checkpoint that has been checked.
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
    logging.getLogger("metadata").setLevel(logging.CRITICAL)
    try:
        hparams = ModelBase.load_hparams(folder, False)
        architecture = get_model_architecture(hparams, ModelType.TEXT)
    except Exception as error:
        raise TritError(f"{folder / 'config.json'} names no architecture: {reason(error)}") from error
    try:
        upstream = get_model_class(architecture)
    except NotImplementedError as error:
        raise TritError(f"{folder}: llama.cpp's converter does not support {architecture}") from error

    weights = read_weights(folder)
    # as llama.cpp's converter merges the settings of the language model
    check_layers(folder, weights, {**hparams, **(hparams.get("text_config") or {})})
    try:
        with reading(weights):
            arguments = (folder, _FILE_TYPE, Path(os.devnull))
            model = at_work(upstream(*arguments, model_name=name))
        model.__class__ = _mapping(type(model), pre)
        model.begin()
        model.prepare_tensors()
        _check(folder, model)
        _prepare_metadata(folder, model)
    except TritError:
        raise
    except Exception as error:  # the package raises whatever its many authors chose
        raise TritError(f"{folder}: llama.cpp's converter failed on {architecture}: {reason(error)}") from error
    _note_what_is_left_out(hparams)
    tensors = in_file_order(_source_tensors(model))
    if not any(tensor.kind is Kind.MATRIX for tensor in tensors):
        raise TritError(f"{folder}: llama.cpp's converter made no matrices of the {len(weights)} tensors of its files")
    metadata = {
        key: Value(field.value, field.type, field.sub_type)
        for key, field in model.gguf_writer.kv_data[0].items()
        if key not in _OF_THE_FILE
    }
    origin = Origin(folder)
    return Source(origin.name, model.gguf_writer.arch, metadata, tensors, origin)


def _check(folder: Path, model: Any) -> None:
    """See that what was mapped is a whole model. Raises TritError."""
    listed = model.gguf_writer.tensors[0]
    check_mapped_layers(folder, listed, model.hparams)
    if "output.weight" not in listed and MODEL_TENSOR.OUTPUT in MODEL_TENSORS[model.model_arch]:
        check_head(folder, read_config(folder), model.hparams)


def _prepare_metadata(folder: Path, model: Any) -> None:
    """Make the metadata, with as many tokens as the embeddings have rows. Raises TritError."""
    embeddings = model.sources.get("token_embd.weight")
    if embeddings is None or embeddings.ndim != 2:
        raise TritError(f"{folder} has no embeddings of tokens: it is no language model, or incomplete")
    n_rows = int(embeddings.shape[0])
    # whatever config.json says: a resized model often keeps the old number
    for key in ("vocab_size", "padded_vocab_size"):
        if key in model.hparams:
            model.hparams[key] = n_rows
    model._prec_a4 = {}  # hints for blocks that are dequantized here
    try:
        with usable_card(folder):
            model.prepare_metadata(vocab_only=False)
    except TritError:
        check_tokens(folder, n_rows, added_too=True)  # the usual reason, which the converter does not name
        raise
    check_tokens(folder, n_rows, added_too=False)
    fit_tokens(folder, model.gguf_writer, n_rows)
    check_metadata(folder, model.gguf_writer)


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
    """A converter class of llama.cpp with what this package adds to it."""

    class Mapping(TokenizerReading, TensorReading, upstream):
        pre = pre_tokenizer
        model_arch = upstream.model_arch  # type: ignore[attr-defined]

    return Mapping


def _source_tensors(model: Any) -> Iterable[SourceTensor]:
    listed = model.gguf_writer.tensors[0]
    factors = _factors(listed)
    for name in list(listed):
        info = listed.pop(name)
        source = model.sources.pop(name, None)
        shape = tuple(int(n) for n in info.shape)
        is_packed = GGML_QUANT_SIZES[info.dtype][0] > 1
        # llama.cpp's converter takes F16 where the rows do not fit a type's blocks; here the user chooses
        if source is not None and (is_packed or info.dtype is GGMLQuantizationType.F16):
            load = LazyLoad(name, source)
            yield SourceTensor(name, shape, kind_of(name), load, load_sample=partial(load.sample, shape))
        elif is_packed:
            dequantize = _Dequantize(LazyLoad(name, info.tensor), info.dtype, shape, factors.get(name))
            yield SourceTensor(name, shape, kind_of(name), dequantize)
        else:
            yield SourceTensor(name, shape, Kind.KEPT, LazyLoad(name, info.tensor), kept_type=info.dtype)


def _factors(listed: dict[str, Any]) -> dict[str, np.ndarray]:
    """The factors of NVFP4 matrices by name, which GGUF has in tensors of their own: taken from the list."""
    factors = {}
    for name, info in list(listed.items()):
        if info.dtype is GGMLQuantizationType.NVFP4:
            stem = name.removesuffix("weight")
            listed.pop(f"{stem}input_scale", None)  # of activations
            if (factor := listed.pop(f"{stem}scale", None)) is not None:
                factors[name] = np.asarray(factor.tensor)
    return factors


class _Dequantize:
    """Reads a matrix that comes in blocks of llama.cpp's: float32 of `shape`, times a factor for all or each expert."""

    def __init__(
        self, load: LazyLoad, qtype: GGMLQuantizationType, shape: tuple[int, ...], factor: np.ndarray | None
    ) -> None:
        self._load = load
        self._qtype = qtype
        self._shape = shape
        self._factor = factor

    def __call__(self) -> np.ndarray:
        values = ggml.dequantize(self._load(), self._qtype).reshape(self._shape)
        if self._factor is not None:
            values *= self._factor.reshape(-1, *(1 for _ in self._shape[1:])) if self._factor.size > 1 else self._factor
        return values
