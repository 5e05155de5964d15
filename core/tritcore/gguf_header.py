"""Reads and checks the header of a GGUF file that may be hostile.

Every length is compared with the size of the file before it is used. Counts have limits far above those of real models,
since a sparse file may claim any size. llama.cpp and gguf-py can read every file that passes. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from rich.filesize import decimal as human_size

from tritcore.errors import TritError, first_line
from tritcore.format import FORMAT_VERSION

_GGUF_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_NAME = 63  # bytes of a tensor's name, ggml's limit
_MAX_KEY = 65535  # bytes, the format's limit
_MAX_ELEMENTS = (1 << 63) - 1  # of a tensor, ggml's limit
_MAX_KEPT_STRING = 64 * 1024
_MAX_KEPT_ARRAY = 4096
_CHUNK = 1 << 20  # bytes that are looked at together
_MAX_SHOWN = 300  # characters of a fault in an error
_DEFAULT_ALIGNMENT = 32

# Far beyond what models have: 2000 tensors, 50 keys, a million tokens and merges, a header of 20 MB.
_MAX_ENTRIES = 1 << 16  # keys, and tensors
_MAX_STRINGS = 1 << 22  # in all arrays together
_MAX_HEADER = 1 << 28  # bytes
_MAX_ALIGNMENT = 1 << 24  # bytes

_MAGIC = b"GGUF"
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.BOOL
_SCALARS = {
    GGUFValueType[name]: struct.Struct("<" + code)
    for name, code in {
        "UINT8": "B",
        "INT8": "b",
        "UINT16": "H",
        "INT16": "h",
        "UINT32": "I",
        "INT32": "i",
        "FLOAT32": "f",
        "BOOL": "?",
        "UINT64": "Q",
        "INT64": "q",
        "FLOAT64": "d",
    }.items()
}
_VALUE_TYPES = {int(value_type): value_type for value_type in GGUFValueType}
_INTEGERS = frozenset(value_type for value_type in _SCALARS if "INT" in value_type.name)


@dataclass(frozen=True)
class _Kind:
    """The types that a value may have: `types` as a single value, `elements` as elements of a list."""

    name: str
    types: frozenset[GGUFValueType] = frozenset()
    elements: frozenset[GGUFValueType] = frozenset()


_TEXT = _Kind("text", types=frozenset({_STRING}))
_INTEGER = _Kind("an integer", types=_INTEGERS)
_FLAG = _Kind("a bool", types=frozenset({_BOOL}))
_UINT32 = _Kind("a uint32", types=frozenset({GGUFValueType.UINT32}))
_TEXTS = _Kind("a list of texts", elements=frozenset({_STRING}))
_BYTES = _Kind("a list of bytes", elements=frozenset({GGUFValueType.UINT8, GGUFValueType.INT8}))
_NUMBERS = _Kind("a list of numbers", elements=_INTEGERS | {GGUFValueType.FLOAT32})
_PER_LAYER = _Kind("an integer or a list of integers", types=_INTEGERS, elements=_INTEGERS)

# The programs use these values without another check of their types.
_EXPECTED = {
    "general.alignment": _UINT32,
    "general.architecture": _TEXT,
    "general.file_type": _INTEGER,
    "general.name": _TEXT,
    "general.quantization_version": _INTEGER,
    "general.type": _TEXT,
    "split.count": _INTEGER,
    "split.no": _INTEGER,
    "split.tensors.count": _INTEGER,
    "tokenizer.chat_template": _TEXT,
    "tokenizer.ggml.merges": _TEXTS,
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.precompiled_charsmap": _BYTES,
    "tokenizer.ggml.scores": _NUMBERS,
    "tokenizer.ggml.token_type": _NUMBERS,
    "tokenizer.ggml.tokens": _TEXTS,
    "trit.depth": _INTEGER,
    "trit.format_version": _INTEGER,
    "trit.method": _TEXT,
}
_EXPECTED_OF_ARCHITECTURE = {
    "attention.head_count": _PER_LAYER,
    "attention.head_count_kv": _PER_LAYER,
    "attention.key_length": _INTEGER,
    "attention.value_length": _INTEGER,
    "block_count": _INTEGER,
    "context_length": _INTEGER,
    "embedding_length": _INTEGER,
    "feed_forward_length": _PER_LAYER,
    "vocab_size": _INTEGER,
}
_EXPECTED_LIKE = [
    (re.compile(r"tokenizer\.ggml\.\w+_token_id"), _INTEGER),
    (re.compile(r"tokenizer\.ggml\.add_\w+"), _FLAG),
    (re.compile(r"tokenizer\.chat_template\..*"), _TEXT),
]
_ARCHITECTURE = re.compile(r"[!-~]{0,63}")

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Skipped:
    """An array or string that was checked but is too long to keep. `length` is in elements or bytes."""

    length: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Skipped


@dataclass(frozen=True)
class Field:
    """Type and position of a metadata value.

    element_type: of an array, else None.
    start: bytes from the start of the file to the value; of an array and a string, to the first byte after its length.
    length: of an array in elements, of a string in bytes, else 1.
    """

    type: GGUFValueType
    element_type: GGUFValueType | None
    start: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table. `shape` has the row length first, as in the file; a scalar has the shape (1,)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the data section
    n_bytes: int


@dataclass(frozen=True)
class ModelFile:
    """The header of a GGUF file that has passed all checks.

    metadata: text as far as it is UTF-8, other bytes replaced; `raw_values` has the bytes.
    fields: where each of the values lies, by key.
    """

    path: Path
    size: int
    metadata: dict[str, Value]
    fields: dict[str, Field]
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
        return self.hyperparameter("context_length")

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, 0 if the file has no tokenizer."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, Skipped) else 0

    def key_of_architecture(self, key: str) -> str:
        """The metadata key with the architecture's prefix, such as llama.block_count."""
        return f"{self.metadata.get('general.architecture')}.{key}"

    def hyperparameter(self, key: str) -> int:
        """A positive integer of the architecture, such as block_count; 0 if the file lacks it."""
        value = self.metadata.get(self.key_of_architecture(key))
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
            if file.read(4) != _MAGIC:
                raise _not_gguf(path)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return read_header(path, data)
    except OSError as error:
        raise TritError(f"{path}: cannot be read: {error.strerror}") from error


