"""The file of a conversion: checked before work, never shared, in place only when it is whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritcore.errors import TritError
from tritcore.output import reserve


def test_published(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with reserve(target, force=False) as output:
        output.partial.write_bytes(b"whole")
        assert not target.exists()
        output.publish()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with reserve(tmp_path / "model.gguf", force=False) as output:
        output.publish()
    assert (tmp_path / "model.gguf").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("end", [TritError("x"), KeyboardInterrupt(), OSError(errno.EIO, "of the source", "source")])
def test_what_is_not_published_leaves_nothing(end: BaseException, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"precious")

    def work() -> None:
        with reserve(target, force=True) as output:
            output.partial.write_bytes(b"half")
            raise end

    with pytest.raises(type(end)):
        work()
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with reserve(target, force=True) as output:
        output.partial.write_bytes(b"of the first")
        with pytest.raises(TritError, match=r"another run is writing .*model\.gguf"), reserve(target, force=True):
            pass
        assert output.partial.read_bytes() == b"of the first"
        output.publish()
    with reserve(target, force=True):  # free again
        pass
    assert target.read_bytes() == b"of the first"


def test_what_a_killed_run_left_is_written_over(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    code = (
        "import os, pathlib, sys; from tritcore.output import reserve\n"
        "with reserve(pathlib.Path(sys.argv[1]), False) as output:\n"
        "    output.partial.write_bytes(b'half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert (tmp_path / ".model.gguf.part").read_bytes() == b"half"
    with reserve(target, force=False) as output:
        output.partial.write_bytes(b"whole")
        output.publish()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with reserve(target, force=False) as output:
        target.write_bytes(b"of somebody else")
        with pytest.raises(TritError, match="exists: give --force"):
            output.publish()
    assert target.read_bytes() == b"of somebody else"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real.gguf", tmp_path / "link.gguf"
    real.write_bytes(b"old")
    link.symlink_to(real)
    with reserve(link, force=True) as output:
        output.partial.write_bytes(b"new")
        output.publish()
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("folder", "is a folder"),
        ("pipe", "is no regular file"),
        ("no/model.gguf", "does not exist"),
        ("x" * 300, "cannot write"),
        ("file/model.gguf", "does not exist"),
    ],
)
def test_places_that_cannot_be_written(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TritError, match=words), reserve(tmp_path / place, force=True):
        pass


def test_a_read_only_file_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: object, *_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TritError, match=r"cannot write .*: Read-only file system"), reserve(tmp_path / "x", force=True):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(TritError, match="no space left"), reserve(tmp_path / "x", force=True):
        raise OSError(errno.ENOSPC, "No space left on device")
    with reserve(tmp_path / "x", force=True) as output, pytest.raises(TritError, match="no space left"):
        output.check_space(1 << 60)
