"""Read a GGUF header and check the file, before llama.cpp gets it.

The file is hostile until it is checked: every length is compared with the size of the file before it is
used, arrays are walked, not loaded. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md is the format.
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.filesize import decimal as human_size

from tritconv.errors import TritError
from tritconv.format import FORMAT_VERSION

_GGUF_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_KEPT_STRING = 64 * 1024
_MAX_KEPT_ARRAY = 4096
_MAX_ARRAY = 1 << 30  # llama.cpp's own limit
_DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALAR_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALARS = {value_type: struct.Struct("<" + code) for value_type, code in _SCALAR_CODES.items()}


@dataclass(frozen=True)
class Skipped:
    """An array or string that was checked but is too long to keep. `length` is in elements or bytes."""

    length: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Skipped


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table. `shape` has the row length first, as in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the data section
    n_bytes: int


@dataclass(frozen=True)
class ModelFile:
    """The header of a GGUF file that has passed all checks."""

    path: Path
    size: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...]
    data_start: int  # bytes from the start of the file

    @property
    def name(self) -> str:
        """The model's own name, or the file's."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name.strip() else self.path.stem

    @property
    def main_type(self) -> str:
        """The tensor type that holds most of the weights."""
        weights: Counter[str] = Counter()
        for tensor in self.tensors:
            weights[tensor.type.name] += math.prod(tensor.shape)
        return weights.most_common(1)[0][0] if weights else "no tensors"

    @property
    def bits_per_weight(self) -> float:
        """Size of all tensors in bits over the number of weights."""
        weights = sum(math.prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.n_bytes for tensor in self.tensors) / weights if weights else 0.0

    @property
    def trained_context(self) -> int:
        """Context length in tokens that the model was trained for, 0 if the file does not say."""
        return self._count("context_length")

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, 0 if the file has no tokenizer."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, Skipped) else 0

    def kv_cache_bytes(self, n_ctx: int) -> int:
        """Estimate of the float16 key-value cache for `n_ctx` tokens, in bytes.

        An upper bound for models with sliding windows; 0 where the metadata does not say.
        """
        layers, heads, width = self._count("block_count"), self._count("attention.head_count"), 0
        if heads:
            width = self._count("embedding_length") // heads
        keys = self._count("attention.key_length") or width
        values = self._count("attention.value_length") or width
        per_layer = self.metadata.get(self._key("attention.head_count_kv"))
        if isinstance(per_layer, tuple):
            kv_heads = sum(n for n in per_layer if isinstance(n, int) and n > 0)
        else:
            kv_heads = layers * (self._count("attention.head_count_kv") or heads)
        return 2 * n_ctx * kv_heads * (keys + values)

    def share_of_layers(self, gpu_layers: int) -> float:
        """Share of the layers, 0..1, that `--gpu-layers` moves to a GPU; the output counts as one layer."""
        layers = self._count("block_count") + 1
        return min(gpu_layers / layers, 1.0) if gpu_layers >= 0 else 1.0

    def check_memory(self, n_ctx: int, available: int | None, on_gpu: float = 0.0) -> None:
        """Refuse a model that does not fit.

        Args:
            n_ctx: context length in tokens.
            available: bytes of memory, None if unknown (then nothing is refused).
            on_gpu: share of the layers that a GPU holds, 0..1.

        Raises:
            TritError: weights and key-value cache need more than `available`.
        """
        weights = int(self.size * (1 - on_gpu))
        cache = int(self.kv_cache_bytes(n_ctx) * (1 - on_gpu))
        if available is not None and weights + cache > available:
            raise TritError(
                f"{self.path} does not fit into memory: it needs {human_size(weights)} for weights and about "
                f"{human_size(cache)} for a context of {n_ctx} tokens, {human_size(available)} are free; "
                "take a smaller --ctx or a smaller model"
            )

    def _key(self, key: str) -> str:
        return f"{self.metadata.get('general.architecture')}.{key}"

    def _count(self, key: str) -> int:
        value = self.metadata.get(self._key(key))
        return value if isinstance(value, int) and value > 0 else 0


