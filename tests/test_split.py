"""Models in parts: what --split-max-size writes, and that every command reads it from any part."""

import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from checkpoints import logits
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import LAYERS, write_tiny_model
from typer.testing import CliRunner

from tritconv.convert import Job, gguf_to_gguf
from tritconv.parts import layout
from tritconv.plan import Plan
from tritconv.verify import findings
from tritcore import files, loads
from tritcore.errors import TritError
from tritcore.gguf_header import parts_of, read_model_file
from tritcore.output import reserve
from tritrun.cli import app

MOST = 40_000  # bytes: the tiny model has 92,000
COUNT = 3
ONE_OF_THEM = range(COUNT)
NAMES = [f"split-{number:05}-of-{COUNT:05}.gguf" for number in (1, 2, 3)]


def convert(source: Path, target: Path, split: str | None = "40kB", *options: object, exit_code: int = 0) -> str:
    parts = () if split is None else ("--split-max-size", split)
    done = tritconv("gguf-to-gguf", source, "--fast", "--depth", 2, "-o", target, *parts, *options)
    assert done.returncode == exit_code, done.stderr
    return done.stdout if exit_code == 0 else done.stderr


def content(*paths: Path) -> list[tuple[str, Type, bytes]]:
    return [(t.name, t.tensor_type, t.data.tobytes()) for path in paths for t in GGUFReader(path).tensors]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny-F16.gguf")


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    target = source.with_name("whole.gguf")
    convert(source, target, None)
    return target


@pytest.fixture(scope="module")
def parts(source: Path) -> list[Path]:
    folder = source.parent / "parts"
    folder.mkdir()
    report = convert(source, folder / "split.gguf")
    assert f"{NAMES[0]} to {NAMES[-1]}" in " ".join(report.split())
    return [folder / name for name in NAMES]


@pytest.mark.build
def test_the_parts_hold_what_the_whole_file_holds(whole: Path, parts: list[Path]) -> None:
    assert sorted(parts[0].parent.iterdir()) == parts
    assert all(path.stat().st_size <= MOST for path in parts)
    assert content(*parts) == content(whole)
    first, *others = (read_model_file(path).metadata for path in parts)
    numbers = {"split.no": 0, "split.count": COUNT, "split.tensors.count": 3 + 9 * LAYERS}
    assert first == {**read_model_file(whole).metadata, **numbers}
    assert others == [{**numbers, "split.no": number} for number in (1, 2)]


@pytest.mark.build
def test_a_first_part_of_metadata_alone(source: Path, whole: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "x.gguf", "30kB")
    first, *others = parts_of(read_model_file(tmp_path / "x-00001-of-00004.gguf"))
    assert first.tensors == ()
    assert content(*(part.path for part in others)) == content(whole)
    assert loads.refusal(first.path) is None


@pytest.mark.build
def test_what_is_small_enough_stays_one_file(source: Path, whole: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "x.gguf", "1MB")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.build
def test_a_checkpoint_becomes_parts(checkpoint: Path, tmp_path: Path) -> None:
    for split in ((), ("--split-max-size", "200kB")):
        target = tmp_path / f"tiny{len(split)}.gguf"
        done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 3, "-o", target, *split)
        assert done.returncode == 0, done.stderr
    found = sorted(tmp_path.glob("tiny2-*.gguf"))
    assert len(found) > 1
    assert content(*found) == content(tmp_path / "tiny0.gguf")


@pytest.mark.build
def test_llama_cpp_loads_the_parts(whole: Path, parts: list[Path]) -> None:
    assert loads.refusal(parts[0]) is None
    assert (logits(parts[0], "hello") == logits(whole, "hello")).all()


