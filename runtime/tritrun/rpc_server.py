"""`tritrun rpc-server`: lend memory and processor of this machine to a model that runs on another one, until Ctrl-C."""

import ipaddress
import sys
import threading
from dataclasses import dataclass

import typer
from rich.filesize import decimal as human_size

from tritcore.console import note, one_line, warning
from tritcore.errors import TritError, UsageError
from tritcore.gguf_types import DEPTH_OF_TYPE
from tritrun.servers import Server, UnreachableError, ask
from tritrun.tools import run_tool

PORT = 50052
"""llama.cpp's default."""

_PROGRAM = "ggml-rpc-server"
_CLOSED = "Client connection closed"
_NOT_BOUND = "Failed to create server socket"
_LOOPBACK = "127.0.0.1"
_SECONDS_BETWEEN = 0.05


@dataclass(frozen=True)
class RpcServerOptions:
    """How to serve.

    Attributes:
        host: an IPv4 address of this machine, or localhost; the program knows no other.
        threads: CPU threads.
        device: ggml's names of devices to lend, separated by commas; None for the GPUs, else the CPU.
        cache: keep large tensors on the disk, and take them from there when a client sends them again.
    """

    host: str = _LOOPBACK
    port: int = PORT
    threads: int = 1
    device: str | None = None
    cache: bool = False


def serve_rpc(options: RpcServerOptions) -> None:
    """Serve until Ctrl-C. The address goes to stdout once the server computes with every TRIT type.

    Raises:
        TritError: the address is taken, the device does not compute with TRIT types, or the program fails.
        UsageError: the host is no IPv4 address.
    """
    host = _ip_address(options.host)
    if not host.is_loopback:
        warning(
            f"anybody who reaches {host}:{options.port} can use this server, read what it computes and attack it: RPC "
            "has no password and no encryption; keep it in a private network, or behind an SSH tunnel"
        )
    arguments = ["--host", str(host), "--port", str(options.port), "--threads", str(options.threads)]
    arguments += ["--device", options.device] if options.device else []
    arguments += ["--cache"] if options.cache else []
    log = _Log(f"{_LOOPBACK if host.is_unspecified else host}:{options.port}", f"{host}:{options.port}")
    try:
        finished = run_tool(_PROGRAM, arguments, log.feed, log.feed_error)
    except KeyboardInterrupt:
        note("the server has ended")
        return
    finally:
        log.stop()
    if _NOT_BOUND in finished.last_words:  # then whoever is there has been checked
        raise TritError(f"{host}:{options.port} cannot be listened on: is it in use? Choose another --port")
    if failure := log.failure():
        raise failure
    raise TritError(f"{_PROGRAM} has ended: {log.first_error or finished.reason}")


class _Log:
    """Follows the program's output, while a thread is its first client, which checks it.

    The program prints nothing before it has had a client, not even that it listens.

    Attributes:
        first_error: the first error that the program names.
    """

    def __init__(self, own: str, public: str) -> None:
        """Start to wait for the server.

        Args:
            own: its address for this machine.
            public: its address for others.
        """
        self.first_error = ""
        self._public = public
        self._stopped = threading.Event()
        self._is_checked = False
        self._server: Server | None = None
        self._failure: TritError | None = None
        self._check = threading.Thread(target=self._ask, args=[own], daemon=True)
        self._check.start()

    def feed(self, line: str) -> None:
        """Take a line of stdout. Raises TritError if the check of the server has failed."""
        if _CLOSED in line and not self._is_checked:
            self._is_checked = True
            if failure := self.failure():
                raise failure
            if self._server is not None:
                note(f"lends up to {human_size(self._server.free)} of memory, to one client at a time; Ctrl-C ends it")
                typer.echo(self._public)
                sys.stdout.flush()

    def feed_error(self, line: str) -> None:
        """Take a line of stderr."""
        _, is_error, what = line.partition("error: ")
        if is_error:
            self.first_error = self.first_error or one_line(what)

    def failure(self) -> TritError | None:
        """What is wrong with the server, if anything is, once the thread knows."""
        self._check.join()
        return self._failure

    def stop(self) -> None:
        """Look for the server no longer."""
        self._stopped.set()

    def _ask(self, address: str) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN):
            try:
                self._server = ask(address, sorted(DEPTH_OF_TYPE))
            except UnreachableError:
                continue  # not yet
            except TritError as error:
                self._failure = error
            return


def _ip_address(host: str) -> ipaddress.IPv4Address:
    try:
        return ipaddress.IPv4Address(_LOOPBACK if host == "localhost" else host)
    except ValueError:
        raise UsageError(f"--host {host}: {_PROGRAM} takes IPv4 addresses only, such as {_LOOPBACK}") from None
