"""The cache: a key for all that a result depends on, room for what is used, and nothing of others deleted."""

import dataclasses
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

from tritconv import convert
from tritconv.allocate import CANDIDATES
from tritconv.calibration import context
from tritconv.calibration.inputs import Inputs, Machinery, digest_of_tokens
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.reach import Reach
from tritconv.calibration.store import LayerStore
from tritconv.cli import app
from tritconv.methods import gptq, tune
from tritconv.methods.gptq import sensitivity
from tritconv.plan import Plan
from tritconv.sources.mapped import open_checkpoint
from tritconv.sources.source import Source
from tritcore import cache, sizes
from tritcore.errors import TritError
from tritcore.output import Output

MACHINERY = Machinery("float32", "cpu AVX2", 2, (("torch", "2.6"),), "encoder", "sources")
INPUTS = Inputs("layers", "model", "tokens", 0, MACHINERY)
A, B, C = (digit * 24 for digit in "abc")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the cache, which does not exist yet."""
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITCONV_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


def other(value: Any) -> Any:
    return {str: f"{value}x", int: 7}.get(type(value), (("another", 1),))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Inputs) if field.name != "machinery"])
def test_each_input_changes_the_key(name: str) -> None:
    changed = dataclasses.replace(INPUTS, **{name: other(getattr(INPUTS, name))})
    assert changed.key() != INPUTS.key()
    assert changed.key() == dataclasses.replace(changed).key()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Machinery)])
def test_each_part_of_the_machinery_changes_the_key(name: str) -> None:
    changed = dataclasses.replace(MACHINERY, **{name: other(getattr(MACHINERY, name))})
    assert dataclasses.replace(INPUTS, machinery=changed).key() != INPUTS.key()


def test_the_machinery_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libggml-base.so"
    library.write_bytes(b"one")
    monkeypatch.setattr("tritcore.ggml.library_path", lambda: library)
    first = Machinery.here("float32", torch.device("cpu"))
    assert first == Machinery.here("float32", torch.device("cpu"))
    assert dict(first.libraries)["torch"].split("+")[0] == torch.__version__.split("+")[0]
    library.write_bytes(b"two")
    assert Machinery.here("float32", torch.device("cpu")).encoder != first.encoder


def test_tokens_of_another_shape_or_type_are_others() -> None:
    tokens = torch.arange(256)
    digests = {digest_of_tokens(tokens.view(4, 64)), digest_of_tokens(tokens.view(2, 128)), digest_of_tokens(tokens)}
    digests.add(digest_of_tokens(tokens.view(4, 64).to(torch.int32)))
    assert len(digests) == 4
    assert digest_of_tokens(tokens.view(4, 64).T.contiguous().T) == digest_of_tokens(tokens.view(4, 64))


def test_layers_are_kept_and_damage_is_forgiven() -> None:
    store = LayerStore(INPUTS, "tiny")
    assert store.load(0) is None
    store.save(0, {"x": np.arange(5, dtype=np.uint8)})
    loaded = LayerStore(dataclasses.replace(INPUTS), "tiny").load(0)
    assert loaded is not None
    assert (loaded["x"] == np.arange(5)).all()
    assert LayerStore(dataclasses.replace(INPUTS, seed=1), "tiny").load(0) is None
    (store.entry.folder / "layer-0000.safetensors").write_bytes(b"damaged")
    assert store.load(0) is None


def test_the_tag_is_in_the_entry_and_not_in_a_folder_of_the_users(place: Path) -> None:
    entry = cache.Entry(A, "layers,\nof [tiny]")
    tag = (place / A / "CACHEDIR.TAG").read_text(encoding="utf-8")
    assert tag == "Signature: 8a477f597d28d172789f06886806bc55\n# tritconv: layers, of [tiny]\n"
    assert [path.name for path in place.iterdir()] == [A]
    entry.close()


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Within the context, files cannot grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_nothing_behind() -> None:
    store = LayerStore(INPUTS, "tiny")
    with largest_file(1000), pytest.raises(TritError, match="no space left for the cache") as refused:
        store.save(0, {"x": np.zeros(10**6, np.uint8)})
    assert re.search(r"layer-0000\.safetensors needs 1\.0 MB; .*'tritconv cache'.*TRITCONV_CACHE", str(refused.value))
    assert [path.name for path in store.entry.folder.iterdir()] == ["CACHEDIR.TAG"]


def test_room_for_all_layers_is_looked_for_first() -> None:
    entry = cache.Entry(A, "layers")
    entry.check_space(1000)
    with pytest.raises(TritError, match=r"no space left for the cache: .* needs 1000000 TB, .* are free: free some"):
        entry.check_space(10**18)


def test_left_overs_of_a_killed_run_go_but_not_those_of_a_running_one(place: Path) -> None:
    code = (
        "import sys, tempfile, time; from tritcore import cache;"
        f"entry = cache.Entry({A!r}, 'layers'); tempfile.mkstemp(prefix='.part-', dir=entry.folder);"
        "print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    cache.Entry(A, "layers").close()
    assert len(list(place.glob("*/.part-*"))) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    cache.Entry(A, "layers").close()
    assert not list(place.glob("*/.part-*"))


def fill(key: str, n_bytes: int, age: float) -> None:
    """An entry that was used so many seconds ago."""
    entry = cache.Entry(key, "layers")
    entry.write("layer-0000.safetensors", bytes(n_bytes))
    entry.close()
    os.utime(entry.folder / "CACHEDIR.TAG", (time.time() - age,) * 2)


def test_the_least_recently_used_go_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, age in ((A, 100), (B, 300), (C, 200)):
        fill(key, 1000, age)
    monkeypatch.setenv("TRITCONV_CACHE_SIZE", "2kB")
    cache.prune()
    assert sorted(path.name for path in place.iterdir()) == [A, C]
    cache.Entry(C, "layers").close()  # used again
    fill("d" * 24, 1000, 0)
    assert sorted(path.name for path in place.iterdir()) == [C, "d" * 24]


def test_what_is_in_use_stays_whatever_the_limit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITCONV_CACHE_SIZE", "0")
    entry = cache.Entry(A, "layers")
    entry.write("layer-0000.safetensors", bytes(1000))
    other = cache.Entry(B, "layers")
    assert cache.clear() == (0, 0, 2)
    assert (place / A / "layer-0000.safetensors").stat().st_size == 1000
    entry.close()
    other.write("layer-0000.safetensors", bytes(10))
    assert [path.name for path in place.iterdir()] == [B]


def _use(n_times: int) -> None:
    for number in range(n_times):
        entry = cache.Entry((A, B, C)[number % 3], "layers")
        entry.write("layer-0000.safetensors", bytes(100))
        assert (entry.folder / "layer-0000.safetensors").stat().st_size == 100
        entry.close()


def test_processes_that_use_and_prune_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITCONV_CACHE_SIZE", "0")
    processes = [multiprocessing.get_context("fork").Process(target=_use, args=(100,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache.clear()
    assert list(place.iterdir()) == []


def test_nothing_of_others_is_deleted(place: Path, tmp_path: Path) -> None:
    fill(A, 1000, 0)
    mine = {
        place / "thesis.tex": "",
        place / B / "layer-0000.safetensors": "",  # no tag
        place / C / "CACHEDIR.TAG": "Signature: 8a477f597d28d172789f06886806bc55\n# another program\n",
        place / A / "notes.txt": "",
        tmp_path / "elsewhere" / "CACHEDIR.TAG": (place / A / "CACHEDIR.TAG").read_text(encoding="utf-8"),
        tmp_path / "elsewhere" / "layer-0000.safetensors": "",
    }
    for path, content in mine.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (place / ("d" * 24)).symlink_to(tmp_path / "elsewhere")
    assert cache.clear() == (1, 1000, 0)
    assert all(path.exists() for path in mine)
    assert [path.name for path in (place / A).iterdir()] == ["notes.txt"]


def test_the_command_shows_and_clears(place: Path) -> None:
    fill(A, 1_500_000, 0)
    shown = " ".join(CliRunner().invoke(app, ["cache"], env={"COLUMNS": "200"}).stdout.split())
    assert str(place) in shown
    assert "at most" in shown
    assert re.search(rf"layers │ {A} │ 1\.5 MB │ \d{{4}}-\d\d-\d\d \d\d:\d\d", shown)
    cleared = CliRunner().invoke(app, ["cache", "clear"])
    assert cleared.exit_code == 0
    assert cleared.stdout.strip() == "1 deleted, 1.5 MB"
    assert list(place.iterdir()) == []
    assert CliRunner().invoke(app, ["cache", "clean"]).exit_code == 2


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TRITCONV_CACHE": "/proc/nowhere"}, "cannot keep results in /proc/nowhere: .*; set TRITCONV_CACHE"),
        ({"TRITCONV_CACHE": __file__}, "cannot keep results in .*; set TRITCONV_CACHE"),
        ({"TRITCONV_CACHE_SIZE": "many"}, "TRITCONV_CACHE_SIZE=many is no size: write 20GB"),
    ],
)
def test_places_and_limits_that_will_not_do(
    environment: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TritError, match=reason):
        cache.check()


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TRITCONV_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(TritError, match="no home folder for the cache: set TRITCONV_CACHE"):
        cache.check()


def test_default_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITCONV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "tritconv"
    assert 0 < cache.limit() <= 20 * 10**9
    monkeypatch.setenv("TRITCONV_CACHE", "~/here")
    assert cache.folder() == Path.home() / "here"


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("120MB", 120 * 10**6), ("1.5 GiB", 3 * 2**29), ("1tb", 10**12), ("64k", 64000), ("7", 7), ("0", 0)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert sizes.parse(text) == n_bytes


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "nan", "1e9", "1.MB", "12 parsecs", "i", "٣MB"])
def test_what_is_no_size(text: str) -> None:
    assert sizes.parse(text) is None


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (123456789, "123 MB"), (2e13, "20.0 TB")],
)
def test_sizes_for_people(n_bytes: float, text: str) -> None:
    assert sizes.show(n_bytes) == text


class _Reached(Exception):
    """The calibration has come to the result in question."""


class _NoEntry:
    def check_space(self, n_bytes: int) -> None:
        pass


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[LayeredModel, Source, Reach]:
    """The tiny Llama as both sides of a calibration have it, and how they belong together."""
    mapped = open_checkpoint(checkpoint)
    values = {tensor.name: tensor.load() for tensor in mapped.tensors}
    tensors = [dataclasses.replace(tensor, load=partial(values.__getitem__, tensor.name)) for tensor in mapped.tensors]
    model = LayeredModel(checkpoint)
    reach = context.find_reach(model, mapped.architecture, tensors, Plan(2, *[GGMLQuantizationType.Q8_0] * 3))
    return model, dataclasses.replace(mapped, tensors=tuple(tensors)), reach


@pytest.fixture
def keys_of(
    loaded: tuple[LayeredModel, Source, Reach], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The keys of all results that a command line leads to, by kind."""
    found: dict[str, str] = {}
    model, source, reach = loaded
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(topics.topics.values())[:200_000], encoding="utf-8")
    (tmp_path / "other.txt").write_text(text.read_text(encoding="utf-8")[50_000:], encoding="utf-8")

    class Store:
        entry = _NoEntry()

        def __init__(self, inputs: Inputs, name: str) -> None:
            found[inputs.kind] = inputs.key()

    class Measurement:
        def __init__(self, _: object, maps: Any, *rest: object) -> None:
            self._maps = maps

        def losses(self, *_: object) -> Any:
            return {name: dict(zip(CANDIDATES, (27.0, 9.0, 3.0, 1.0, 0.1), strict=True)) for name in self._maps}

    def stop(*arguments: object) -> Any:
        raise _Reached

    def quantize(quantizer: Any, *arguments: object) -> Iterator[Any]:
        if not quantizer._keep_offsets:
            raise _Reached
        return iter(())

    monkeypatch.setattr(context, "LayerStore", Store)
    monkeypatch.setattr(context, "LayeredModel", lambda *_: model)
    monkeypatch.setattr(context, "find_reach", lambda *_: reach)
    monkeypatch.setattr(context.own_text, "write", lambda _, tokens, count, *rest: tokens[:1].repeat(count, 1))
    monkeypatch.setattr(sensitivity, "Measurement", Measurement)
    monkeypatch.setattr(gptq.LayerQuantizer, "run", quantize)
    monkeypatch.setattr(tune, "load_tuned", stop)

    def to_gguf(name: str, revision: str | None, job: convert.Job, pre: str | None = None) -> None:
        convert._convert(source, Output(tmp_path / "out.gguf", force=False), job)

    monkeypatch.setattr(convert, "hf_to_gguf", to_gguf)
    monkeypatch.setattr(convert, "_check_outline", lambda *_: None)

    def keys(*options: object) -> dict[str, str]:
        found.clear()
        defaults = [] if "--bpw" in options or "--target-size" in options else ["--depth", 2, "--embed-type", "q8_0"]
        calibration = ["--calib-tokens", 1024, "--calib-seq", 64, "--calibrate", text]
        command = ["hf-to-gguf", str(checkpoint), *defaults, *calibration, *options]
        run = CliRunner().invoke(app, [str(part) for part in command], env={"TRIT_TRACEBACK": "1"})
        assert isinstance(run.exception, _Reached), run.output + run.stderr
        return dict(found)

    threads = torch.get_num_threads()
    yield keys
    torch.set_num_threads(threads)


