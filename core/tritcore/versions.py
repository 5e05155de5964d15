"""Versions of the installed packages, and the commit that their llama.cpp was packaged at."""

import importlib.metadata
import importlib.util
from pathlib import Path

_COMMIT = Path("lib", "build.commit")  # in llama_cpp: llamabuild.wheels writes it


def version(package: str) -> str:
    """The version of a package, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of this repository that the installed llama-cpp-python was made of; "" where that is not known."""
    bindings = importlib.util.find_spec("llama_cpp")
    if bindings is None or bindings.origin is None:
        return ""
    try:
        return (Path(bindings.origin).parent / _COMMIT).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def versions() -> str:
    """All of this, for `--version`."""
    made_of = f", commit {found}" if (found := commit()) else ""
    return f"{version('trit-gguf')} (llama-cpp-python {version('llama-cpp-python')}{made_of})"
