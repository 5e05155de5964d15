"""Versions of the installed packages."""

import importlib.metadata


def version(package: str) -> str:
    """The version of a package, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
