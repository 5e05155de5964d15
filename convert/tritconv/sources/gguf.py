"""GGUF files as a source: metadata and tensors of any type that gguf-py can dequantize."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

from tritconv.plan import Kind, SourceTensor, kind_of
from tritcore.codec import validate
from tritcore.errors import TritError
from tritcore.format import BYTES_PER_BLOCK
from tritcore.gguf_header import ModelFile, Tensor, parts_of, raw_values, read_model_file
from tritcore.gguf_types import DEPTH_OF_TYPE

# Matrices that llama.cpp computes with in float only; its converter keeps the same ones.
_FLOAT_ONLY = {
    TENSOR_NAMES[tensor].rpartition(".")[2]
    for tensor in (
        MODEL_TENSOR.FFN_GATE_INP,
        MODEL_TENSOR.FFN_GATE_INP_SHEXP,
        MODEL_TENSOR.POS_EMBD,
        MODEL_TENSOR.TOKEN_TYPES,
        MODEL_TENSOR.SSM_CONV1D,
        MODEL_TENSOR.SSM_CONV1D_Q,
        MODEL_TENSOR.SSM_CONV1D_K,
        MODEL_TENSOR.SSM_CONV1D_V,
        MODEL_TENSOR.SHORTCONV_CONV,
        MODEL_TENSOR.TIME_MIX_FIRST,
        MODEL_TENSOR.TIME_MIX_W1,
        MODEL_TENSOR.TIME_MIX_W2,
        MODEL_TENSOR.TIME_MIX_DECAY_W1,
        MODEL_TENSOR.TIME_MIX_DECAY_W2,
        MODEL_TENSOR.TIME_MIX_LERP_FUSED,
        MODEL_TENSOR.POSNET_NORM1,
        MODEL_TENSOR.POSNET_NORM2,
        MODEL_TENSOR.ALTUP_CORRECT_COEF,
        MODEL_TENSOR.INDEXER_PROJ,
    )
}

_INTEGERS = [GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64")]

_DTYPES = {
    GGMLQuantizationType[name]: np.dtype(dtype)
    for name, dtype in {
        "F16": "<f2",
        "F32": "<f4",
        "F64": "<f8",
        "I8": "i1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
    }.items()
}  # of the types whose values are stored as they are; those of all others are blocks of bytes

# Keys that tell how the source is stored or was made, which is not how the file to write is.
_NOT_COPIED = re.compile(
    r"general\.(architecture|alignment|file_type|quantiz\w+)|(imatrix|mradermacher|quantize|split|trit)\..*", re.DOTALL
)

_NO_MODELS = {
    "adapter": "a LoRA adapter, not a model: merge it into its model before the conversion",
    "imatrix": "an importance matrix, not a model: give it with --imatrix, and a model as the source",
    "mmproj": "the vision or audio part of a model (mmproj): convert the language model, and use this file as it is",
    "controlvector": "a control vector, not a model: convert the model, and use this file as it is",
}


def open_gguf(path: Path) -> tuple[GGUFWriter, list[SourceTensor]]:
    """The metadata and the tensors of a GGUF file; of all parts, if the file is one of several.

    Raises:
        TritError: the file or another part is missing or damaged, or is no model.
    """
    parts = parts_of(read_model_file(path))
    if (what := not_a_model(parts)) is not None:
        raise TritError(f"{path} {what}")
    return _copy_metadata(parts[0]), [tensor for part in parts for tensor in _source_tensors(part)]


def not_a_model(parts: Sequence[ModelFile]) -> str | None:
    """What a GGUF file is that is no model with weights, as the end of a sentence about it; None for a model."""
    metadata = parts[0].metadata
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind == "model":
        kind = {"clip": "mmproj", "controlvector": "controlvector"}.get(str(architecture), kind)
    names = [tensor.name for part in parts for tensor in part.tensors]
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        kind = "adapter"
    if names and all(name.endswith((".in_sum2", ".counts")) for name in names):
        kind = "imatrix"
    if kind != "model":
        return f"is {_NO_MODELS.get(str(kind), f'of the type {kind}, not a model')}"
    if not names:
        what = "only a vocabulary" if parts[0].vocabulary_size else "no tensors"
        return f"holds {what}: convert a file with the model's weights"
    if not architecture:
        return "does not say of which architecture it is (general.architecture): it is no model"
    return None


def _copy_metadata(model: ModelFile) -> GGUFWriter:
    header = GGUFWriter(None, arch=str(model.metadata["general.architecture"]))
    for key, field, value in raw_values(model):
        if _NOT_COPIED.fullmatch(key):
            continue
        if field.type is GGUFValueType.ARRAY and not value:  # as good as no key, and all that gguf-py can write
            continue
        header.add_key_value(key, value, field.type, field.element_type)
    return header


def _source_tensors(model: ModelFile) -> list[SourceTensor]:
    if not model.tensors:
        return []
    data = np.memmap(model.path, dtype=np.uint8, mode="r")
    return [_source_tensor(model, tensor, data) for tensor in model.tensors]


def _source_tensor(model: ModelFile, tensor: Tensor, data: np.ndarray) -> SourceTensor:
    start = model.data_start + tensor.offset
    stored = data[start : start + tensor.n_bytes]
    shape = tuple(reversed(tensor.shape))
    if _is_matrix(tensor.name, shape, tensor.type):
        return SourceTensor(tensor.name, shape, kind_of(tensor.name), _dequantize(model.path, tensor, stored, shape))
    if tensor.type is GGMLQuantizationType.F64:  # which gguf-py cannot write, and no model needs
        kept_type = GGMLQuantizationType.F32
        return SourceTensor(tensor.name, shape, Kind.KEPT, lambda: _float32(tensor, stored, shape), kept_type=kept_type)
    return SourceTensor(tensor.name, shape, Kind.KEPT, lambda: _values(tensor, stored, shape), kept_type=tensor.type)


def _values(tensor: Tensor, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The values of uint8 (bytes,) in `shape`; of a type that has blocks, uint8 (..., bytes of a row)."""
    dtype = _DTYPES.get(tensor.type)
    if dtype is not None:
        return stored.view(dtype).reshape(shape)
    block, block_bytes = GGML_QUANT_SIZES[tensor.type]
    return stored.reshape(*shape[:-1], shape[-1] // block * block_bytes)


def _is_matrix(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> bool:
    stem = name.removesuffix(".weight")
    return (
        name.endswith(".weight")
        and len(shape) >= 2
        and not stem.endswith("_norm")
        and stem.rpartition(".")[2] not in _FLOAT_ONLY
        and qtype not in _INTEGERS
    )


def _float32(tensor: Tensor, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    with np.errstate(all="ignore"):  # what becomes infinite is refused when it is stored
        return _values(tensor, stored, shape).astype(np.float32)


def _dequantize(path: Path, tensor: Tensor, stored: np.ndarray, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        if tensor.type is GGMLQuantizationType.F64:
            return _float32(tensor, stored, shape)
        if (depth := DEPTH_OF_TYPE.get(tensor.type)) is not None:
            try:
                validate(depth, stored.reshape(-1, BYTES_PER_BLOCK[depth]))
            except TritError as error:
                raise TritError(f"{path}: tensor {tensor.name}: {error}; download or convert it again") from error
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused when it is stored
                return quants.dequantize(_values(tensor, stored, shape), tensor.type).reshape(shape)
        except NotImplementedError as error:
            raise TritError(
                f"{path}: tensor {tensor.name} is {tensor.type.name}, which gguf cannot dequantize; "
                "convert from an F16 or Q8_0 file"
            ) from error

    return load
