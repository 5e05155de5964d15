"""Failures in C that no Python code can catch: failed assertions, uncaught C++ exceptions, signals.

llama.cpp calls abort() where a model file is not what it expects. Here that becomes what every other error is: one line
on stderr and exit code 1.
"""

import ctypes
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tritcore.console import one_line
from tritrun.servers import explain_loss

NO_BACKTRACE = {"GGML_NO_BACKTRACE": "1"}  # environment with which ggml starts no debugger on itself

_PLACE = re.compile(r"(?:.*?[/\\])?(?P<place>[^:/\\]+:\d+: .+)")
_SIGNALS = ("SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV")
_SET_TERMINATE = "_ZSt13set_terminatePFvvE"  # std::set_terminate(void (*)())
_CPP_RUNTIMES = ("libstdc++.so.6", "libc++abi.so.1", "/usr/lib/libc++abi.dylib")

# The C side keeps pointers to these until the process ends.
_callbacks: list[Any] = []


def failed_check(line: str) -> str | None:
    """What a line of ggml's that ends a program says, without the folders of its source file; None for other lines."""
    found = _PLACE.fullmatch(line.strip())
    return one_line(found["place"]) if found else None


def end_in_one_line(model: Path, library_folder: Path, servers: Sequence[str] = ()) -> None:
    """From now on, what kills this process inside llama.cpp ends it with one line about `model` instead.

    Args:
        library_folder: of the libraries that this process loads, or has loaded.
        servers: addresses of RPC servers that it uses; the line is about them where one is lost.
    """
    os.environ.update(NO_BACKTRACE)

    def end(reason: str) -> None:
        what = explain_loss(reason, servers) or (
            f"{one_line(model)}: llama.cpp cannot run this model: {one_line(reason)}; it is damaged, or of a kind that "
            "this build does not know: download or convert it again"
        )
        os.write(2, f"error: {what}\n".encode(errors="replace"))
        os._exit(1)  # no cleaning up: the library may hold locks, and its destructors fail too

    for library in library_folder.glob("libggml-base.*"):
        on_abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
        _keep(
            ctypes.CDLL(str(library)).ggml_set_abort_callback,
            on_abort(lambda text: end(failed_check(decoded := text.decode(errors="replace")) or decoded)),
        )
    for runtime in _CPP_RUNTIMES:
        try:
            set_terminate = getattr(ctypes.CDLL(runtime), _SET_TERMINATE)
        except (OSError, AttributeError):
            continue
        _keep(set_terminate, ctypes.CFUNCTYPE(None)(lambda: end("an exception that nobody catches")))
    if sys.platform != "win32":
        # Not signal.signal: its handler runs between Python instructions, and there will be none.
        set_handler = ctypes.CDLL(None).signal
        set_handler.restype = ctypes.c_void_p
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: end(signal.Signals(number).name))
        for name in _SIGNALS:
            _keep(functools.partial(set_handler, getattr(signal, name)), handler)


def _keep(register: Callable[[Any], object], callback: Any) -> None:
    _callbacks.append(callback)
    register(callback)