@pytest.mark.build
def test_each_option_that_changes_a_result_changes_its_key(keys_of: Any, tmp_path: Path) -> None:
    plain = keys_of()
    assert plain.keys() == {"layers"}
    assert keys_of() == plain
    for options in (
        ["--depth", 3],
        ["--calib-tokens", 2048],
        ["--calib-seq", 128],
        ["--calib-own", 256],
        ["--seed", 1],
        ["--tensor-depth", "attn_k=3"],
        ["--calibrate", tmp_path / "other.txt"],
        ["--threads", torch.get_num_threads() + 1],
    ):
        assert keys_of(*options)["layers"] != plain["layers"], options
    keys_of("--threads", torch.get_num_threads() - 1)
    for options in (
        ["-o", tmp_path / "elsewhere.gguf"],
        ["--force"],
        ["--embed-type", "f16"],
        ["--output-type", "f16"],
        ["--fallback-type", "f16"],
        ["--method", "gptq"],
    ):
        assert keys_of(*options) == plain, options


@pytest.mark.build
def test_each_option_of_the_training_changes_its_key(keys_of: Any) -> None:
    plain = keys_of("--method", "tune")
    assert plain.keys() == {"layers", "tune"}
    for options in (["--epochs", 3], ["--seed", 1], ["--depth", 3], ["--calib-tokens", 2048], ["--calib-own", 256]):
        assert keys_of("--method", "tune", *options)["tune"] != plain["tune"], options
    assert keys_of("--method", "tune", "--epochs", 3)["layers"] == plain["layers"]
    assert keys_of("--method", "tune", "--force") == plain


@pytest.mark.build
def test_a_size_changes_the_keys_of_the_layers_alone(keys_of: Any) -> None:
    small, large = keys_of("--bpw", 4), keys_of("--bpw", 5)
    assert small["sensitivity"] == large["sensitivity"]
    assert small["layers"] != large["layers"]
    assert keys_of("--target-size", "660kB")["layers"] != keys_of("--target-size", "720kB")["layers"]
    assert keys_of("--bpw", 4, "--seed", 1)["sensitivity"] != small["sensitivity"]
    assert keys_of("--bpw", 4, "--calib-own", 256)["sensitivity"] != small["sensitivity"]
