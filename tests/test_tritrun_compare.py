"""tritrun compare on tiny models, with llama.cpp's own programs: figures, recipes, what is kept, what is refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_tiny_model
from typer.testing import CliRunner, Result

from tritcore.gguf_header import Value, read_model_file
from tritrun import rounds
from tritrun.bench import BenchRun
from tritrun.cli import app
from tritrun.comparison import STAND_IN_BITS, STAND_IN_TYPE, contents
from tritrun.machine import describe
from tritrun.perplexity import Run

pytestmark = pytest.mark.build

CHUNKS, CONTEXT = 4, 64
QUALITY = ["--chunks", str(CHUNKS), "--ctx", str(CONTEXT), "--threads", "1"]
SPEED = ["--rounds", "2", "--prompt-tokens", "16", "--answer-tokens", "4"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are not to be broken into lines; and forget afterwards which CPU variant was forced."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def run(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with rows that K-quants fit into."""
    return write_tiny_model(tmp_path_factory.mktemp("base") / "tiny-F16.gguf", hidden=256)


@pytest.fixture(scope="module")
def poor(base: Path) -> Path:
    return write_tiny_model(base.parent / "tiny-poor.gguf", hidden=256, noise=0.1)


@pytest.fixture(scope="module")
def good(base: Path) -> Path:
    return write_tiny_model(base.parent / "tiny-good.gguf", hidden=256, noise=0.01)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a program would start that takes long."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("long work has begun")

    for place in ("text_tool.run_tool", "bench.run_tool", "peers.quantize", "compare.quantize"):
        monkeypatch.setattr(f"tritrun.{place}", started)


def test_compare(base: Path, good: Path, poor: Path, text: Path, tmp_path: Path, request: Any) -> None:
    work, json_file, html, svg = (tmp_path / name for name in ("work", "report.json", "report.html", "report.svg"))
    command = ["--base", base, "--text", text, *QUALITY, *SPEED, "--work", work, "--title", "Tiny & small"]
    command += ["--recipe", "Q4_K_M, IQ2_XS", "--recipe", "TRIT2", "--calibrate", text, "--calibrate-chunks", 2]
    command += [good, f"Rather [b]poor[/b]={poor}"]
    first = run(*command, "--json", json_file, "--html", html, "--svg", svg)

    report = json.loads(json_file.read_text())
    models = {model["label"]: model for model in report["models"]}
    assert next(iter(models)) == "F16"
    assert models.keys() == {"F16", "good", "Rather [b]poor[/b]", "Q4_K_M", "IQ2_XS", "TRIT2"}
    assert [model["base"] for model in report["models"]] == [True, False, False, False, False, False]
    sizes = [model["n_bytes"] for model in report["models"][1:]]
    assert sizes == sorted(sizes)
    assert models["good"]["n_bytes"] == good.stat().st_size
    assert models["F16"]["divergence"] is None
    assert models["F16"]["perplexity"]["value"] > 1
    divergence = {name: model["divergence"]["mean"]["value"] for name, model in models.items() if model["divergence"]}
    assert 0 < divergence["good"] < divergence["Q4_K_M"] < divergence["IQ2_XS"]
    assert divergence["good"] < divergence["Rather [b]poor[/b]"]
    assert models["TRIT2"]["contents"]["layers"] == {"TRIT2": 1.0}
    assert models["TRIT2"]["contents"]["layer_bits"] == 3.5
    assert models["TRIT2"]["contents"]["family"] == "TRIT"
    assert models["Q4_K_M"]["contents"]["file_type"] == "Q4_K_M"
    assert models["Q4_K_M"]["contents"]["family"] == "K-quant"
    assert models["IQ2_XS"]["contents"]["family"] == "I-quant"
    for model in models.values():
        for phase in ("decode", "prompt"):
            speed = model["speed"][phase]
            assert 0 < speed["low"] <= speed["median"] <= speed["high"]

    conditions = report["conditions"]
    assert (conditions["chunks"], conditions["ctx"], conditions["threads"]) == (CHUNKS, CONTEXT, 1)
    assert conditions["recipes"] == ["Q4_K_M", "IQ2_XS", "TRIT2"]
    assert conditions["calibration"] == "text.txt"
    assert conditions["machine"] == describe()
    assert str(tmp_path.parent) not in json_file.read_text() + html.read_text()  # no folders

    assert json_file.stat().st_mode == text.stat().st_mode  # others may read it as they may any file

    table = first.stdout
    assert all(label in table for label in models)
    assert f"{divergence['Q4_K_M']:.4f}" in table
    assert "Rather [b]poor[/b]" in html.read_text()
    assert "Tiny &amp; small" in html.read_text()
    assert "Tiny &amp; small" in svg.read_text()

    request.getfixturevalue("no_long_work")
    again = run(*command, "--json", "-")
    assert json.loads(again.stdout)["models"] == report["models"]
    # a subset takes its figures, and its speed, from the same rounds
    fewer = run("--base", base, "--text", text, *QUALITY, *SPEED, "--work", work, "--json", "-", poor)
    assert json.loads(fewer.stdout)["models"][1]["speed"] == models["Rather [b]poor[/b]"]["speed"]
    assert not list(work.glob(".*"))


