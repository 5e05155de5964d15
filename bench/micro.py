#!/usr/bin/env python3
"""Cycles per 32 weights of ggml's dot products and matrix products, on one thread, for the TRIT types and others.

Builds micro.cpp against the libraries in use, runs it, and prints medians. All samples go to a JSON file.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from rich.table import Table

from command import exit_status
from contestants import TYPES
from cxx import compile_program
from programs import BUILD, commit, machine
from tritcore.console import err, one_line, out
from tritcore.errors import TritError
from tritcore.files import write_text_atomically
from tritrun import variants
from tritrun.tools import library_folder, run_tool

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADERS = BUILD / "src/vendor/llama.cpp/ggml/include"
_TYPES = tuple(name for name, weight_type in TYPES.items() if weight_type.pure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", metavar="A,B", default=",".join(_TYPES), help="(default: %(default)s)")
    parser.add_argument("--cpu", metavar="NAME", help="variant of ggml-cpu, such as haswell (default: the best)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--milliseconds", type=int, default=50, metavar="N", help="for a sample (default: %(default)s)")
    parser.add_argument(
        "--columns", type=int, default=2048, metavar="N", help="weights in a row (default: %(default)s)"
    )
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="(default: in build/bench)")
    options = parser.parse_args(arguments)
    options.types = options.types.split(",")
    for name in options.types:
        if name not in _TYPES:
            parser.error(f"--types: {name!r} is none of {', '.join(_TYPES)}")
    if min(options.rounds, options.milliseconds) < 1 or options.columns < 64 or options.columns % 64:
        parser.error("--rounds and --milliseconds must be positive, --columns a multiple of 64")
    return options


def build(folder: Path, target: Path) -> None:
    """Compile micro.cpp against the ggml in `folder`.

    Raises:
        TritError: no compiler, no headers, or an error of the compiler.
    """
    if not _HEADERS.is_dir():
        raise TritError(f"{_HEADERS} is missing: make build")
    libraries = (f"-L{folder}", f"-Wl,-rpath,{folder}", "-lggml", "-lggml-base", "-ldl")
    compile_program(_SOURCE, target, ("-O2", f"-I{_HEADERS}", *libraries))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cases; return a sample for each case and round.

    Raises:
        TritError: the program cannot be built, or fails.
    """
    folder = library_folder()
    program = BUILD / "bench" / "micro"
    with err.status("building micro.cpp") as status:
        build(folder, program)
        lines: list[str] = []
        arguments = [str(folder), str(options.rounds), str(options.milliseconds), str(options.columns), *options.types]
        finished = run_tool(
            program.name, arguments, lines.append, lambda line: status.update(one_line(line)), program.parent
        )
    if finished.exit_code:
        raise TritError(f"{program}: {finished.reason}")
    return [json.loads(line) for line in lines]


def table(samples: Sequence[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Medians: a row for each type and layout of its weights, a column for each kernel and size of the matrix."""
    cycles: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for sample in samples:
        row = cycles.setdefault((sample["type"], sample["buffer"]), {})
        kernel = "vec_dot" if sample["kernel"] == "vec_dot" else f"mul_mat, n = {sample['n']}"
        row.setdefault(kernel, {}).setdefault(sample["rows"], []).append(sample["cycles"])
    sizes = " / ".join(str(rows) for rows in sorted({sample["rows"] for sample in samples}))
    kernels = list(dict.fromkeys(kernel for row in cycles.values() for kernel in row))
    result = Table(
        title=f"cycles per 32 weights; CPU {options.cpu}",
        caption=f"matrices of {sizes} rows of {options.columns}; medians of {options.rounds} rounds; "
        f"{statistics.median(sample['ghz'] for sample in samples):.2f} GHz",
    )
    result.add_column("type")
    result.add_column("bpw", justify="right")
    result.add_column("weights")
    for kernel in kernels:
        result.add_column(kernel, justify="right", no_wrap=True)
    for (name, buffer), row in cycles.items():
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        cells = (
            " / ".join(f"{statistics.median(figures):.2f}" for _, figures in sorted(row.get(kernel, {}).items()))
            for kernel in kernels
        )
        style = "bold" if TYPES[name].is_ours else None
        result.add_row(name, f"{8 * n_bytes / block:.2f}", buffer.removeprefix("CPU_").lower(), *cells, style=style)
    return result


def report(options: argparse.Namespace) -> None:
    """Measure, print the table, write the samples.

    Raises:
        TritError: something is missing, or the program fails.
    """
    variants.force(options.cpu)
    options.cpu = variants.in_use()
    samples = measure(options)
    if not samples:
        raise TritError(f"--columns {options.columns}: no multiple of any of these types' blocks")
    out.print(table(samples, options))
    facts = {"machine": machine(), "commit": commit(), "cpu": options.cpu, "columns": options.columns}
    path = options.output or BUILD / "bench" / f"micro-{options.cpu}-{options.columns}.json"
    write_text_atomically(path, json.dumps(facts | {"samples": samples}, indent=1) + "\n")
    out.print(f"{path}", soft_wrap=True)


if __name__ == "__main__":
    chosen = parse(None)
    sys.exit(exit_status(lambda: report(chosen)))
