#!/usr/bin/env python3
"""Files by AutoRound, the peer that tunes rounding, and what they take.

    bench/autoround.py build/bench/quality/base-hf --calibrate wt2.valid.txt -o build/bench/autoround

Installs auto-round from PyPI in an environment of its own, over the packages of this one, and makes a GGUF file of a
checkpoint for each scheme, calibrated on the text: 128 samples of 512 tokens, 200 steps a layer. `tritrun compare` sets
the files beside others.
"""

import argparse
import json
import os
import resource
import sys
import sysconfig
import time
import venv
from pathlib import Path

from command import exit_status
from programs import BUILD
from quality import run
from tritcore.console import out
from tritcore.errors import TritError

_PACKAGE = "auto-round==0.16.1"
_SCHEMES = ("gguf:q3_k_s", "gguf:q4_k_m")
_PIECE = 4096  # characters of the text in a sample, at most: more than 512 tokens


def main() -> None:
    """Make the files, and print a table."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # for auto-round: model and text are here
    python = _environment(BUILD / "bench" / "autoround-venv")
    text = options.output / "text.json"
    text.write_text(json.dumps(_samples(options.calibrate)), encoding="utf-8")
    lines = ["| scheme | file | MB | s | GiB |", "|---|---|---|---|---|"]
    for scheme in options.scheme or _SCHEMES:
        folder = options.output / scheme.replace(":", "-")
        start = time.monotonic()
        run(
            [
                *(python, "-m", "auto_round", "--model", options.checkpoint, "--device", "cpu", "--format", scheme),
                *("--scheme", scheme, "--dataset", text, "--nsamples", options.samples, "--seqlen", 512),
                *("--iters", options.steps, "--output_dir", folder),
            ]
        )
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of all children so far
        lines += [
            f"| {scheme} | {path} | {path.stat().st_size / 1e6:.1f} | {seconds:.0f} | {peak:.1f} |"
            for path in sorted(folder.rglob("*.gguf"))
        ]
    out.print("\n".join(lines), markup=False, soft_wrap=True)


def _environment(folder: Path) -> Path:
    """An interpreter that has auto-round, and what this one has. Raises TritError."""
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != _PACKAGE:
        venv.create(folder, with_pip=True, clear=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "base.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        run([python, "-m", "pip", "install", "--quiet", _PACKAGE])
        stamp.write_text(_PACKAGE, encoding="utf-8")
    return python


def _samples(path: Path) -> list[dict[str, str]]:
    """A text in pieces, as auto-round reads them. Raises TritError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TritError(f"{path}: cannot be read: {error}") from error
    return [{"text": text[start : start + _PIECE]} for start in range(0, len(text), _PIECE)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument(
        "--scheme", action="append", metavar="NAME", help="repeatable; gguf:q3_k_s and gguf:q4_k_m if none"
    )
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="for each layer (default: %(default)s)")
    parser.add_argument("--output", "-o", type=Path, default=BUILD / "bench" / "autoround", metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_status(main))
