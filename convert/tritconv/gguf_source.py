"""GGUF files as a source: metadata and tensors of any type that gguf-py can dequantize."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from gguf.gguf_reader import ReaderTensor

from tritconv.errors import TritError
from tritconv.plan import Kind, SourceTensor, kind_of

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

_REPLACED_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")


def open_gguf(path: Path) -> tuple[GGUFWriter, list[SourceTensor]]:
    """The metadata and the tensors of a GGUF file whose header has been checked.

    Raises:
        TritError: the file is one part of several, or holds a type that cannot be dequantized.
    """
    reader = GGUFReader(path)
    if (count := reader.get_field("split.count")) is not None and count.contents() > 1:
        raise TritError(f"{path} is one of {count.contents()} parts: join them with llama-gguf-split --merge")
    return _copy_metadata(reader), [_source_tensor(path, tensor) for tensor in reader.tensors]


def _copy_metadata(reader: GGUFReader) -> GGUFWriter:
    architecture = reader.get_field("general.architecture")
    header = GGUFWriter(None, arch=architecture.contents() if architecture else "unknown")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "split.", "trit.")) or field.name in _REPLACED_KEYS:
            continue
        value_type = field.types[0]
        sub_type = field.types[-1] if value_type is GGUFValueType.ARRAY else None
        value = field.contents()
        if value_type is GGUFValueType.ARRAY and not len(value):
            continue
        header.add_key_value(field.name, value, value_type, sub_type)
    return header


def _source_tensor(path: Path, tensor: ReaderTensor) -> SourceTensor:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    if _is_matrix(tensor.name, shape, tensor.tensor_type):
        return SourceTensor(tensor.name, shape, kind_of(tensor.name), _dequantize(path, tensor, shape))
    data = np.asarray(tensor.data)
    return SourceTensor(tensor.name, shape, Kind.KEPT, lambda: data, kept_type=tensor.tensor_type)


def _is_matrix(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> bool:
    stem = name.removesuffix(".weight")
    return (
        name.endswith(".weight")
        and len(shape) >= 2
        and not stem.endswith("_norm")
        and stem.rpartition(".")[2] not in _FLOAT_ONLY
        and qtype not in _INTEGERS
    )


def _dequantize(path: Path, tensor: ReaderTensor, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        try:
            return quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        except NotImplementedError as error:
            raise TritError(
                f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which gguf cannot dequantize; "
                "convert from an F16 or Q8_0 file"
            ) from error

    return load
