#!/usr/bin/env python3
"""Tokens per second with RPC servers: alone, with one server, with two, and over a slow network.

bench/rpc.py MODEL.gguf                                  servers of this machine, a thread each
bench/rpc.py MODEL.gguf --delay 0.5 --megabits 1000      and the same over a network with this delay and rate

A server does its layers while the others wait, so one thread each keeps one core busy, alone or not.
"""

import argparse
import signal
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.table import Table

from command import exit_status
from programs import machine
from slow_link import slow_link
from tritcore.console import out
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritrun.bench import BenchRun
from tritrun.memory import n_layers

_SPEEDS = ("prompt", "answer")


def main() -> None:
    """Start servers, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--delay", type=float, metavar="MS", help="of the slow network, in each direction")
    parser.add_argument("--megabits", type=float, default=1000, metavar="N", help="per second, of it (default: 1000)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--answer-tokens", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    model = read_model_file(options.model)
    samples: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        addresses = [stack.enter_context(_lending()) for _ in range(2)]
        places: dict[str, tuple[list[str], int | None]] = {
            "alone": ([], None),
            "one server, all layers": (addresses[:1], n_layers(model)),
            "two servers, all layers": (addresses, n_layers(model)),
            "one server, half of the layers": (addresses[:1], n_layers(model) // 2),
        }
        if options.delay is not None:
            slow = [
                stack.enter_context(slow_link(address, options.delay / 1000, options.megabits * 1e6 / 8))
                for address in addresses
            ]
            places["two servers, slow network"] = (slow, n_layers(model))
        for measured in [False] + options.rounds * [True]:  # the first round warms up
            for name, (servers, layers) in places.items():
                run = BenchRun(options.prompt_tokens, options.answer_tokens, 1, 1, not servers, tuple(servers))
                done = run.measure(model, layers)
                for kind in _SPEEDS if measured else ():
                    samples.setdefault((name, kind), []).append(getattr(done, kind).mean)
    title = f"{options.model.name}, {options.prompt_tokens} and {options.answer_tokens} tokens, {machine()['cpu']}"
    table = Table("", *(f"{kind} t/s" for kind in _SPEEDS), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in places:
        table.add_row(name, *(_figure(samples[name, kind]) for kind in _SPEEDS))
    out.print(table)


def _figure(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})"


@contextmanager
def _lending() -> Iterator[str]:
    """The address of a server with one thread."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "tritrun", "rpc-server", "--port", str(port), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            if not (address := process.stdout.readline().strip()):
                raise TritError("the server does not start")
            yield address
        finally:
            process.send_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(exit_status(main))
