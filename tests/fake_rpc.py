"""A stand-in for an RPC server of llama.cpp, of any build and intent: it answers what a test wants."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
from gguf import GGML_QUANT_SIZES

from tritcore.codec import unpack
from tritcore.gguf_types import DEPTH_OF_TYPE, TRIT_TYPE
from tritrun.rpc import VERSION, Command

SIZE_OF_TENSOR = 296
BASE = 1 << 20  # the address of the only buffer
OFFSET = struct.Struct("<BQ")  # of set_tensor, with the flag of the cache

OURS = {int(qtype): GGML_QUANT_SIZES[qtype][1] for qtype in TRIT_TYPE.values()}


@dataclass
class FakeServer:
    """What it is like.

    Attributes:
        types: bytes of a block of 64 weights, by the number of the type.
        scale: of the products; 1 is right.
        answers: whole answers in place of the right ones, by command; b"" closes the connection.
        asked: commands that have come.
    """

    version: tuple[int, int, int] = VERSION
    devices: int = 1
    free: int = 1 << 30
    types: dict[int, int] = field(default_factory=lambda: dict(OURS))
    scale: float = 1.0
    answers: dict[Command, bytes] = field(default_factory=dict)
    asked: list[Command] = field(default_factory=list)
    memory: dict[int, bytes] = field(default_factory=dict)

    def answer(self, command: Command, request: bytes) -> bytes | None:
        """The answer, None where the protocol has none; b"" closes the connection."""
        self.asked.append(command)
        if command in self.answers:
            return self.answers[command]
        right: dict[Command, Callable[[bytes], bytes | None]] = {
            Command.HELLO: lambda _: sized(bytes([*self.version, 0]) + bytes(24)),
            Command.DEVICE_COUNT: lambda _: sized(struct.pack("<I", self.devices)),
            Command.GET_DEVICE_MEMORY: lambda _: sized(struct.pack("<QQ", self.free, self.free)),
            Command.GET_ALLOC_SIZE: lambda request: self._alloc_size(request[4:]),
            Command.ALLOC_BUFFER: lambda request: sized(struct.pack("<QQ", 7, struct.unpack("<IQ", request)[1])),
            Command.BUFFER_GET_BASE: lambda _: sized(struct.pack("<Q", BASE)),
            Command.INIT_TENSOR: lambda _: None,
            Command.SET_TENSOR: self._set,
            Command.GRAPH_COMPUTE: self._compute,
            Command.GET_TENSOR: lambda request: sized(self.memory[address(request)]),
        }
        return right[command](request)

    def _alloc_size(self, tensor: bytes) -> bytes:
        qtype, n_weights = struct.unpack_from("<I", tensor, 8)[0], struct.unpack_from("<I", tensor, 20)[0]
        return sized(struct.pack("<Q", n_weights // 64 * self.types[qtype])) if qtype in self.types else b""

    def _set(self, request: bytes) -> None:
        self.memory[address(request)] = request[SIZE_OF_TENSOR + OFFSET.size :]

    def _compute(self, request: bytes) -> None:
        matrix, activations, result = (request[20 + n * SIZE_OF_TENSOR :][:SIZE_OF_TENSOR] for n in range(3))
        (qtype,) = struct.unpack_from("<I", matrix, 8)
        (depth,) = (depth for known, depth in DEPTH_OF_TYPE.items() if known == qtype)
        blocks = np.frombuffer(self.memory[address(matrix)], np.uint8).reshape(-1, OURS[qtype])
        columns = np.frombuffer(self.memory[address(activations)], "<f4").reshape(64, 64)
        product = columns @ unpack(depth, blocks).decode().T * np.float32(self.scale)
        self.memory[address(result)] = product.astype("<f4").tobytes()


def sized(content: bytes) -> bytes:
    """An answer as it goes over the wire."""
    return struct.pack("<Q", len(content)) + content


def address(tensor: bytes) -> int:
    """Where a serialized tensor lies."""
    (data,) = struct.unpack_from("<Q", tensor, 220)
    return int(data)


@contextmanager
def running(server: FakeServer) -> Iterator[str]:
    """The address of a server that takes one client after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=[listener, server], daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, server: FakeServer) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:  # the test has ended
            return
        with client, client.makefile("rb") as requests, suppress(ConnectionError):
            while head := requests.read(9):
                command, size = struct.unpack("<BQ", head)
                answer = server.answer(Command(command), requests.read(size))
                if answer == b"":
                    break
                if answer is not None:
                    client.sendall(answer)
