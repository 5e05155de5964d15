"""Wheels for other machines: what is refused, and when those of a folder are current."""

import zipfile
from pathlib import Path

import pytest

import build as build_script
from llamabuild import portable, toolchain, versions, wheels
from llamabuild.shell import BuildError

VARIANTS = ["libggml-cpu-haswell.so", "libggml-cpu-x64.so"]
NAME = "llama_cpp_python-1-py3-none-manylinux_2_34_x86_64.whl"


def write_wheel(folder: Path, **changed: bytes | None) -> Path:
    """A wheel of the bindings; `changed` has other contents of its files, or None for no such file."""
    contents: dict[str, bytes | None] = {
        **{f"llama_cpp/lib/{name}": b"./src/a.c" for name in VARIANTS},
        "llama_cpp/lib/libllama-server-impl.so": b"\0_app/immutable/bundle.js\0",
        wheels.KEY_FILE.as_posix(): b"key",
        wheels.COMMIT_FILE.as_posix(): b"0123456789ab",
    }
    contents |= {name.replace("__", "/"): content for name, content in changed.items()}
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / NAME, "w") as archive:
        for name, content in contents.items():
            if content is not None:
                archive.writestr(name, content)
    return folder / NAME


def check(wheel: Path, place: Path) -> None:
    portable.check(wheel, VARIANTS)
    portable.check_places(wheel, [place])


def test_a_whole_wheel_passes(tmp_path: Path) -> None:
    check(write_wheel(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("libggml-cpu-x64.so", None, r"lacks libggml-cpu-x64\.so"),
        ("libggml-cpu-x64.so", b"\0%s/src/a.c\0", r"libggml-cpu-x64\.so holds the path /"),
        ("libllama-server-impl.so", b"no page", "no web page"),
    ],
)
def test_what_a_wheel_may_not_be(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    content = content.replace(b"%s", bytes(tmp_path)) if content else content
    wheel = write_wheel(tmp_path, **{f"llama_cpp/lib/{name}": content})
    with pytest.raises(BuildError, match=reason):
        check(wheel, tmp_path)


@pytest.mark.parametrize(
    ("commit", "is_current"),
    [("0123456789ab", True), ("ba9876543210", False), ("0123456789ab-dirty", False), ("", False)],
)
def test_wheels_are_current_at_their_commit(
    commit: str, is_current: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "commit", lambda: commit)
    write_wheel(tmp_path / "dist")
    assert portable.is_current(tmp_path / "dist", "x86_64") is is_current
    assert not portable.is_current(tmp_path / "dist", "aarch64")
    assert not portable.is_current(tmp_path / "none", "x86_64")


def test_wheels_of_another_build_are_not_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "commit", lambda: "0123456789ab")
    write_wheel(tmp_path)
    assert portable.is_current(tmp_path, "x86_64", "key")
    assert not portable.is_current(tmp_path, "x86_64", "another key")


def test_the_command_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "commit", lambda: "0123456789ab")
    monkeypatch.setattr(portable.platform, "machine", lambda: "x86_64")
    assert build_script.main(["--is-current", str(tmp_path)]) == 1
    write_wheel(tmp_path)
    assert build_script.main(["--is-current", str(tmp_path)]) == 0


def test_checksums_are_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "b.whl").write_bytes(b"")
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for _ in range(2):  # the second time there is a file with checksums
        portable.write_sums(tmp_path)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (tmp_path / "SHA256SUMS").read_text() == f"{empty}  a.tar.gz\n{empty}  b.whl\n"


@pytest.mark.parametrize(
    "options", [["--dist", "d", "--cpu", "native"], ["--dist", "d", "--cuda"], ["--cross", "aarch64"]]
)
def test_options_that_make_no_portable_wheel(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        build_script.main(options)
    assert stopped.value.code == 2


def test_a_missing_cross_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="aarch64-linux-gnu-gcc not found on PATH; install it"):
        toolchain.cross("aarch64")
