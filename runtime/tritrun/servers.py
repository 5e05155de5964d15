"""RPC servers of other machines that hold layers of a model, and whether they can.

llama.cpp's client knows the types of tensors by their numbers only, and ends its process where a server does not like
them. So each server is asked before a model is loaded: a small matrix product with each TRIT type tells whether it
means the same by a type as this build, down to the value of every weight.
"""

import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from tritcore.codec import Blocks, pack
from tritcore.console import one_line
from tritcore.errors import TritError, UsageError
from tritcore.format import BLOCK_SIZE, CODE_MAX, N_GROUPS, N_SCALES
from tritcore.gguf_header import ModelFile
from tritcore.gguf_types import DEPTH_OF_TYPE
from tritcore.versions import version
from tritrun.rpc import OP_MUL_MAT, VERSION, Closed, Connection, Malformed, Tensor

MOST = 16
"""Servers, and devices of one, that may be named: GGML_RPC_MAX_SERVERS."""

_SECONDS = 20.0  # for a connection and for each answer of a probe
_SECONDS_TO_REACH = 2.0  # a server that was there a moment ago
_ROWS = 128  # of the matrix of a probe: each is a block
_PAGE = 4096  # alignment of tensors, more than any device wants
_TOLERANCE = 0.01  # of the largest weight of a block: activations are rounded too
_ADDRESS = re.compile(r"(?P<host>[^\s,:\[\]]+):(?P<port>\d{1,5})")
_OF_RPC = "ggml-rpc.cpp:"  # where checks of the client fail


@dataclass(frozen=True)
class Server:
    """A server that can hold layers.

    Attributes:
        address: host:port.
        free: bytes of memory that it says its devices have free.
    """

    address: str
    free: int


class UnreachableError(TritError):
    """Nothing listens at an address."""


class _Unusable(Exception):
    """Why a server cannot be used."""


def read_addresses(text: str) -> tuple[str, ...]:
    """The addresses of a list such as "10.0.0.2:50052,laptop:50052".

    Raises:
        UsageError: one is not of the form HOST:PORT, or there are too many, or the same twice.
    """
    addresses = tuple(one.strip() for one in text.split(","))
    for address in addresses:
        found = _ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise UsageError(f"--rpc {text}: '{address}' is not of the form HOST:PORT; IPv6 addresses need a host name")
    if len(addresses) > MOST:
        raise UsageError(f"--rpc {text}: more than {MOST} servers")
    if len(set(addresses)) < len(addresses):
        raise UsageError(f"--rpc {text}: the same server twice")
    return addresses


def find_servers(addresses: Iterable[str], models: Iterable[ModelFile]) -> tuple[Server, ...]:
    """Ask servers whether they are there, and compute with the TRIT types of models as this build does.

    Raises:
        TritError: one is not there, is busy, is of another build, or does not compute the same.
    """
    types = {tensor.type for model in models for tensor in model.tensors} & DEPTH_OF_TYPE.keys()
    return tuple(ask(address, sorted(types)) for address in addresses)


def ask(address: str, types: Sequence[GGMLQuantizationType] = ()) -> Server:
    """Ask a server whether it is there, and computes with TRIT types as this build does. Raises as `find_servers`."""
    host, _, port = address.partition(":")
    try:
        connection = Connection(host, int(port), _SECONDS)
    except OSError as error:
        reason = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise UnreachableError(f"{address} cannot be reached: {reason}; start `tritrun rpc-server` there") from error
    same = f"install trit-gguf {version('trit-gguf')} on both machines"
    if_closed = f"it is no RPC server of llama.cpp, or one of another version; {same}"
    try:
        with connection:
            _check_version(connection.hello())
            n_devices = connection.n_devices()
            if not 0 < n_devices <= MOST:
                raise _Unusable(f"it has {n_devices} devices")
            free = 0
            for device in range(n_devices):
                free += connection.memory(device)
                for qtype in types:
                    if_closed = f"it does not know {qtype.name}; {same}"
                    _check_size(connection, device, qtype)
                    if_closed = f"its device {device} cannot multiply by {qtype.name}; start it with --device CPU"
                    _check_product(connection, device, qtype)
            return Server(address, free)
    except Closed as error:
        raise TritError(f"{address} cannot be used: {if_closed}") from error
    except (_Unusable, Malformed) as error:
        raise TritError(f"{address} cannot be used: {error}; {same}") from error
    except TimeoutError as error:
        raise TritError(
            f"{address} does not answer within {_SECONDS:g} seconds: it has one client at a time, does another program "
            "use it?"
        ) from error
    except OSError as error:
        raise TritError(f"{address}: {error.strerror or error}") from error


