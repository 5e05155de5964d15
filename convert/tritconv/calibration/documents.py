"""Files of text or JSON, as editors and data pipelines write them, to documents."""

import codecs
import io
import json
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tritcore.errors import TritError

_LEAST_SAMPLE = 16 << 20  # characters that are kept of all files, at least
_PER_TOKEN = 16  # characters that are kept for each token wanted: some are left to choose from
_MOST_READ = 1 << 30  # bytes of a file
_LONGEST_RECORD = 64 << 20  # characters
_PIECE = 1 << 16  # bytes read at a time

_MARKS = (  # those of UTF-32 first, as one begins like one of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
_BINARY = (
    (b"PAR1", "a Parquet table"),
    (b"ARROW1", "an Arrow table"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"Obj\x01", "an Avro table"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x03\x04", "a zip archive, as office programs write too"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"%PDF", "a PDF document"),
    (b"GGUF", "a GGUF file"),
)
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_EXPECTED = (
    'expected "text", "messages" (role and content), "conversations" (from and value), "prompt" and "completion", or '
    '"instruction" and "output"'
)


@dataclass(frozen=True)
class Document:
    """A text, or a conversation.

    Attributes:
        text: of a conversation, what stands for it where the model has no chat template; "" if nothing does.
        place: file and line, for errors.
        messages: of a conversation, as chat templates take them.
        tools: that the conversation may use, as chat templates take them.
    """

    text: str
    place: str
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Any] = field(default=())


def read(files: Sequence[Path], n_tokens: int) -> list[Document]:
    """The documents of files, each of which is read once, so that a pipe will do.

    Names that end in .json, .jsonl or .ndjson, and pipes that begin like JSON, hold JSON: an array of records, or one
    record after the other. All else is text, whatever it looks like.

    Of large files an even sample is taken: of all files together 16 characters for each token wanted, at least 16 Mi;
    the first GiB of a file is looked at. The same files give the same sample.

    Args:
        n_tokens: wanted in the end.

    Raises:
        TritError: a file cannot be read, is no text, or holds JSON that has no text in a known place.
    """
    most = max(_LEAST_SAMPLE, _PER_TOKEN * n_tokens) // max(1, len(files))
    return [document for path in files for document in _documents(path, most)]


def name_of(path: Path) -> str:
    """What a file is called in a description: pipes have no name of their own."""
    return path.name if path.is_file() else "a pipe"


def check(files: Iterable[Path]) -> None:
    """See that files are there and no folders; reads nothing. Raises TritError."""
    for path in files:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise _unreadable(path, error) from error
        if stat.S_ISDIR(mode):
            raise TritError(f"--calibrate {path} is a folder: name the files in it, each with a --calibrate of its own")


def _documents(path: Path, most: int) -> list[Document]:
    check([path])
    try:
        with path.open("rb") as file:
            chunks = _chunks(path, file)
            chunks, is_json = (chunks, True) if path.suffix.lower() in _JSON_NAMES else _looks_like_json(path, chunks)
            found = _of_json(path, chunks, most) if is_json else _of_text(path, chunks, most)
    except OSError as error:
        raise _unreadable(path, error) from error
    found = [document for document in found if document.messages or document.text.strip()]
    if not found:
        raise TritError(f"{path} holds no text: --calibrate needs some")
    return found


def _unreadable(path: Path, error: OSError) -> TritError:
    if isinstance(error, FileNotFoundError):
        return TritError(f"--calibrate {path}: no such file")
    return TritError(f"cannot read {path}: {error.strerror or error}")


class _Sample:
    """All parts of a stream, or where those are too many every second of them, every fourth and so on.

    Attributes:
        parts: kept so far.
        every: the distance of those that are kept.
    """

    def __init__(self, most: int) -> None:
        """Keep parts whose sizes add up to at most `most`, but for a part that is larger alone."""
        self.parts: list[Any] = []
        self.every = 1
        self._sizes: list[int] = []
        self._total = 0
        self._most = most
        self._n_seen = 0

    def add(self, part: Any, size: int) -> None:
        if self._n_seen % self.every == 0:
            self.parts.append(part)
            self._sizes.append(size)
            self._total += size
        self._n_seen += 1
        while self._total > self._most and len(self.parts) > 1:
            self.parts, self._sizes = self.parts[::2], self._sizes[::2]
            self._total = sum(self._sizes)
            self.every *= 2


def _of_text(path: Path, chunks: Iterable[str], most: int) -> list[Document]:
    sample, rest = _Sample(most), ""
    for chunk in chunks:
        whole_lines, newline, begun = chunk.rpartition("\n")
        if newline:
            part, rest = rest + whole_lines + newline, begun
        else:
            part, rest = rest + chunk, ""
        sample.add(part, len(part))
    sample.add(rest, len(rest))
    texts = ["".join(sample.parts)] if sample.every == 1 else sample.parts
    return [Document(text, str(path)) for text in texts]


def _of_json(path: Path, chunks: Iterator[str], most: int) -> list[Document]:
    sample = _Sample(most)
    for record, place, size in _records(path, chunks):
        sample.add((record, place), size)
    return [_document(record, place) for record, place in sample.parts]


def _looks_like_json(path: Path, chunks: Iterator[str]) -> tuple[Iterator[str], bool]:
    """Whether a pipe, which has no name, begins with a JSON object; and its text again."""
    if path.is_file():
        return chunks, False
    head = ""
    for chunk in chunks:
        head += chunk
        if len(head.lstrip()) > 1:
            break
    start = head.lstrip().removeprefix("[").lstrip()
    return _chain(head, chunks), start.startswith("{") and start[1:].lstrip()[:1] in ('"', "")


def _chain(head: str, rest: Iterator[str]) -> Iterator[str]:
    yield head
    yield from rest


def _chunks(path: Path, file: BinaryIO) -> Iterator[str]:
    """The text of a file, some at a time, with line ends as \\n."""
    piece = file.read(_PIECE)
    while len(piece) < 16 and (more := file.read(_PIECE)):  # a pipe may give little at a time
        piece += more
    _refuse_formats(path, piece)
    mark, encoding = next((found for found in _MARKS if piece.startswith(found[0])), (b"", "utf-8"))
    decoder = codecs.getincrementaldecoder(encoding)()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done, piece = len(mark), piece[len(mark) :]
    while piece and done < _MOST_READ:
        begun = len(decoder.getstate()[0])  # bytes of a character that the last piece has cut
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError as error:
            raise _undecodable(path, encoding, bool(mark), done - begun + error.start, error) from error
        if (index := text.find("\0")) >= 0:
            raise _with_nul(path, done - begun + len(text[:index].encode(encoding)), piece)
        yield newlines.decode(text)
        done += len(piece)
        piece = file.read(_PIECE)
    yield newlines.decode("", final=True)  # a character that the end of the file cuts is left out


def _refuse_formats(path: Path, head: bytes) -> None:
    for magic, name in _COMPRESSED:
        if head.startswith(magic):
            raise TritError(f"{path} is compressed with {name}: give --calibrate <({name} -dc {path})")
    for magic, name in _BINARY:
        if head.startswith(magic):
            raise TritError(f"{path} is {name}: --calibrate takes text or JSON; export it as JSON lines")


def _undecodable(path: Path, encoding: str, has_mark: bool, offset: int, error: UnicodeDecodeError) -> TritError:
    value = f"byte {offset} is 0x{error.object[error.start]:02x}"
    if has_mark:
        return TritError(f"{path} begins as {encoding.upper()} text but is damaged ({value}): save it anew as UTF-8")
    return TritError(f"{path} is not UTF-8 text ({value}): if it is in Latin-1, {_converted('ISO-8859-1', path)}")


def _with_nul(path: Path, offset: int, piece: bytes) -> TritError:
    looks = "LE" if not any(piece[1:16:2]) else "BE" if not any(piece[:16:2]) else None
    advice = f": if it is in UTF-16, {_converted(f'UTF-16{looks}', path)}" if looks else ""
    return TritError(f"{path} is no text: byte {offset} is NUL{advice}")


def _converted(encoding: str, path: Path) -> str:
    return f"give --calibrate <(iconv -f {encoding} -t UTF-8 {path})"


def _records(path: Path, chunks: Iterator[str]) -> Iterator[tuple[Any, str, int]]:
    """Records of JSON text, each with its place and the characters that it takes.

    Top-level arrays are taken apart, but for one whose elements are the messages of one conversation.
    """
    text = _JsonText(path, chunks)
    while text.next_character():
        if text.next_character() != "[":
            yield text.value()
            continue
        text.skip()
        place, messages, size = text.place, [], 0
        while text.next_character() != "]":
            record, at, n = text.value()
            if isinstance(record, dict) and ("role" in record or "from" in record):
                messages.append(record)
                size += n
            else:
                yield record, at, n
            if text.next_character() == ",":
                text.skip()
            elif text.next_character() != "]":
                raise TritError(f"{text.place} is not JSON: expected a comma or the end of the array")
        text.skip()
        if messages:
            yield {"messages": messages}, place, size


class _JsonText:
    """JSON text that is read value by value."""

    def __init__(self, path: Path, chunks: Iterator[str]) -> None:
        self._path = path
        self._chunks = chunks
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._line = 1

    @property
    def place(self) -> str:
        return f"{self._path}, line {self._line}"

    def next_character(self) -> str:
        """The next one that is no space; "" at the end."""
        while True:
            rest = self._text[self._at : self._at + 64].lstrip(" \t\n\r\ufeff")
            skipped = min(64, len(self._text) - self._at) - len(rest)
            if skipped:
                self._advance(self._at + skipped)
            elif rest or not self._read():
                return rest[:1]

    def skip(self) -> None:
        """Leave the next character behind."""
        self._advance(self._at + 1)

    def value(self) -> tuple[Any, str, int]:
        """The value that begins here, its place, and how many characters it takes."""
        place = self.place
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except ValueError as error:
                n_read = len(self._text) - self._at
                if n_read > _LONGEST_RECORD:
                    raise TritError(
                        f"{place}: a record has no end within {_LONGEST_RECORD >> 20} Mi characters: split or mend it"
                    ) from error
                if not self._read(max(n_read, _PIECE)):
                    what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise TritError(f"{place} is not JSON: {what}") from error
                continue
            except RecursionError as error:
                raise TritError(f"{place}: the JSON is nested too deeply") from error
            size = end - self._at
            self._advance(end)
            return value, place, size

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _read(self, at_least: int = 1) -> bool:
        """Get more text; False at the end."""
        new: list[str] = []
        while sum(map(len, new)) < at_least and (chunk := next(self._chunks, None)) is not None:
            new.append(chunk)
        self._text, self._at = self._text[self._at :] + "".join(new), 0
        return any(new)


def _document(record: Any, place: str) -> Document:
    if isinstance(record, str):
        return Document(_text(record), place)
    if isinstance(record, list):
        return _conversation(record, None, place)
    if not isinstance(record, dict):
        raise TritError(f"{place}: {_EXPECTED}, not {type(record).__name__}")
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return _conversation(record[name], record.get("tools"), place)
    if isinstance(record.get("text"), str):
        return Document(_text(record["text"]), place)
    prompt, completion = record.get("prompt"), record.get("completion", record.get("response"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Document(_text(prompt + completion), place)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], record.get("tools"), place)
    instruction, output = record.get("instruction"), record.get("output", record.get("response"))
    if isinstance(instruction, str) and isinstance(output, str):
        more = record.get("input")
        asked = f"{instruction}\n\n{more}" if isinstance(more, str) and more else instruction
        messages = ({"role": "user", "content": _text(asked)}, {"role": "assistant", "content": _text(output)})
        return Document(_text(f"{asked}\n\n{output}"), place, messages)
    if isinstance(record.get("content"), str):
        return Document(_text(record["content"]), place)
    found = ", ".join(json.dumps(name) for name in list(record)[:6])
    raise TritError(f"{place} has {found or 'nothing'}: {_EXPECTED}")


def _conversation(messages: Sequence[Any], tools: Any, place: str) -> Document:
    found = [_message(message, f"{place}, message {number}") for number, message in enumerate(messages, 1)]
    if not found:
        raise TritError(f"{place}: a conversation without messages")
    return Document("", place, found, tools if isinstance(tools, list) else ())


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message as chat templates take it: its content a string."""
    if not isinstance(message, dict):
        raise TritError(f"{place}: expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        role, content = _ROLES.get(str(message["from"]).lower()), message.get("value")
        if role is None:
            raise TritError(f'{place}: "from" is {message["from"]!r}, none of {", ".join(_ROLES)}')
        message = {key: value for key, value in message.items() if key not in ("from", "value")}
    if not isinstance(role, str):
        raise TritError(f"{place} has no role: expected an object with role and content")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise TritError(f"{place}: its content is neither a string nor a list of parts of text")
    return {**message, "role": role, "content": _text(content)}


def _part(part: Any, place: str) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise TritError(f"{place} has a part of type {kind}: calibration takes text only")
    return text


def _text(text: str) -> str:
    """A string of JSON without halves of surrogate pairs, which no encoding has, and without NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", " ") if not text.isascii() or "\0" in text else text
