"""A Python of its own: it imports from where this one does, and from nowhere else."""

import sys
from pathlib import Path

import pytest

from tritcore import child


def test_it_imports_from_where_this_process_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a package of `pip install --user` or of PYTHONPATH would be, which isolation alone would hide."""
    (tmp_path / "somewhere.py").write_text("NAME = 'it'")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    done = child.run("import somewhere, sys; print(somewhere.NAME, sys.argv[1:])", "a b", "--c")
    assert done.stdout == "it ['a b', '--c']\n", done.stderr


def test_the_current_folder_adds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "somewhere.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    done = child.run("import somewhere")
    assert done.returncode == 1
    assert "No module named 'somewhere'" in done.stderr
