"""GGUF files as a source: metadata and tensors of any type that ggml can decode."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFValueType

from tritconv.sources.source import Kind, Origin, Source, SourceTensor, Value, in_file_order, kind_of
from tritcore import ggml
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


def open_gguf(path: Path) -> Source:
    """The metadata and the tensors of a GGUF file; of all parts, if the file is one of several.

    Raises:
        TritError: the file or another part is missing or damaged, or is no model.
    """
    parts = parts_of(read_model_file(path))
    if (what := not_a_model(parts)) is not None:
        raise TritError(f"{path} {what}")
    tensors = in_file_order(_source_tensor(part, tensor) for part in parts for tensor in part.tensors)
    architecture = str(parts[0].metadata["general.architecture"])
    return Source(path.name, architecture, _metadata(parts[0]), tensors, Origin(path.parent, path.name))


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


def _metadata(model: ModelFile) -> dict[str, Value]:
    """The metadata to copy. An array without elements is as good as no key, and gguf-py cannot write it."""
    return {
        key: Value(value, field.type, field.element_type)
        for key, field, value in raw_values(model)
        if not _NOT_COPIED.fullmatch(key) and not (field.type is GGUFValueType.ARRAY and not value)
    }


def _source_tensor(model: ModelFile, tensor: Tensor) -> SourceTensor:
    stored = _Stored(model.path, tensor, model.data_start + tensor.offset)
    if _is_matrix(tensor.name, stored.shape, tensor.type):
        return SourceTensor(
            tensor.name, stored.shape, kind_of(tensor.name), stored.dequantize, load_sample=stored.dequantize_some
        )
    if tensor.type is GGMLQuantizationType.F64:  # which gguf-py cannot write, and no model needs
        return SourceTensor(tensor.name, stored.shape, Kind.KEPT, stored.float32, kept_type=GGMLQuantizationType.F32)
    return SourceTensor(tensor.name, stored.shape, Kind.KEPT, stored.values, kept_type=tensor.type)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file. Nothing of it stays in memory, nor mapped, after a call.

    Attributes:
        start: where its data begin in the file, in bytes.
    """

    path: Path
    tensor: Tensor
    start: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Row length last."""
        return tuple(reversed(self.tensor.shape))

    def values(self) -> np.ndarray:
        """The values as they are; of a type that has blocks, uint8 (..., bytes of a row). Raises TritError."""
        data = np.fromfile(self.path, np.uint8, self.tensor.n_bytes, offset=self.start)
        if len(data) < self.tensor.n_bytes:
            raise TritError(f"{self.path}: tensor {self.tensor.name} is cut off: the file has become shorter meanwhile")
        return self._in_rows(data)

    def float32(self) -> np.ndarray:
        """The values of a type without blocks, in float32. Raises TritError."""
        with np.errstate(all="ignore"):  # what becomes infinite is refused when it is stored
            return self.values().astype(np.float32)

    def dequantize(self) -> np.ndarray:
        """The weights, float32 of `shape`. Raises TritError."""
        return self._dequantized(self.values(), self.shape)

    def dequantize_some(self, step: int) -> np.ndarray:
        """One in `step` rows of each matrix, float32 (matrices, rows, n). Raises TritError."""
        data = np.memmap(self.path, np.uint8, "r", self.start, (self.tensor.n_bytes,))
        rows = self._in_rows(data)
        some = np.array(rows.reshape(-1, self.shape[-2], rows.shape[-1])[:, ::step])
        try:
            return self._dequantized(some, (*some.shape[:2], self.shape[-1]))
        except TritError:
            self.dequantize()  # says the same of the right block
            raise

    def _in_rows(self, data: np.ndarray) -> np.ndarray:
        """uint8 (bytes,) as `values` has it."""
        dtype = _DTYPES.get(self.tensor.type)
        if dtype is not None:
            return data.view(dtype).reshape(self.shape)
        block, block_bytes = GGML_QUANT_SIZES[self.tensor.type]
        return data.reshape(*self.shape[:-1], self.shape[-1] // block * block_bytes)

    def _dequantized(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Rows as `_in_rows` has them, as float32 of `shape`."""
        if self.tensor.type is GGMLQuantizationType.F64:
            with np.errstate(all="ignore"):
                return rows.astype(np.float32)
        if (depth := DEPTH_OF_TYPE.get(self.tensor.type)) is not None:
            try:
                validate(depth, rows.reshape(-1, BYTES_PER_BLOCK[depth]))
            except TritError as error:
                raise TritError(
                    f"{self.path}: tensor {self.tensor.name}: {error}; download or convert it again"
                ) from error
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused when it is stored
                return ggml.dequantize(rows, self.tensor.type).reshape(shape)
        except NotImplementedError as error:
            raise TritError(
                f"{self.path}: tensor {self.tensor.name} is {self.tensor.type.name}, which ggml cannot decode; "
                "convert from an F16 or Q8_0 file"
            ) from error


def _is_matrix(name: str, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> bool:
    stem = name.removesuffix(".weight")
    return (
        name.endswith(".weight")
        and len(shape) >= 2
        and not stem.endswith("_norm")
        and stem.rpartition(".")[2] not in _FLOAT_ONLY
        and qtype not in _INTEGERS
    )