@pytest.mark.build
@pytest.mark.parametrize("part", ONE_OF_THEM)
def test_every_command_of_tritconv_reads_the_parts(part: int, whole: Path, parts: list[Path], tmp_path: Path) -> None:
    assert tritconv("verify", parts[part]).stdout == f"{parts[part]}: ok\n"
    options = ("--tensor", f"blk.{LAYERS - 1}.ffn_down.weight")
    tables = [tritconv("inspect", path, *options, COLUMNS="200").stdout for path in (whole, parts[part])]
    assert tables[0] == tables[1] != ""
    tables = [tritconv("inspect", path, COLUMNS="200").stdout for path in (whole, parts[part])]
    tensors, *_ = (table.partition(" tensors ")[2] for table in tables)
    assert tensors.count("search") == 7 * LAYERS  # the first part has the methods of all
    assert tensors in tables[1]
    for path, name in ((whole, "a.gguf"), (parts[part], "b.gguf")):
        convert(path, tmp_path / name, None)
    assert content(tmp_path / "a.gguf") == content(tmp_path / "b.gguf")


@pytest.mark.build
@pytest.mark.parametrize("part", ONE_OF_THEM)
def test_every_command_of_tritrun_reads_the_parts(
    part: int, source: Path, whole: Path, parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [*map(str, arguments), "--threads", "1"])
        assert done.exit_code == 0, done.output
        return done.stdout

    prompt = ("chat", "--prompt", "hello", "--temp", 0, "--max-tokens", 12)
    assert run(*prompt, parts[part]) == run(*prompt, whole)
    measure = ("--text", text, "--chunks", 4, "--ctx", 64, "--json", "-", "--no-speed")
    report = json.loads(run("compare", "--base", source, *measure, f"a={whole}", f"b={parts[part]}"))
    figures = {model["label"]: model for model in report["models"]}
    for figure in ("perplexity", "divergence", "contents"):
        assert figures["a"][figure] == figures["b"][figure] is not None
    assert figures["b"]["n_bytes"] == sum(path.stat().st_size for path in parts)
    perplexity = run("perplexity", "--file", text, *measure[2:-1], parts[part])
    assert json.loads(perplexity)["perplexity"]["value"] == pytest.approx(figures["a"]["perplexity"]["value"])
    assert "split" in run("bench", "-p", 8, "-n", 2, "-r", 1, parts[part])


@pytest.mark.parametrize(
    ("size", "exit_code", "words"),
    [
        ("10kB", 2, "--split-max-size 10.0 kB is too small: tensor 'token_embd.weight' takes 24.3 kB"),
        ("1kB", 2, "--split-max-size 1.0 kB is too small: the metadata take "),
        ("large", 2, "--split-max-size large is no size: write 120MB or 1.5GiB"),
    ],
)
def test_sizes_that_cannot_be(size: str, exit_code: int, words: str, source: Path, tmp_path: Path) -> None:
    assert words in convert(source, tmp_path / "x.gguf", size, exit_code=exit_code)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.build
def test_parts_are_replaced_by_force_alone(source: Path, parts: list[Path], tmp_path: Path) -> None:
    (tmp_path / NAMES[1]).write_bytes(b"precious")
    assert f"{NAMES[1]} exists: give --force" in convert(source, tmp_path / "split.gguf", exit_code=1)
    assert list(tmp_path.iterdir()) == [tmp_path / NAMES[1]]
    convert(source, tmp_path / "split.gguf", "40kB", "--force")
    assert [path.name for path in sorted(tmp_path.iterdir())] == NAMES
    assert content(*sorted(tmp_path.iterdir())) == content(*parts)


@pytest.mark.build
def test_the_source_s_own_parts_are_not_replaced(parts: list[Path], tmp_path: Path) -> None:
    before = content(*parts)
    for target in ("split.gguf", NAMES[2]):
        message = convert(parts[1], parts[0].with_name(target), "30kB", "--force", exit_code=1)
        assert "is the source itself" in message
    assert content(*parts) == before