def explain_loss(reason: str, addresses: Sequence[str]) -> str | None:
    """What to say of a program that a failed check has ended; None if the check is not one of the RPC client.

    Args:
        reason: as `aborts.failed_check` gives it, or a text that has it.
        addresses: of the servers that the program used.
    """
    if not addresses or _OF_RPC not in reason:
        return None
    gone = [address for address in addresses if not _is_reachable(address)]
    who = ", ".join(gone) or f"{'one of ' if len(addresses) > 1 else ''}{', '.join(addresses)}"
    return f"{who} has ended, or closed the connection ({one_line(reason)}); start it again, and then this"


def _check_version(found: tuple[int, int, int]) -> None:
    if found != VERSION:
        theirs, ours = (".".join(map(str, numbers)) for numbers in (found, VERSION))
        raise _Unusable(f"it speaks version {theirs} of llama.cpp's RPC, and this build {ours}")


def _check_size(connection: Connection, device: int, qtype: GGMLQuantizationType) -> None:
    """A server without a type closes the connection; another type in its place has another size."""
    tensor = Tensor(1, qtype, (8 * BLOCK_SIZE, 1))  # a row that no device makes longer
    if (size := connection.alloc_size(device, tensor)) != tensor.n_bytes:
        raise _Unusable(
            f"it has another type in the place of {qtype.name}, with {size} bytes for {tensor.shape[0]} weights, not "
            f"{tensor.n_bytes}"
        )


def _check_product(connection: Connection, device: int, qtype: GGMLQuantizationType) -> None:
    """The product of blocks and the unit matrix must be the weights of the blocks."""
    blocks = _blocks(DEPTH_OF_TYPE[qtype])
    expected = blocks.decode()
    unit = np.eye(BLOCK_SIZE, dtype="<f4")
    shapes = ((BLOCK_SIZE, _ROWS), (BLOCK_SIZE, BLOCK_SIZE), (_ROWS, BLOCK_SIZE))
    types = (qtype, GGMLQuantizationType.F32, GGMLQuantizationType.F32)
    # Each with a page besides: some devices read whole rows of 512 weights.
    room = [(_size(one, shape) // _PAGE + 2) * _PAGE for one, shape in zip(types, shapes, strict=True)]
    buffer, base = connection.alloc_buffer(device, sum(room))
    if not buffer:
        raise _Unusable(f"it has no memory left for {sum(room)} bytes")
    tensors = [
        Tensor(number + 1, one, shape, buffer, base + sum(room[:number]))
        for number, (one, shape) in enumerate(zip(types, shapes, strict=True))
    ]
    matrix, activations, _ = tensors
    result = Tensor(3, types[2], shapes[2], buffer, tensors[2].data, OP_MUL_MAT, (matrix.id, activations.id))
    connection.init(matrix)
    connection.write(matrix, pack(blocks).tobytes())
    connection.write(activations, unit.tobytes())
    connection.compute(device, result, (matrix, activations))
    product = np.frombuffer(connection.read(result), "<f4").reshape(BLOCK_SIZE, _ROWS).T
    largest = np.abs(expected).max(axis=1, keepdims=True)
    if not (np.abs(product - expected) <= _TOLERANCE * largest).all():  # nor for NaN
        raise _Unusable(f"its products with {qtype.name} differ: it has another version of the format")


def _size(qtype: GGMLQuantizationType, shape: tuple[int, int]) -> int:
    return Tensor(1, qtype, shape).n_bytes


def _blocks(depth: int) -> Blocks:
    """Blocks with all codes and scale indexes, always the same."""
    rng = np.random.default_rng(depth)
    codes = rng.integers(-CODE_MAX[depth], CODE_MAX[depth] + 1, (_ROWS, BLOCK_SIZE), dtype=np.int8)
    return Blocks(depth, codes, rng.integers(0, N_SCALES, (_ROWS, N_GROUPS), dtype=np.uint8))


def _is_reachable(address: str) -> bool:
    host, _, port = address.partition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), _SECONDS_TO_REACH):
        return True
    return False