def test_an_importance_matrix_of_ones_own(base: Path, text: Path, tmp_path: Path) -> None:
    first = ["--base", base, "--text", text, *QUALITY, "--no-speed", "--work", tmp_path / "work", "--json", "-"]
    made = json.loads(run(*first, "--recipe", "Q3_K_S", "--calibrate", text).stdout)
    (matrix,) = (tmp_path / "work").glob("imatrix-*.gguf")
    brought = json.loads(run(*first, "--recipe", "Q3_K_S", "--imatrix", matrix).stdout)
    without = json.loads(run(*first, "--recipe", "Q3_K_S").stdout)
    digests = [report["models"][1]["sha256"] for report in (made, brought, without)]
    assert digests[0] == digests[1] != digests[2]
    assert brought["conditions"]["calibration"] == matrix.name
    assert without["conditions"]["calibration"] is None
    assert made["models"][1]["speed"] is None


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, last: int = 99) -> list[object]:
    """Replace a method by one that notes its calls, and is interrupted after so many."""
    calls: list[object] = []
    method: Callable[..., Any] = getattr(owner, name)

    def count(self: Any, *arguments: Any) -> Any:
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(arguments)
        return method(self, *arguments)

    monkeypatch.setattr(owner, name, count)
    return calls


def test_an_interrupted_run_goes_on(
    base: Path, good: Path, poor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    html = tmp_path / "report.html"
    command = ["--base", base, "--text", text, *QUALITY, *SPEED, "--html", html, good, poor]
    with monkeypatch.context() as patch:
        counted(patch, Run, "measure_against", last=1)
        result = run(*command, exit_code=130)
        assert result.stderr.splitlines()[-1] == "error: interrupted"
    with monkeypatch.context() as patch:
        calls = counted(patch, Run, "measure_against")
        logits = counted(patch, Run, "write_logits")
        counted(patch, BenchRun, "measure", last=4)  # one round of three files, and one more
        run(*command, exit_code=130)
        assert (len(calls), len(logits)) == (1, 0)
    with monkeypatch.context() as patch:
        calls = counted(patch, BenchRun, "measure")
        run(*command)
        assert len(calls) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.work"}
    assert not list((tmp_path / "report.work").glob(".*"))

    # other settings, other results
    calls = counted(monkeypatch, Run, "measure_against")
    run(*command, "--chunks", CHUNKS + 1)
    assert len(calls) == 2


def test_nothing_is_kept_where_there_is_no_output(
    base: Path, good: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "good" in run("--base", base, "--text", text, *QUALITY, "--no-speed", good).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_result_is_measured_again(
    base: Path, good: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--base", base, "--text", text, *QUALITY, "--no-speed", "--work", tmp_path, "--json", "-", good]
    first = json.loads(run(*command).stdout)
    for path in tmp_path.glob("quality-*.json"):
        path.write_text(path.read_text()[:-40])
    calls = counted(monkeypatch, Run, "measure_against")
    assert json.loads(run(*command).stdout)["models"] == first["models"]
    assert len(calls) == 1


def test_rounds_begin_with_another_test_each() -> None:
    order: list[str] = []

    def test(name: str) -> dict[str, float]:
        order.append(name)
        return dict.fromkeys(rounds.PHASES, float(len(order)))

    tests = {name: partial(test, name) for name in "abc"}
    done = [rounds.run_round(tests, number) for number in range(2)]
    assert "".join(order) == "abcbca"
    assert rounds.summarize(done, "a")["decode"] == (3.5, 1.0, 6.0)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no model": ([], "name a model, or use --recipe"),
    "missing model": (["none.gguf"], "none.gguf: no such file"),
    "twins": (["{good}", "good={poor}"], "2 files would be called good; give them names: LABEL=FILE"),
    "like the base": (["F16={poor}", "{good}"], "2 files would be called F16"),
    "no such text": (["{good}", "--text", "none.txt"], "none.txt: no such text file"),
    "no calibration": (["--recipe", "Q4_K", "--calibrate", "none.txt"], "none.txt: no such file, or it is empty"),
    "two matrices": (["--recipe", "Q4_K", "--calibrate", "x", "--imatrix", "y"], "give only one"),
    "no recipe": (["{good}", "--imatrix", "y"], "are for the files of --recipe"),
    "unknown recipe": (["--recipe", "Q9_K"], "--recipe Q9_K: llama-quantize does not know it, only"),
    "not a recipe": (["--recipe", "../x"], "--recipe ../x: llama-quantize does not know it"),
    "needs a matrix": (["--recipe", "IQ2_XS"], "--recipe IQ2_XS needs an importance matrix; give --calibrate TEXT"),
    "no folder": (["{good}", "--html", "none/x.html"], "there is no folder none"),
    "a folder": (["{good}", "--json", "."], "cannot write .: not a regular file"),
}


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_at_once(
    case: str, base: Path, good: Path, poor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    arguments = [argument.format(good=good, poor=poor) for argument in arguments]
    usage = case in ("no model", "two matrices", "no recipe")
    result = run("--base", base, "--text", text, *QUALITY, *arguments, exit_code=2 if usage else 1)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert usage or result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_long_work")
def test_other_models_are_refused_at_once(
    base: Path, good: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiny_gguf.TOKENS", ["<unk>", "<s>", "</s>"])
    monkeypatch.setattr("tiny_gguf._LETTER_TOKENS", [])
    monkeypatch.setattr("tiny_gguf._BYTE_TOKENS", [])
    other = write_tiny_model(tmp_path / "other.gguf")
    message = run("--base", base, "--text", text, *QUALITY, good, other, exit_code=1).stderr
    assert "other.gguf one of 3: they are not the same model" in message
    monkeypatch.setattr("tritrun.perplexity.available_memory", lambda: 100_000)
    message = run("--base", base, "--text", text, *QUALITY, good, exit_code=1).stderr
    assert "does not fit into memory" in message


@pytest.mark.usefixtures("no_long_work")
def test_recipes_need_a_base_that_is_not_quantized(base: Path, text: Path, tmp_path: Path) -> None:
    from checkpoints import llama_quantize

    quantized = tmp_path / "quantized.gguf"
    assert llama_quantize(base, quantized, "Q8_0").returncode == 0
    message = run("--base", quantized, "--text", text, "--recipe", "Q4_K_M", exit_code=1).stderr
    assert "is Q8_0; --recipe needs a base in F16, BF16, F32" in message


def test_the_file_that_fails_is_named(base: Path, good: Path, text: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(good.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    message = run("--base", base, "--text", text, *QUALITY, "--no-speed", f"My model={damaged}", exit_code=1).stderr
    assert message.splitlines()[-1].startswith("error: My model: llama-perplexity: ")


def test_names_cannot_drive_the_terminal(base: Path, good: Path, text: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "\x1b[2J[red]x\x9b31m.gguf"
    hostile.write_bytes(good.read_bytes())
    result = run("--base", base, "--text", text, *QUALITY, "--no-speed", hostile)
    assert "[2J[red]x31m" in result.stdout
    assert not set("\x1b\x9b") & set(result.stdout + result.stderr)


def test_a_stand_in_is_what_it_stands_for(base: Path) -> None:
    file = read_model_file(base)
    about: dict[str, Value] = {STAND_IN_TYPE: "Q3_K", STAND_IN_BITS: 3.4375}
    found = contents(replace(file, metadata=file.metadata | about))
    assert found.stand_in
    assert (found.layers, found.layer_bits, found.family) == ({"Q3_K": 1.0}, 3.4375, "K-quant")
    wrong: tuple[Value, ...] = (float("nan"), -1.0, "3", True)
    for bits in wrong:
        about[STAND_IN_BITS] = bits
        assert contents(replace(file, metadata=file.metadata | about)) == contents(file)
