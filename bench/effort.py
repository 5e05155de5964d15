#!/usr/bin/env python3
"""The time that tritconv predicts for a calibration beside the time that it takes.

bench/effort.py MODEL.gguf             each method, and gptq on two numbers of tokens
bench/effort.py FOLDER --tokens 4096   a checkpoint; few tokens
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from command import exit_status
from tritcore.console import out
from tritcore.errors import TritError

_PREDICTED = re.compile(r"about ([\d.]+) (s|min|h)$", re.MULTILINE)
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def main() -> None:
    """Convert, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file or a checkpoint folder")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate on (default: %(default)s)")
    options = parser.parse_args()
    table = Table("method", "tokens", "predicted, s", "taken, s", "taken / predicted")
    for column in table.columns[1:]:
        column.justify = "right"
    for method, tokens in (("imatrix", options.tokens), ("gptq", options.tokens), ("gptq", options.tokens // 4)):
        predicted, taken = _convert(options.model, method, tokens)
        table.add_row(method, f"{tokens:,}", f"{predicted:.0f}", f"{taken:.0f}", f"{taken / predicted:.2f}")
    out.print(table)


def _convert(model: Path, method: str, tokens: int) -> tuple[float, float]:
    """Seconds: predicted and taken, with an empty cache."""
    command = "gguf-to-gguf" if model.suffix == ".gguf" else "hf-to-gguf"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            command,
            model.resolve(),
            "--depth",
            2,
            "--method",
            method,
            "--calib-tokens",
            tokens,
            "-o",
            "x.gguf",
        ]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tritconv", *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"TRITCONV_CACHE": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        taken = time.monotonic() - start
    found = _PREDICTED.search(done.stderr)
    if done.returncode or found is None:
        raise TritError(f"tritconv {' '.join(map(str, arguments))} failed: {done.stderr.strip()}")
    return float(found[1]) * _SECONDS[found[2]], taken


if __name__ == "__main__":
    sys.exit(exit_status(main))