def read_header(path: Path, data: bytes | mmap.mmap) -> ModelFile:
    """Check the header of a GGUF file whose content is `data`; `path` is its name in errors. Raises TritError."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise _not_gguf(path)
    return _HeaderReader(path, data).read()


def _not_gguf(path: Path) -> TritError:
    return TritError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")


def parts_of(model: ModelFile) -> tuple[ModelFile, ...]:
    """All files of a split model, in order, from any one of them. A model in one file gives that file alone.

    The parts lie in one folder and have llama.cpp's names, such as NAME-00001-of-00003.gguf.

    Raises:
        TritError: a part is missing or damaged, or is of another model.
    """
    count = model.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return (model,)
    number = model.metadata.get("split.no")
    name = _PART_NAME.fullmatch(model.path.name)
    if name is None or (int(name["number"]) - 1, int(name["count"])) != (number, count):
        place = f"part {number + 1}" if isinstance(number, int) else "a part"
        raise TritError(
            f"{model.path} is {place} of {count}, but is not named so: the parts are found by names such as "
            f"model-00001-of-{count:05}.gguf"
        )
    paths = [model.path.with_name(part_name(name["stem"], n, count)) for n in range(count)]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TritError(f"{model.path} is part {int(name['number'])} of {count}: {missing[0]}{more} is not beside it")

    parts = tuple(model if path == model.path else read_model_file(path) for path in paths)
    for index, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (index, count):
            raise TritError(f"{part.path} is not part {index + 1} of {count}, as its name has it: download it again")
    names = Counter(tensor.name for part in parts for tensor in part.tensors)
    wanted = parts[0].metadata.get("split.tensors.count", names.total())
    if names.total() != wanted:
        raise TritError(
            f"{parts[0].path}: the {count} parts hold {names.total()} tensors, not {wanted}: they are not of one model"
        )
    (twice, times), *_ = names.most_common(1) or [("", 0)]
    if times > 1:
        raise TritError(f"{parts[0].path}: tensor '{twice}' is in {times} of the {count} parts: download them again")
    return parts


def joined(parts: Sequence[ModelFile]) -> ModelFile:
    """The header of the first part with the size and the tensors of all; `offset` of a tensor is in its own part."""
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    return replace(parts[0], size=sum(part.size for part in parts), tensors=tensors)


def part_name(stem: str, number: int, count: int) -> str:
    """llama.cpp's name of the file of part `number`, from 0, of a model that is split."""
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def name_of_model(path: Path) -> str:
    """The name of a GGUF file without .gguf, and without the part number of a split model."""
    part = _PART_NAME.fullmatch(path.name)
    return part["stem"] if part else path.name.removesuffix(".gguf")


def number_of_parts(name: str) -> int:
    """The number of parts of a model, as the name of one of its files says; 1 if that is no name of a part."""
    part = _PART_NAME.fullmatch(name)
    return int(part["count"]) if part else 1


