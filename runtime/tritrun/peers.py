"""The files that llama.cpp's own programs make of a base model: importance matrix and stock quantizations."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tritcore.console import err, one_line
from tritcore.errors import TritError
from tritcore.files import publish, scratch_beside
from tritcore.gguf_header import ModelFile, read_model_file
from tritrun.text_tool import run_over_text
from tritrun.tools import Finished, run_tool

DEFAULT_RECIPES = ("IQ3_S", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")

_QUANTIZE, _IMATRIX = "llama-quantize", "llama-imatrix"
_FLOATS = ("F16", "BF16", "F32")
_CONTEXT = 512  # tokens in a chunk of the calibration text; llama-imatrix's own default
_RECIPE = re.compile(r"\s*(?:\d+\s+or\s+)?(\w+)\s*:")
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\]")


def check_recipes(base: ModelFile, names: Iterable[str], has_imatrix: bool) -> None:
    """Check, before long work, that llama-quantize can make these files.

    Raises:
        TritError: it does not know a name, a type needs an importance matrix, or the base is quantized already.
    """
    quantized = next((t for t in base.tensors if len(t.shape) > 1 and t.type.name not in _FLOATS), None)
    if quantized is not None:
        raise TritError(
            f"{base.path}: tensor '{one_line(quantized.name)}' is {quantized.type.name}; --recipe needs a base in "
            f"{', '.join(_FLOATS)}"
        )
    known = _known_recipes()
    for name in names:
        if name not in known:
            raise TritError(f"--recipe {name}: llama-quantize does not know it, only {', '.join(known)}")
        finished, output = _quantize(["--dry-run", str(base.path), name])
        if finished.exit_code:
            raise TritError(f"--recipe {name}: {_QUANTIZE}: {finished.reason}")
        if "will require an imatrix" in output and not has_imatrix:
            raise TritError(f"--recipe {name} needs an importance matrix; give --calibrate TEXT or --imatrix FILE")


def make_imatrix(base: ModelFile, text: Path, chunks: int | None, target: Path, threads: int) -> None:
    """Write the importance matrix of `base` on a text, whole or not at all.

    Raises:
        TritError: llama-imatrix fails.
    """
    with scratch_beside(target) as folder:
        partial = folder / "imatrix.gguf"
        arguments = ["-m", base.path, "-f", text, "-o", partial, "-c", _CONTEXT, "-b", _CONTEXT, "-t", threads]
        arguments += ["--chunks", chunks] if chunks else []
        log = run_over_text(_IMATRIX, [str(argument) for argument in arguments], f"importance matrix on {text.name}")
        if not partial.exists():
            raise TritError(f"{_IMATRIX}: {log.first_error or f'no result from {text}'}")
        publish(partial, target)


def quantize(source: Path, recipe: str, target: Path, threads: int, options: Sequence[str] = ()) -> None:
    """Write a model as llama-quantize stores it under a recipe's name, whole or not at all.

    Args:
        options: more of llama-quantize's own.

    Raises:
        TritError: llama-quantize fails.
    """
    with scratch_beside(target) as folder:
        partial = folder / target.name
        finished, _ = _quantize([*options, str(source), str(partial), recipe, str(threads)], recipe)
        if finished.exit_code:
            raise TritError(f"{target}: {_QUANTIZE}: {finished.reason}")
        read_model_file(partial)  # a full disk cuts it off
        publish(partial, target)


def _known_recipes() -> list[str]:
    _, output = _quantize(["--help"])
    _, _, listing = output.partition("allowed quantization types")
    return [found[1] for line in listing.splitlines() if (found := _RECIPE.match(line))]


def _quantize(arguments: list[str], title: str | None = None) -> tuple[Finished, str]:
    """Run llama-quantize; how it ended and all that it wrote. With a title it shows how far it is."""
    lines: list[str] = []
    if title is None:
        return run_tool(_QUANTIZE, arguments, lines.append, lines.append), "".join(lines)
    with err.status(title) as status:

        def show(line: str) -> None:
            lines.append(line)
            if step := _TENSOR.match(line):
                status.update(f"{title}, tensor {step[1]} of {step[2]}")

        finished = run_tool(_QUANTIZE, arguments, show, show)
    return finished, "".join(lines)
