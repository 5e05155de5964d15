"""A slow network between a client and a server of this machine: a relay that delays what passes, and limits it."""

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PIECE = 1 << 16  # bytes that pass at once


@contextmanager
def slow_link(address: str, delay: float, bytes_per_second: float) -> Iterator[str]:
    """Lead to a server by a slow link.

    Args:
        address: host:port of the server.
        delay: seconds that each byte takes, in each direction.
        bytes_per_second: that pass, in each direction.

    Yields:
        The address to connect to.
    """
    host, _, port = address.partition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:  # the link has ended
                    return
                server = socket.create_connection((host, int(port)))
                for one, other in ((client, server), (server, client)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    _Direction(one, other, delay, bytes_per_second)

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


class _Direction:
    """Two threads: one reads and notes when a piece may arrive, the other one waits until then and writes it."""

    def __init__(self, source: socket.socket, target: socket.socket, delay: float, bytes_per_second: float) -> None:
        self._source, self._target = source, target
        self._delay, self._rate = delay, bytes_per_second
        self._pieces: queue.Queue[tuple[float, bytes]] = queue.Queue()
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        free = 0.0  # when the link has passed all before
        piece = b"-"
        while piece:
            piece = b""
            with suppress(OSError):
                piece = self._source.recv(_PIECE)
            free = max(free, time.monotonic()) + len(piece) / self._rate
            self._pieces.put((free + self._delay, piece))

    def _write(self) -> None:
        piece = b"-"
        with suppress(OSError):
            while piece:
                arrives, piece = self._pieces.get()
                time.sleep(max(0.0, arrives - time.monotonic()))
                self._target.sendall(piece)
            self._target.shutdown(socket.SHUT_WR)
