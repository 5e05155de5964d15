"""Digests, and files that appear whole or not at all."""

import errno
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tritcore import files
from tritcore.errors import TritError


def test_digests(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a" * (1 << 20) + b"b")
    two.write_bytes(b"")
    assert files.sha256(one) == hashlib.sha256(one.read_bytes()).hexdigest()
    assert files.sha256_of_all([one]) == files.sha256(one)
    assert files.sha256_of_all([one, two]) != files.sha256_of_all([two, one])
    assert files.sha256_of_bytes(b"a", b"bc") == hashlib.sha256(b"abc").hexdigest()
    assert files.sha256_of_json({"a": 1, "b": [None]}) == files.sha256_of_json({"b": [None], "a": 1})
    assert files.sha256_of_json({"a": 1}) != files.sha256_of_json({"a": "1"})
    with pytest.raises(TritError, match="gone: cannot be read: No such file"):
        files.sha256(tmp_path / "gone")


def test_content_is_replaced_with_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    (tmp_path / "other").touch()
    files.write_text_atomically(path, "old")
    files.write_text_atomically(path, "grüße \udcff")
    assert path.read_text(encoding="utf-8") == "grüße ?"
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "report.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/real")
    files.write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/real").read_bytes() == b"new"


def test_a_name_of_any_length_that_the_disk_takes(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / ("ä" * 127), b"x")
    with pytest.raises(TritError, match=r"cannot write .*: File name too long"):
        files.write_atomically(tmp_path / ("x" * 256), b"x")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "cannot write .*report: Input/output error"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for .*report: free some, or choose another"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left for .*report: free some, or choose another"),
    ],
)
def test_a_failed_write_leaves_all_as_it_was(
    step: str, failure: OSError, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report"
    path.write_bytes(b"precious")

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(TritError, match=message) as caught:
            files.write_atomically(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            files.write_atomically(tmp_path / "report", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_leaves_the_target_and_a_file_with_a_known_name(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_bytes(b"precious")
    code = (
        "import os, pathlib, sys; from tritcore import files\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "files.write_atomically(pathlib.Path(sys.argv[1]), b'new')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert path.read_bytes() == b"precious"
    (left,) = (entry for entry in tmp_path.iterdir() if entry != path)
    assert re.fullmatch(re.escape(files.PARTIAL) + "[0-9a-f]+", left.name)


def test_scratch_folders_go(tmp_path: Path) -> None:
    target = tmp_path / "imatrix.gguf"
    with files.scratch_beside(target) as folder:
        assert folder.parent == tmp_path
        (folder / "partial").write_bytes(b"whole")
        files.publish(folder / "partial", target)
    assert target.read_bytes() == b"whole"
    with pytest.raises(TritError, match="no space left for"), files.scratch_beside(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("place", "message"), [("folder", "not a regular file"), ("no/report", "there is no folder"), ("report", "")]
)
def test_places_are_checked_before_work(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    if not message:
        files.check_writable(tmp_path / place)
        return
    with pytest.raises(TritError, match=message):
        files.check_writable(tmp_path / place)