def group_parts(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names of GGUF files, those of the parts of one model together, all in order. Parts may be missing."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for name in sorted(names):
        part = _PART_NAME.fullmatch(name)
        groups.setdefault((part["stem"], part["count"]) if part else (name, None), []).append(name)
    return [tuple(group) for group in groups.values()]


def raw_values(model: ModelFile) -> Iterator[tuple[str, Field, Any]]:
    """All metadata values of a file, key by key, unabridged and with the original bytes of texts.

    Yields:
        A key, its field, and the value: an int, float or bool, bytes for a string, a list of these for an array.

    Raises:
        TritError: the file cannot be read any more.
    """
    try:
        with model.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for key, field in model.fields.items():
                yield key, field, raw_value(data, field)
    except (OSError, ValueError, struct.error) as error:
        raise TritError(f"{model.path}: cannot be read again: {first_line(error)}") from error


def raw_value(data: bytes | mmap.mmap, field: Field) -> Any:
    """A metadata value of the file whose content is `data`, as `raw_values` yields it."""
    at = field.start
    if field.type is _STRING:
        return data[at : at + field.length]
    if field.element_type is _STRING:
        strings = []
        for _ in range(field.length):
            (length,) = _U64.unpack_from(data, at)
            at += _U64.size
            strings.append(data[at : at + length])
            at += length
        return strings
    form = _SCALARS[field.type if field.element_type is None else field.element_type]
    values = [value for (value,) in form.iter_unpack(data[at : at + field.length * form.size])]
    return values if field.type is _ARRAY else values[0]


class _HeaderReader:
    """Reads one header from `data`, front to back; `self._at` is the place in bytes."""

    def __init__(self, path: Path, data: bytes | mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._end = min(self._size, _MAX_HEADER)
        self._at = len(_MAGIC)
        self._n_strings = 0

    def read(self) -> ModelFile:
        self._check_gguf_version()
        n_tensors, n_keys = self._number(_U64), self._number(_U64)
        for count, what in ((n_keys, "metadata keys"), (n_tensors, "tensors")):
            if count > _MAX_ENTRIES:
                raise self._damaged(f"{count} {what}")
        metadata: dict[str, Value] = {}
        fields: dict[str, Field] = {}
        for _ in range(n_keys):
            key = self._key(fields)
            fields[key], metadata[key] = self._value(key)
        self._check_types(metadata, fields)
        self._check_trit_version(metadata)
        tensors = tuple(self._tensors(n_tensors))
        data_start = self._check_data(metadata, tensors)
        return ModelFile(self._path, self._size, metadata, fields, tensors, data_start)

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

    def _key(self, seen: dict[str, Field]) -> str:
        key = self._name("metadata key", _MAX_KEY)
        if key in seen:
            raise self._damaged(f"metadata key '{key}' is there twice")
        return key

    def _value(self, key: str) -> tuple[Field, Value]:
        value_type = self._value_type(key)
        if value_type is _ARRAY:
            return self._array(key)
        if value_type is _STRING:
            start, length = self._string()
            kept = length <= _MAX_KEPT_STRING
            value = self._data[start : self._at].decode(errors="replace") if kept else Skipped(length)
            return Field(value_type, None, start, length), value
        start = self._at
        number = self._number(_SCALARS[value_type])
        if value_type is _BOOL and self._data[start] > 1:
            raise self._damaged(f"metadata key '{key}' is a bool of {self._data[start]}, not of 0 or 1")
        return Field(value_type, None, start, 1), number

    def _array(self, key: str) -> tuple[Field, Value]:
        element_type, length = self._value_type(key), self._number(_U64)
        start = self._at
        field = Field(_ARRAY, element_type, start, length)
        if element_type is _ARRAY:
            raise self._damaged(f"metadata key '{key}' is a list of lists, which llama.cpp does not take")
        if element_type is _STRING:
            self._skip_strings(key, length)
            return field, Skipped(length)
        form = _SCALARS[element_type]
        self._skip(length * form.size)
        if element_type is _BOOL:
            for at in range(start, self._at, _CHUNK):
                if self._data[at : min(at + _CHUNK, self._at)].translate(None, b"\0\1"):
                    raise self._damaged(f"metadata key '{key}' has a bool that is neither 0 nor 1")
        if length > _MAX_KEPT_ARRAY:
            return field, Skipped(length)
        return field, tuple(value for (value,) in form.iter_unpack(self._data[start : self._at]))

    def _skip_strings(self, key: str, count: int) -> None:
        self._n_strings += count
        if self._n_strings > _MAX_STRINGS:
            raise self._damaged(f"metadata key '{key}' has {count} strings")
        data, at, end, length_of = self._data, self._at, self._end, _U64.unpack_from
        if count * _U64.size > end - at:
            raise self._cut_off()
        for _ in range(count):  # as short as it can be: vocabularies are long
            if at + _U64.size > end:
                raise self._cut_off()
            at += _U64.size + length_of(data, at)[0]
        self._skip(at - self._at)

    def _value_type(self, key: str) -> GGUFValueType:
        value_type = _VALUE_TYPES.get(number := self._number(_U32))
        if value_type is None:
            raise self._damaged(f"metadata key '{key}' has the unknown type {number}")
        return value_type

    def _check_types(self, metadata: dict[str, Value], fields: dict[str, Field]) -> None:
        architecture = metadata.get("general.architecture")
        prefix = f"{architecture}."
        for key, field in fields.items():
            expected = _EXPECTED.get(key)
            if expected is None and key.startswith(prefix):
                expected = _EXPECTED_OF_ARCHITECTURE.get(key[len(prefix) :])
            if expected is None:
                expected = next((kind for pattern, kind in _EXPECTED_LIKE if pattern.fullmatch(key)), None)
            if expected is None:
                continue
            is_list = field.type is _ARRAY
            if not (field.element_type in expected.elements if is_list else field.type in expected.types):
                found = field.type.name.lower()
                if field.element_type is not None:
                    found = f"a list of {field.element_type.name.lower()}"
                raise self._damaged(f"metadata key '{key}' is {found}, not {expected.name}")
        if architecture is not None and not (isinstance(architecture, str) and _ARCHITECTURE.fullmatch(architecture)):
            raise self._damaged("general.architecture is not the name of an architecture")

    def _tensors(self, n_tensors: int) -> Iterator[Tensor]:
        seen: set[str] = set()
        for _ in range(n_tensors):
            name = self._name("tensor name", _MAX_NAME)
            if name in seen:
                raise self._damaged(f"tensor '{name}' is there twice")
            seen.add(name)
            n_dims = self._number(_U32)
            if n_dims > _MAX_DIMS:
                raise self._damaged(f"tensor '{name}' has {n_dims} dimensions")
            shape = tuple(self._number(_U64) for _ in range(n_dims)) or (1,)
            if 0 in shape or math.prod(shape) > _MAX_ELEMENTS:
                raise self._damaged(f"tensor '{name}' has the impossible shape {' x '.join(map(str, shape))}")
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
        if shape[0] % block:
            raise self._damaged(f"tensor '{name}' has rows of {shape[0]}, not a multiple of {block}")
        return Tensor(name, shape, tensor_type, offset, math.prod(shape) // block * block_bytes)

    def _check_data(self, metadata: dict[str, Value], tensors: tuple[Tensor, ...]) -> int:
        """Check that the data of all tensors lie in the file, in order, without overlap. Returns where they start."""
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {alignment}, not a power of two up to {_MAX_ALIGNMENT}")
        data_start = -(-self._at // alignment) * alignment
        offset = 0
        for tensor in tensors:
            if tensor.offset != offset:  # llama.cpp does not load such a file
                raise self._damaged(
                    f"the data of tensor '{tensor.name}' begin at byte {tensor.offset}, not at {offset}, after those "
                    "of the tensor before"
                )
            end = data_start + tensor.offset + tensor.n_bytes
            if end > self._size:
                raise TritError(
                    f"{self._path}: truncated: tensor '{tensor.name}' ends at byte {end}, the file at byte "
                    f"{self._size}; download or convert the model again"
                )
            offset = -(-(offset + tensor.n_bytes) // alignment) * alignment
        return data_start

    def _name(self, what: str, longest: int) -> str:
        """Read a name of at most `longest` bytes, which must be printable UTF-8."""
        start, length = self._string()
        if not length:
            raise self._damaged(f"an empty {what}")
        if length > longest:
            raise self._damaged(f"a {what} of {length} bytes")
        raw = self._data[start : self._at]
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"a {what} that is not UTF-8: {raw[:_MAX_NAME]!r}") from None
        if not name.isprintable():
            raise self._damaged(f"a {what} with control characters: {name[:_MAX_NAME]!r}")
        return name

    def _string(self) -> tuple[int, int]:
        """Skip a string. Returns the position of its first byte and its length in bytes."""
        length = self._number(_U64)
        return self._skip(length), length

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack_from(self._data, self._skip(form.size))[0]

    def _skip(self, n_bytes: int) -> int:
        """Skip `n_bytes`. Returns the position of the first of them."""
        start = self._at
        if n_bytes > self._end - start:
            raise self._cut_off()
        self._at = start + n_bytes
        return start

    def _cut_off(self) -> TritError:
        if self._end < self._size:
            return self._damaged(f"it is longer than {human_size(_MAX_HEADER)}")
        return TritError(
            f"{self._path}: truncated or damaged: the header reaches past the end of the file (byte "
            f"{self._size}); download or convert the model again"
        )

    def _damaged(self, what: str) -> TritError:
        what = what if len(what) <= _MAX_SHOWN else f"{what[:_MAX_SHOWN]}…"
        return TritError(f"{self._path}: damaged header: {what}; download or convert the model again")
