"""The variants of ggml's CPU code: which ones this machine runs, and the switch that forces one.

A build for all CPUs (`make build CPU=all`) has a module for each family of CPUs. Each says how well it suits this
machine, and ggml loads the best. A build for one machine (`CPU=native`) has only one, which is called "native" here.
"""

import ctypes
import os
from pathlib import Path

from tritcore.errors import TritError
from tritrun.tools import library_folder

NATIVE = "native"
_SWITCH = "GGML_CPU_VARIANT"  # what our ggml reads, in every program and in the bindings
_MODULE = "libggml-cpu-"


def modules() -> dict[str, Path]:
    """The library of each variant that is built, by name; whether it runs here is another matter.

    Raises:
        TritError: llama.cpp's libraries are not there.
    """
    folder = library_folder()
    if found := sorted(folder.glob(f"{_MODULE}*.so")):
        return {path.stem.removeprefix(_MODULE): path for path in found}
    if found := sorted(path for path in folder.glob("libggml-cpu.*") if path.suffix in (".so", ".dylib")):
        return {NATIVE: found[0]}
    raise TritError(f"{folder} has no CPU library of ggml; `make` installs the patched llama-cpp-python, which has it")


def runnable() -> list[str]:
    """Names of the variants that this machine runs, the best first: ggml takes that one unless told otherwise."""
    scores = {name: _score(path) for name, path in modules().items()}
    return sorted((name for name in scores if scores[name] > 0), key=lambda name: -scores[name])


def in_use() -> str:
    """Name of the variant that a program started now, or the bindings loaded now, will take."""
    names = runnable()
    forced = os.environ.get(_SWITCH)
    return forced if forced in names else names[0]


def environment(name: str) -> dict[str, str]:
    """Environment variables with which llama.cpp takes the variant `name` and no other.

    Raises:
        TritError: there is no such variant, or this machine cannot run it.
    """
    names = runnable()
    if name not in names:
        raise TritError(f"the CPU variant {name} is not built or does not run here; choose one of {', '.join(names)}")
    return {} if name == NATIVE else {_SWITCH: name}


def force(name: str | None) -> None:
    """Make this process and the programs that it starts take the variant `name`; None leaves the choice to ggml.

    The bindings must not be loaded yet.

    Raises:
        TritError: as `environment`.
    """
    if name is not None:
        os.environ.update(environment(name))


def _score(module: Path) -> int:
    """How well a module suits this machine, 0 if it does not run; its own words, as ggml asks for them."""
    try:
        score = ctypes.CDLL(str(module)).ggml_backend_score
    except AttributeError:  # built for this machine: nothing to choose from
        return 1
    except OSError as error:
        raise TritError(f"{module} does not load: {error}") from error
    return int(score())
