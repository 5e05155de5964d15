#!/usr/bin/env python3
"""Tokens per second with RPC servers: alone, with one server, with two, and over a slow network.

bench/rpc.py MODEL.gguf                                  servers of this machine, a thread each
bench/rpc.py MODEL.gguf --delay 0.5 --megabits 1000      and the same over a network with this delay and rate

A server does its layers while the others wait, so one thread each keeps one core busy, alone or not.
"""

import argparse
import socket
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.table import Table

from command import exit_status
from programs import machine
from served import served
from slow_link import slow_link
from tritcore.console import out
from tritcore.gguf_header import read_model_file
from tritrun.bench import BenchRun
from tritrun.memory import n_layers
from tritrun.rounds import PHASES, run_round, summarize


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
    with ExitStack() as stack:
        lending = ("rpc-server", "--threads", 1, "--port")
        addresses = [stack.enter_context(served(*lending, _free_port())) for _ in range(2)]
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

        def test(servers: list[str], layers: int | None) -> dict[str, float]:
            run = BenchRun(options.prompt_tokens, options.answer_tokens, 1, 1, not servers, tuple(servers))
            return run.measure(model, layers).by_phase

        tests = {name: partial(test, *place) for name, place in places.items()}
        _, *rounds = (run_round(tests, number) for number in range(options.rounds + 1))  # the first one warms up
    title = f"{options.model.name}, {options.prompt_tokens} and {options.answer_tokens} tokens, {machine()['cpu']}"
    table = Table("", *(f"{phase} t/s" for phase in PHASES), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in places:
        speeds = summarize(rounds, name)
        table.add_row(name, *(speeds[phase].format(1) for phase in PHASES))
    out.print(table)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    sys.exit(exit_status(main))
