#!/usr/bin/env python3
"""The quality of the TRIT types beside llama.cpp's, from the model of models/ to the report.

Makes the base without a lattice (dither.py), an importance matrix, files of each method, other types across rows
(across_rows.py) and as llama-quantize makes them, and runs `tritrun compare` over all. What is there already is not
made again. Takes about two hours on two cores; --quick uses little text, to see that it works. With --no-noise, only
what has 3 bits or so: the lattice of the published weights is one that types of 4 and 5 bits hit almost exactly.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from command import exit_status
from programs import BUILD, ROOT
from tritconv.errors import TritError
from tritrun.tools import find_tool

_CALIBRATE = ("--calibrate", "text")
_METHODS = {
    "TRIT2 search": ("--depth", "2"),
    "TRIT2 uniform": ("--depth", "2", "--method", "uniform"),
    "TRIT2 imatrix": ("--depth", "2", "--imatrix", "imatrix.gguf"),
    "TRIT2 gptq": ("--depth", "2", *_CALIBRATE),
    "TRIT2 tune": ("--depth", "2", "--method", "tune", *_CALIBRATE),
    "TRIT3 search": ("--depth", "3"),
    "TRIT3 gptq, all text": ("--depth", "3", "--calib-tokens", "1000000", *_CALIBRATE),
    "TRIT-4bpw gptq": ("--bpw", "4.0", *_CALIBRATE),
}
_ACROSS_ROWS = ("Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K")
_THREE_BITS = ("TRIT2 search", "TRIT2 imatrix", "TRIT2 gptq", "Q3_K", "IQ3_S")
_DECODED = ("TRIT2 gptq", "TRIT2 tune", "TRIT3 gptq, all text")
_BASE = {False: "base", True: "plain"}  # by --no-noise, as dither.py calls them


def main() -> None:
    """Make what is missing, and compare."""
    options = _options()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    name = _BASE[options.no_noise]
    base = folder / f"{name}-F16.gguf"
    if not base.is_file():
        _run("bench/dither.py", "-o", folder, *(["--no-noise"] if options.no_noise else []))
    imatrix = folder / f"{name}-imatrix.gguf"
    if not imatrix.is_file():
        chunks = ["--chunks", "2"] if options.quick else []
        _run(find_tool("llama-imatrix"), "-m", base, "-f", options.calibrate, "-o", imatrix, *chunks)

    targets: dict[str, Path] = {}
    wanted = _THREE_BITS if options.no_noise else (*_METHODS, *_ACROSS_ROWS)
    for label, arguments in _METHODS.items():
        if label not in wanted:
            continue
        target = folder / f"{name}-{label.replace(',', '').replace(' ', '-')}.gguf"
        targets[label] = target
        if not target.is_file():
            files = {"imatrix.gguf": imatrix, "text": options.calibrate}
            extra: list[object] = [files.get(argument, argument) for argument in arguments]
            if options.quick and "--calibrate" in arguments:
                extra += ["--calib-tokens", 1024]
            _run("-m", "tritconv", "hf-to-gguf", folder / f"{name}-hf", "-o", target, *extra)

    across = folder / f"{name}-across"
    types = [part for qtype in _ACROSS_ROWS if qtype in wanted for part in ("--type", qtype)]
    if not list(across.glob("*")):
        _run("bench/across_rows.py", "--base", base, "-o", across, *types, "--imatrix", imatrix)
        _run("bench/across_rows.py", "--base", base, "-o", across, "--type", "Q3_K")
        decoded = [part for label in _DECODED if label in targets for part in ("--decode", targets[label])]
        _run("bench/across_rows.py", "-o", across, *decoded)
    models = [f"{label}={target}" for label, target in targets.items()]
    for path in sorted(across.glob("*.gguf")):
        models.append(f"{path.stem.removeprefix(f'{name}-').replace('-', ' ')}={path}")

    report = folder / f"{name}.json"
    _run(
        *("-m", "tritrun", "compare", "--base", base, "--text", options.text, "--work", folder / f"{name}-work"),
        *("--chunks", 2 if options.quick else options.chunks),
        *([] if options.no_noise else ["--recipe", "default", "--imatrix", imatrix]),
        *("--title", f"SmolLM2-135M-Instruct, {'as published' if options.no_noise else 'lattice removed'}"),
        *("--json", report, "--html", folder / f"{name}.html", "--svg", folder / f"{name}.svg"),
        *(["--no-speed"] if options.quick or options.no_speed else []),
        *models,
    )
    print(_markdown(json.loads(report.read_text(encoding="utf-8"))["models"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=Path, required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="another text, to evaluate on")
    parser.add_argument("--chunks", type=int, default=24, metavar="N", help="of 512 tokens (default: %(default)s)")
    parser.add_argument("--no-noise", action="store_true", help="the published weights as they are")
    parser.add_argument("--no-speed", action="store_true", help="quality only")
    parser.add_argument("--quick", action="store_true", help="does it work? the figures mean nothing")
    parser.add_argument("--output", "-o", type=Path, default=BUILD / "bench" / "quality", metavar="FOLDER")
    return parser.parse_args()


def _run(program: object, *arguments: object) -> None:
    """Run a script or a module of this repository, or a program; its output goes to the terminal."""
    command = [str(argument) for argument in (program, *arguments)]
    if command[0].endswith(".py"):
        command[:1] = [sys.executable, str(ROOT / command[0])]
    elif command[0] == "-m":
        command[:0] = [sys.executable, "-I"]
    print("+", *command, file=sys.stderr, flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise TritError(f"{' '.join(command[:4])} .. failed with exit code {status}")


def _markdown(rows: Sequence[dict]) -> str:
    """The figures as a table for docs/quality.md."""
    lines = [
        "| file | MB | bits per weight of the layers | PPL | mean KLD | median | 99.9 % | same top |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        divergence = row["divergence"]
        size = "" if row["contents"]["stand_in"] else f"{row['n_bytes'] / 1e6:.1f}"
        figures = ["", "", "", ""]
        if divergence:
            mean, error = divergence["mean"]["value"], divergence["mean"]["error"]
            figures = [
                f"{mean:.4f} ± {error:.4f}",
                f"{divergence['median']:.4f}",
                f"{divergence['percentile_99_9']:.2f}",
                f"{divergence['same_top']['value']:.1f} %",
            ]
        bits, perplexity = f"{row['contents']['layer_bits']:.2f}", f"{row['perplexity']['value']:.2f}"
        lines.append(f"| {' | '.join([row['label'], size, bits, perplexity, *figures])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_status(main))
