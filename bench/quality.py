#!/usr/bin/env python3
"""The quality of the TRIT types beside llama.cpp's, from the model of models/ to the report.

Makes the base without a lattice (dither.py), an importance matrix, files of each method, other types across rows
(across_rows.py) and as llama-quantize makes them, and runs `tritrun compare` over all. What the same programs have made
already from the same files is not made again. Takes about two hours on two cores; --quick uses little text and a folder
of its own, to see that it works. With --no-noise, only what has 3 bits or so: the lattice of the published weights is
one that types of 4 and 5 bits hit almost exactly.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from across_rows import across_name, decoded_name
from command import exit_status
from made import make
from programs import BUILD, ROOT
from tritcore.errors import TritError
from tritrun.tools import find_tool

_CALIBRATE = ("--calibrate", "text")
_SOME = (*_CALIBRATE, "--calib-tokens", "65536")
_LAYERS_ALONE = ("--embed-type", "q8_0")
_METHODS = {
    "TRIT2 search": ("--depth", "2", "--fast"),
    "TRIT2 uniform": ("--depth", "2", "--method", "uniform"),
    "TRIT2 imatrix": ("--depth", "2", "--imatrix", "imatrix.gguf"),
    "TRIT2 gptq": ("--depth", "2", *_LAYERS_ALONE, *_CALIBRATE),
    "TRIT2 tune": ("--depth", "2", "--method", "tune", *_LAYERS_ALONE, *_CALIBRATE),
    "TRIT2, no option": ("--depth", "2"),
    "2.5 bits gptq": ("--bpw", "3.77", *_LAYERS_ALONE, *_SOME),  # 2.5 in the layers
    "3 bits gptq": ("--bpw", "4.165", *_LAYERS_ALONE, *_SOME),
    "TRIT3 search": ("--depth", "3", "--fast"),
    "TRIT3 gptq": ("--depth", "3", *_LAYERS_ALONE, *_CALIBRATE),
    "78.5 MB gptq": ("--target-size", "78.5MB", *_SOME),
    "78.5 MB tune": ("--target-size", "78.5MB", "--method", "tune", *_SOME),
    "90.9 MB gptq": ("--target-size", "90.9MB", *_SOME),
    "105.5 MB gptq": ("--target-size", "105.5MB", *_SOME),
}
_ACROSS_ROWS = ("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K")
_THREE_BITS = ("TRIT2 search", "TRIT2 imatrix", "TRIT2 gptq", "Q3_K", "IQ3_S")
_DECODED = ("2.5 bits gptq", "3 bits gptq", "TRIT2 gptq", "TRIT2 tune", "TRIT3 gptq")
_DITHER, _ACROSS = ROOT / "bench" / "dither.py", ROOT / "bench" / "across_rows.py"
_SOURCE = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
_BASE = {False: "base", True: "plain"}  # by --no-noise, as dither.py calls them


def main() -> None:
    """Make what is missing, and compare."""
    options = _options()
    folder = options.output / "quick" if options.quick else options.output
    folder.mkdir(parents=True, exist_ok=True)
    name = _BASE[options.no_noise]
    imatrix = folder / f"{name}-imatrix.gguf"
    base, checkpoint = make_base(folder, noise=not options.no_noise)
    chunks = ["--chunks", 2] if options.quick else []
    importance = [find_tool("llama-imatrix"), "-m", base, "-f", options.calibrate, "-o", imatrix, *chunks]
    make([imatrix], importance, [base, options.calibrate], run)

    wanted = _THREE_BITS if options.no_noise else (*_METHODS, *_ACROSS_ROWS)
    files: dict[str, Path] = {}
    for label, arguments in _METHODS.items():
        if label not in wanted:
            continue
        files[label] = folder / f"{name}-{label.replace(',', '').replace(' ', '-')}.gguf"
        given = {"imatrix.gguf": imatrix, "text": options.calibrate}
        extra: list[object] = [given.get(argument, argument) for argument in arguments]
        if options.quick and not {"--fast", "uniform", "--imatrix"} & set(arguments):
            extra += ["--calib-tokens", 1024]
        convert = ["-m", "tritconv", "hf-to-gguf", checkpoint, "--force", "-o", files[label], *extra]
        make([files[label]], convert, [checkpoint, *(path for path in extra if isinstance(path, Path))], run)

    models = [*files.values(), *_across(folder / f"{name}-across", base, imatrix, files, wanted)]
    labels = [*files, *(path.stem.removeprefix(f"{name}-").replace("-", " ") for path in models[len(files) :])]
    report = folder / f"{name}.json"
    run(
        [
            *("-m", "tritrun", "compare", "--base", base, "--text", options.text, "--work", folder / f"{name}-work"),
            *("--chunks", 2 if options.quick else options.chunks),
            *([] if options.no_noise else ["--recipe", "default", "--imatrix", imatrix]),
            *("--title", f"SmolLM2-135M-Instruct, {'as published' if options.no_noise else 'lattice removed'}"),
            *("--json", report, "--html", folder / f"{name}.html", "--svg", folder / f"{name}.svg"),
            *(["--no-speed"] if options.quick or options.no_speed else []),
            *(f"{label}={path}" for label, path in zip(labels, models, strict=True)),
        ]
    )
    print(as_markdown(json.loads(report.read_text(encoding="utf-8"))["models"]))


def make_base(folder: Path, *, noise: bool = True) -> tuple[Path, Path]:
    """Make the base of all comparisons in `folder`: a file in F16, and the same as a checkpoint. Raises TritError."""
    name = _BASE[not noise]
    base, checkpoint = folder / f"{name}-F16.gguf", folder / f"{name}-hf"
    command = [_DITHER, "-o", folder, *([] if noise else ["--no-noise"])]
    make([base, checkpoint / "model.safetensors"], command, [_SOURCE], run)
    return base, checkpoint


def _across(
    folder: Path, base: Path, imatrix: Path, files: Mapping[str, Path], wanted: Collection[str]
) -> Iterator[Path]:
    """Make the files of types across rows, and of ours decoded, in `folder`."""
    folder.mkdir(exist_ok=True)
    with_imatrix = [(qtype, [imatrix]) for qtype in _ACROSS_ROWS if qtype in wanted]
    for qtype, weighted_by in [*with_imatrix, ("Q3_K", [])]:
        target = folder / across_name(qtype, bool(weighted_by))
        options = [part for path in weighted_by for part in ("--imatrix", path)]
        make([target], [_ACROSS, "--base", base, "-o", folder, "--type", qtype, *options], [base, *weighted_by], run)
        yield target
    for source in (files[label] for label in _DECODED if label in files):
        target = folder / decoded_name(source)
        make([target], [_ACROSS, "-o", folder, "--decode", source], [source], run)
        yield target


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


def run(command: Sequence[object]) -> None:
    """Run a script or a module of this repository, or a program; its output goes to the terminal."""
    words = [str(word) for word in command]
    if words[0].endswith(".py") or words[0] == "-m":
        words.insert(0, sys.executable)
    print("+", *words, file=sys.stderr, flush=True)
    status = subprocess.run(words, check=False).returncode
    if status:
        raise TritError(f"{' '.join(words[:4])} .. failed with exit code {status}")


def as_markdown(rows: Sequence[dict]) -> str:
    """The figures of `tritrun compare` as a table for docs/concepts/quality.md."""
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