@pytest.mark.build
def test_weights_that_need_a_larger_type_are_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part may grow where a tensor falls back: the parts are laid out before that is known."""
    monkeypatch.setattr("tritconv.convert.Header.files", lambda *_: (range(5), range(5, 3 + 9 * LAYERS)))
    monkeypatch.setattr("tritconv.convert._checked_parts", lambda *_: 0)
    written = gguf_to_gguf(
        source, Job(Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0), tmp_path / "x.gguf", threads=1, split_size=50_000)
    )
    assert written is not None
    assert [path.name for path in written.paths] == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    assert written.remarks == [
        f"x-00002-of-00002.gguf has {written.paths[1].stat().st_size / 1000:.1f} kB, more than --split-max-size: "
        "a type in it is not the planned one"
    ]
    assert findings(written.path, 1) == []


def publish(folder: Path, meanwhile: Callable[[Sequence[Path]], None], *, force: bool = False, count: int = 2) -> None:
    """Write parts in a reserved place; `meanwhile` is called before they are published."""
    with reserve(folder / "m.gguf", force, may_split=True) as output:
        partials = output.partials(count)
        for partial in partials:
            partial.write_bytes(b"new")
        meanwhile(partials)
        output.publish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_appear_together(tmp_path: Path) -> None:
    def look(partials: Sequence[Path]) -> None:
        assert not list(tmp_path.glob("m*.gguf"))
        assert [partial.name for partial in partials] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]

    publish(tmp_path, look)
    assert names(tmp_path) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


@pytest.mark.parametrize("end", [TritError("x"), KeyboardInterrupt()])
def test_an_end_in_between_leaves_no_part(end: BaseException, tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"old")

    def stop(_: Sequence[Path]) -> None:
        raise end

    with pytest.raises(type(end)):
        publish(tmp_path, stop, force=True)
    assert names(tmp_path) == ["m-00002-of-00002.gguf"]
    assert (tmp_path / "m-00002-of-00002.gguf").read_bytes() == b"old"


def test_parts_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    left = tmp_path / ".m.gguf.parts"
    left.mkdir()
    (left / "m-00001-of-00009.gguf").write_bytes(b"half")

    def look(partials: Sequence[Path]) -> None:
        assert sorted(left.iterdir()) == partials

    publish(tmp_path, look)
    assert names(tmp_path) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def test_a_part_that_comes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    theirs = tmp_path / "m-00002-of-00002.gguf"

    def come(_: Sequence[Path]) -> None:
        theirs.write_bytes(b"of somebody else")

    with pytest.raises(TritError, match=r"m-00002-of-00002\.gguf exists: give --force"):
        publish(tmp_path, come)
    assert names(tmp_path) == [theirs.name]
    assert theirs.read_bytes() == b"of somebody else"


def test_a_failure_between_two_parts_leaves_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"old")
    rename, calls = files.publish, []

    def fail_at_the_second(partial: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(partial, target)

    monkeypatch.setattr(files, "publish", fail_at_the_second)
    with pytest.raises(TritError, match=r"cannot write .*m\.gguf: Input/output error"):
        publish(tmp_path, lambda _: None, force=True, count=3)
    assert names(tmp_path) == []


@given(
    st.lists(st.integers(1, 50), max_size=30),
    st.integers(0, 60),
    st.integers(0, 10),
    st.integers(1, 80),
)
def test_a_layout_keeps_the_order_and_the_limit(sizes: list[int], first: int, other: int, most: int) -> None:
    files = layout(sizes, first, other, most)
    assert [number for file in files for number in file] == list(range(len(sizes)))
    rooms = [first] + [other] * (len(files) - 1)
    totals = [room + sum(sizes[n] for n in file) for room, file in zip(rooms, files, strict=True)]
    assert all(files[1:])  # only the first may be without tensors
    for total, file in zip(totals, files, strict=True):
        assert total <= most or len(file) <= 1
    for total, following in zip(totals, files[1:], strict=False):  # no tensor has been left for the next file in vain
        assert total + sizes[following[0]] > most
