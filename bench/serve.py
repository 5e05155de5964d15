#!/usr/bin/env python3
"""Tokens per second of `tritrun serve`, for several clients at once, and with a model that guesses.

bench/serve.py MODEL.gguf                        1, 4 and 8 clients
bench/serve.py MODEL.gguf --draft SMALL.gguf     each beside a server with that draft
"""

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
from rich.table import Table

from command import exit_status
from programs import machine
from served import served
from tritcore.console import out

_TOPICS = ("rivers", "bread", "winter", "music", "ships", "gardens", "letters", "bridges")
_CONTEXT = 1024


def main() -> None:
    """Serve, ask, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--draft", type=Path, metavar="FILE", help="a smaller model with the same vocabulary")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="default: 1 4 8")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    command = ("serve", options.model, "--port", 0, "--parallel", max(options.clients), "--ctx", _CONTEXT)
    drafts = {"none": []} | ({options.draft.name: ["--draft", options.draft]} if options.draft else {})
    samples: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(served(*command, *more)) for name, more in drafts.items()}
        for measured in [False] + options.rounds * [True]:  # the first round warms up
            for clients in options.clients:
                for name, url in servers.items():
                    speed = _tokens_per_second(url, clients, options.tokens)
                    if measured:
                        samples.setdefault((name, clients), []).append(speed)
    title = f"{options.model.name}, answers of {options.tokens} tokens, {machine()['cpu']}, {machine()['cores']} cores"
    table = Table("draft", "clients", "tokens/s in all", "range", "each", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for (name, clients), speeds in samples.items():
        middle = statistics.median(speeds)
        spread = f"{min(speeds):.0f} to {max(speeds):.0f}"
        table.add_row(name, str(clients), f"{middle:.0f}", spread, f"{middle / clients:.0f}")
    out.print(table)


def _tokens_per_second(url: str, clients: int, n_tokens: int) -> float:
    """Of all clients together, from the first question to the last answer."""
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600) as client,
        ThreadPoolExecutor(clients) as pool,
    ):

        def ask(topic: str) -> int:
            done = client.chat.completions.create(
                model="any",
                messages=[{"role": "user", "content": f"Write a long story about {topic}."}],
                max_tokens=n_tokens,
                temperature=0,
                extra_body={"ignore_eos": True, "cache_prompt": False},
            )
            return done.usage.completion_tokens if done.usage else 0

        start = time.perf_counter()
        total = sum(pool.map(ask, (_TOPICS[n % len(_TOPICS)] for n in range(clients))))
        return total / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(exit_status(main))
