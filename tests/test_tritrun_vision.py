"""Questions about images, to a tiny model that sees."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_model, write_tiny_projector

pytestmark = pytest.mark.build


def png(path: Path, colour: tuple[int, int, int]) -> Path:
    """A square of one colour."""
    size = 28

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(colour) * size for _ in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_projector(tmp_path_factory.mktemp("eyes") / "mmproj.gguf")


def chat(*arguments: object, exit_code: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tritrun", "chat", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_answer_depends_on_the_image(tiny_model: Path, eyes: Path, tmp_path: Path) -> None:
    red, blue = png(tmp_path / "red.png", (255, 0, 0)), png(tmp_path / "blue.png", (0, 0, 255))

    def answer(*images: Path) -> str:
        named = [word for path in images for word in ("--image", path)]
        options = ("--mmproj", eyes, "-p", "what is it?", "--temp", 0, "--max-tokens", 12)
        done = chat(tiny_model, *named, *options)
        assert done.stderr == ""
        return done.stdout

    assert answer(red).endswith("\n")
    assert 1 <= len(answer(red).strip()) <= 12
    assert answer(red) == answer(red)
    assert len({answer(red), answer(blue), answer(red, blue)}) == 3


def test_what_is_no_image(tiny_model: Path, eyes: Path, tmp_path: Path) -> None:
    def refused(image: Path) -> str:
        return chat(tiny_model, "--mmproj", eyes, "--image", image, "-p", "x", exit_code=1).stderr

    text = tmp_path / "text.png"
    text.write_text("no image")
    assert refused(text) == f"error: {text}: no image in PNG, JPEG, GIF or BMP\n"
    assert "cannot be read" in refused(tmp_path / "none.png")
    cut = png(tmp_path / "cut.png", (0, 0, 0))
    cut.write_bytes(cut.read_bytes()[:40])
    assert refused(cut).startswith("error: the model does not answer: ")


def test_eyes_of_another_model(tiny_model: Path, eyes: Path, tmp_path: Path) -> None:
    image = png(tmp_path / "red.png", (255, 0, 0))
    wide = write_tiny_model(tmp_path / "wide.gguf", hidden=128)
    done = chat(wide, "--mmproj", eyes, "--image", image, "-p", "x", exit_code=1)
    assert done.stderr.count("\n") == 1
    done = chat(tiny_model, "--mmproj", tiny_model, "--image", image, "-p", "x", exit_code=1)
    assert "no part that sees or hears" in done.stderr


@pytest.mark.parametrize("left_out", ["--image", "--mmproj", "-p"])
def test_misuse(tiny_model: Path, eyes: Path, tmp_path: Path, left_out: str) -> None:
    given = {"--image": png(tmp_path / "red.png", (255, 0, 0)), "--mmproj": eyes, "-p": "x"}
    words = [word for name, value in given.items() if name != left_out for word in (name, value)]
    done = chat(tiny_model, *words, exit_code=2)
    assert "needs all of --image, --mmproj and --prompt" in done.stderr
