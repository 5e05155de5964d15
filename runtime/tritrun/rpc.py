"""The protocol of llama.cpp's RPC servers, as far as a probe needs it: ggml/src/ggml-rpc/ggml-rpc.cpp.

A request is a command (1 byte), a size (8 bytes) and as many bytes; most have an answer, a size and as many bytes. A
server closes the connection when it does not like a request. It serves one client at a time; others wait until it
accepts them.
"""

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

VERSION = (7, 0, 0)
"""What this build speaks: RPC_PROTO_MAJOR_VERSION, MINOR and PATCH; the last one changes with the numbers of ops."""

OP_MUL_MAT = 29
"""GGML_OP_MUL_MAT"""

_COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE: backends pass over nodes without it
_DIMS, _SOURCES, _CAPS = 4, 10, 24
_TENSOR = struct.Struct(f"<QIQ{_DIMS}I{_DIMS}II64si{_SOURCES}QQQQ64si")  # rpc_tensor


class Command(IntEnum):
    """Those of `rpc_cmd` that a probe sends."""

    ALLOC_BUFFER = 0
    BUFFER_GET_BASE = 3
    SET_TENSOR = 6
    GET_TENSOR = 8
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15


class Closed(Exception):
    """The server has closed the connection."""


class Malformed(Exception):
    """An answer has another size than the protocol says."""


@dataclass(frozen=True)
class Tensor:
    """A matrix of a graph.

    Attributes:
        id: any but 0.
        shape: row length, rows.
        buffer, data: the server's numbers of a buffer, and of an address in it; 0 for none.
        op, sources: how it is computed; a leaf has none.
    """

    id: int
    type: GGMLQuantizationType
    shape: tuple[int, int]
    buffer: int = 0
    data: int = 0
    op: int = 0
    sources: tuple[int, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return self._row_bytes * self.shape[1]

    @property
    def _row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[0] // block * size

    def pack(self) -> bytes:
        """As it goes over the wire."""
        strides = (GGML_QUANT_SIZES[self.type][1], self._row_bytes, self.n_bytes, self.n_bytes)
        sources = (*self.sources, *[0] * (_SOURCES - len(self.sources)))
        shape = (*self.shape, 1, 1)
        flags = _COMPUTE if self.op else 0
        return _TENSOR.pack(
            self.id, self.type, self.buffer, *shape, *strides, self.op, b"", flags, *sources, 0, 0, self.data, b"", 0
        )


class Connection:
    """A connection to a server, for a `with` block.

    Its methods raise `Closed`, `Malformed`, TimeoutError where the server takes too long, and other OSErrors.
    """

    def __init__(self, host: str, port: int, seconds: float) -> None:
        """Connect, by IPv4 as llama.cpp does.

        Args:
            seconds: for the connection, and then for each answer.
        """
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(seconds)
            self._socket.connect((host, port))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()  # the server frees what it holds for this client

    def hello(self) -> tuple[int, int, int]:
        """The server's version: major, minor, patch. The first request of a connection."""
        major, minor, patch, *_ = self._ask(Command.HELLO, bytes(_CAPS), f"<4B{_CAPS}x")
        return major, minor, patch

    def n_devices(self) -> int:
        """How many devices the server offers."""
        return self._ask(Command.DEVICE_COUNT, b"", "<I")[0]

    def memory(self, device: int) -> int:
        """Free bytes of a device. On Linux a CPU counts all memory of the machine as free."""
        return self._ask(Command.GET_DEVICE_MEMORY, struct.pack("<I", device), "<QQ")[0]

    def alloc_size(self, device: int, tensor: Tensor) -> int:
        """Bytes that a tensor takes on a device."""
        request = struct.pack("<I", device) + tensor.pack() + bytes(_SOURCES * _TENSOR.size)
        return self._ask(Command.GET_ALLOC_SIZE, request, "<Q")[0]

    def alloc_buffer(self, device: int, n_bytes: int) -> tuple[int, int]:
        """A new buffer, 0 if there is no room, and its address."""
        buffer, _ = self._ask(Command.ALLOC_BUFFER, struct.pack("<IQ", device, n_bytes), "<QQ")
        if not buffer:
            return 0, 0
        return buffer, self._ask(Command.BUFFER_GET_BASE, struct.pack("<Q", buffer), "<Q")[0]

    def init(self, tensor: Tensor) -> None:
        """Let the device prepare a tensor."""
        self._send(Command.INIT_TENSOR, tensor.pack())

    def write(self, tensor: Tensor, values: bytes) -> None:
        """Fill a tensor."""
        self._send(Command.SET_TENSOR, tensor.pack() + struct.pack("<BQ", 0, 0) + values)

    def read(self, tensor: Tensor) -> bytes:
        """What a tensor holds, once all before is done."""
        self._send(Command.GET_TENSOR, tensor.pack() + struct.pack("<QQ", 0, tensor.n_bytes))
        return self._answer(tensor.n_bytes)

    def compute(self, device: int, result: Tensor, leaves: Sequence[Tensor]) -> None:
        """Compute one node from leaves."""
        tensors = b"".join(tensor.pack() for tensor in (*leaves, result))
        self._send(Command.GRAPH_COMPUTE, struct.pack("<IIQI", device, 1, result.id, len(leaves) + 1) + tensors)

    def _ask(self, command: Command, request: bytes, answer: str) -> tuple[int, ...]:
        self._send(command, request)
        return struct.unpack(answer, self._answer(struct.calcsize(answer)))

    def _send(self, command: Command, request: bytes) -> None:
        try:
            self._socket.sendall(struct.pack("<BQ", command, len(request)) + request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def _answer(self, n_bytes: int) -> bytes:
        (size,) = struct.unpack("<Q", self._receive(8))
        if size != n_bytes:  # never a reason to wait for more, or to make room for it
            raise Malformed(f"it answers with {size} bytes in place of {n_bytes}, as no RPC server of llama.cpp does")
        return self._receive(n_bytes)

    def _receive(self, n_bytes: int) -> bytes:
        received = bytearray()
        while len(received) < n_bytes:
            try:
                piece = self._socket.recv(n_bytes - len(received))
            except ConnectionResetError as error:
                raise Closed from error
            if not piece:
                raise Closed
            received += piece
        return bytes(received)