def read_model_file(path: Path) -> ModelFile:
    """Read and check the header of the GGUF file at `path`.

    Raises:
        TritError: there is no such file, it is not GGUF, it is cut off or damaged, or it holds a tensor type
            or a TRIT format version that is not known here.
    """
    try:
        if not path.exists():
            raise TritError(f"{path}: no such file")
        if not path.is_file():
            raise TritError(f"{path}: not a regular file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise TritError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _HeaderReader(path, data).read()
    except OSError as error:
        raise TritError(f"{path}: cannot be read: {error.strerror}") from error


class _HeaderReader:
    """Reads one header from `data`, front to back; `self._at` is the place in bytes."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 4

    def read(self) -> ModelFile:
        self._check_gguf_version()
        n_tensors, n_keys = self._number(_U64), self._number(_U64)
        metadata = dict(self._metadata(n_keys))
        self._check_trit_version(metadata)
        tensors = tuple(self._tensors(n_tensors))
        data_start = self._check_data(metadata, tensors)
        return ModelFile(self._path, self._size, metadata, tensors, data_start)

    def _check_gguf_version(self) -> None:
        version = self._number(_U32)
        if version not in _GGUF_VERSIONS:
            big_endian = int.from_bytes(_U32.pack(version), "big") in _GGUF_VERSIONS
            what = "big-endian GGUF" if big_endian else f"GGUF version {version}"
            raise TritError(f"{self._path}: {what} is not supported, only little-endian versions 2 and 3")

    def _check_trit_version(self, metadata: dict[str, Value]) -> None:
        # llama-quantize writes TRIT tensors without the key: they are version 1.
        version = metadata.get("trit.format_version", 1)
        if version != FORMAT_VERSION:
            raise TritError(
                f"{self._path}: TRIT format version {version} is not known, only {FORMAT_VERSION}; update trit-gguf, "
                "or convert the model again"
            )

    def _metadata(self, n_keys: int) -> Iterator[tuple[str, Value]]:
        for _ in range(n_keys):
            key = self._short_string("a metadata key")
            value_type = self._number(_U32)
            if value_type == _ARRAY:
                yield key, self._array(key)
            elif value_type == _STRING:
                yield key, self._string()
            else:
                yield key, self._number(self._scalar(key, value_type))

    def _scalar(self, key: str, value_type: int) -> struct.Struct:
        if value_type not in _SCALARS:
            raise self._damaged(f"metadata key '{key}' has the unknown type {value_type}")
        return _SCALARS[value_type]

    def _array(self, key: str) -> tuple[int | float | bool, ...] | Skipped:
        element_type, length = self._number(_U32), self._number(_U64)
        if length > _MAX_ARRAY:
            raise self._damaged(f"metadata key '{key}' has {length} elements")
        if element_type == _STRING:
            for _ in range(length):
                self._skip(self._number(_U64))
            return Skipped(length)
        element = self._scalar(key, element_type)
        start = self._skip(length * element.size)
        if length > _MAX_KEPT_ARRAY:
            return Skipped(length)
        return tuple(value for (value,) in element.iter_unpack(self._data[start : self._at]))

    def _tensors(self, n_tensors: int) -> Iterator[Tensor]:
        for _ in range(n_tensors):
            name = self._short_string("a tensor name")
            n_dims = self._number(_U32)
            if n_dims > _MAX_DIMS:
                raise self._damaged(f"tensor '{name}' has {n_dims} dimensions")
            shape = tuple(self._number(_U64) for _ in range(n_dims))
            type_id, offset = self._number(_U32), self._number(_U64)
            yield self._tensor(name, shape, type_id, offset)

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> Tensor:
        try:
            tensor_type = GGMLQuantizationType(type_id)
            block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        except (ValueError, KeyError):
            raise TritError(
                f"{self._path}: tensor '{name}' has the unknown type {type_id}; update trit-gguf, or convert "
                "the model again"
            ) from None
        row = shape[0] if shape else 1
        if row % block:
            raise self._damaged(f"tensor '{name}' has rows of {row}, not a multiple of {block}")
        return Tensor(name, shape, tensor_type, offset, math.prod(shape) // block * block_bytes)

    def _check_data(self, metadata: dict[str, Value], tensors: tuple[Tensor, ...]) -> int:
        """Check that all data lie in the file; returns where they start."""
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment}, not a power of two")
        data_start = -(-self._at // alignment) * alignment
        for tensor in tensors:
            end = data_start + tensor.offset + tensor.n_bytes
            if end > self._size:
                raise TritError(
                    f"{self._path}: truncated: tensor '{tensor.name}' ends at byte {end}, the file at byte "
                    f"{self._size}; download or convert the model again"
                )
        return data_start

    def _string(self) -> str | Skipped:
        length = self._number(_U64)
        start = self._skip(length)
        if length > _MAX_KEPT_STRING:
            return Skipped(length)
        return self._data[start : self._at].decode(errors="replace")

    def _short_string(self, what: str) -> str:
        text = self._string()
        if isinstance(text, Skipped):
            raise self._damaged(f"{what} of {text.length} bytes")
        return text

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack_from(self._data, self._skip(form.size))[0]

    def _skip(self, n_bytes: int) -> int:
        """Step over `n_bytes`; returns where they begin."""
        start = self._at
        if n_bytes > self._size - start:
            raise TritError(
                f"{self._path}: truncated or damaged: the header reaches past the end of the file (byte "
                f"{self._size}); download or convert the model again"
            )
        self._at = start + n_bytes
        return start

    def _damaged(self, what: str) -> TritError:
        return TritError(f"{self._path}: damaged header: {what}; download or convert the model again")
