"""Versions: pyproject.toml has them all, and the programs say them."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamabuild import versions as wanted
from tritcore import versions

ROOT = Path(__file__).parent.parent


def test_no_other_file_has_the_local_version() -> None:
    local = "+" + wanted.read().gguf.partition("+")[2]
    folders = ("core", "convert", "runtime", "vendor", "docs", "models", "bench")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".patch")
    ]
    assert len(files) > 100
    for path in [*files, *ROOT.glob("*.md"), ROOT / "Makefile"]:
        assert local not in path.read_text(encoding="utf-8"), path


def test_the_backend_has_the_version_of_the_bindings() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"trit-gguf-vulkan=={wanted.read().llama_cpp_python}"' in project


def test_what_the_programs_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    bindings = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: bindings)
    monkeypatch.setattr(versions, "version", lambda package: f"{package}-1")
    assert versions.versions() == "trit-gguf-1 (llama-cpp-python llama-cpp-python-1)"
    (tmp_path / "lib" / "build.commit").write_text("0123456789ab\n")
    assert versions.versions() == "trit-gguf-1 (llama-cpp-python llama-cpp-python-1, commit 0123456789ab)"


def test_versions_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert versions.commit() == ""
    assert versions.version("no-such-package") == "not installed"
