"""bench/: the random models, the arithmetic of the report, the chart, and short runs of both commands."""

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from checkpoints import logits

import contestants
import engine
import micro
import results
import speed
from chart import draw
from command import exit_status
from random_model import Shape, write_random_model
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritrun import variants
from tritrun.bench import BenchRun
from tritrun.tools import find_tool

LLAMA = Shape("llama", 256, 512, layers=2, heads=4, kv_heads=4, vocabulary=300, tied=False)
QWEN2 = Shape("qwen2", 192, 320, layers=1, heads=3, kv_heads=1, vocabulary=300, tied=True)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget afterwards which variant the commands forced."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.build
@pytest.mark.parametrize("shape", [LLAMA, QWEN2], ids=lambda shape: shape.architecture)
def test_random_models_run(shape: Shape, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", shape)
    assert list(tmp_path.iterdir()) == [path]
    shapes = {tensor.name: tensor.shape for tensor in read_model_file(path).tensors}
    head = shape.hidden // shape.heads
    assert shapes["token_embd.weight"] == (shape.hidden, shape.vocabulary)
    assert shapes["blk.0.attn_k.weight"] == (shape.hidden, head * shape.kv_heads)
    assert shapes["blk.0.ffn_down.weight"] == (shape.feed_forward, shape.hidden)
    assert ("output.weight" in shapes) is not shape.tied
    assert f"blk.{shape.layers}.attn_norm.weight" not in shapes
    values = logits(path, "any text")
    assert values.shape == (shape.vocabulary,)
    assert 0.1 < values.std() < 10


def test_a_seed_gives_the_same_model(tmp_path: Path) -> None:
    a, b, other = (write_random_model(tmp_path / f"{i}", QWEN2, seed) for i, seed in enumerate((1, 1, 2)))
    assert a.read_bytes() == b.read_bytes() != other.read_bytes()


@pytest.mark.build
def test_files_are_made_once_and_say_what_they_hold(tmp_path: Path) -> None:
    model = contestants.Model("tiny", "tiny", lambda path: write_random_model(path, QWEN2))
    types = [contestants.TYPES[name] for name in ("TRIT2", "Q4_K", "Q3_K_M")]
    first = contestants.prepare(model, types, tmp_path / "tiny", 1)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    assert len(times) == 4  # the base too; no temporary files
    assert contestants.prepare(model, types, tmp_path / "tiny", 1) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()} == times

    ours, fallback, mixture = first
    assert ours.contents == {"TRIT2": 1.0}
    assert ours.bits_per_weight == 3.5
    assert fallback.contents == {"Q5_0": 1.0}  # rows of 192 and 320 are no multiples of 256
    assert fallback.bits_per_weight == 5.5
    assert "Q4_0" in mixture.contents
    for contestant in first:
        (embedding,) = (tensor for tensor in contestant.file.tensors if tensor.name == "token_embd.weight")
        assert embedding.type.name == "Q8_0"


@pytest.mark.build
def test_every_type_is_what_its_name_says(tmp_path: Path) -> None:
    model = contestants.Model("tiny", "tiny", lambda path: write_random_model(path, LLAMA))
    for contestant in contestants.prepare(model, contestants.TYPES.values(), tmp_path, 1):
        if contestants.TYPES[contestant.type].pure:
            assert contestant.contents == {contestant.type: 1.0}
        else:
            assert contestant.type.removesuffix("_M") in contestant.contents


@pytest.mark.build
def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    model = contestants.Model("broken", "broken", lambda path: path.write_bytes(b"GGUF"))
    with pytest.raises(TritError, match=r"TRIT2.*llama-quantize"):
        contestants.prepare(model, [contestants.TYPES["TRIT2"]], tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["F16.gguf"]


@pytest.mark.build
def test_an_unknown_variant(tmp_path: Path) -> None:
    with pytest.raises(TritError, match="none-such"):
        speed.report(speed.parse(["--quick", "--cpu", "none-such", "-o", str(tmp_path)]))
    with pytest.raises(TritError, match="none-such"):
        micro.report(micro.parse(["--cpu", "none-such"]))


def _run(speeds: dict[str, list[float]], cpu: str = variants.NATIVE, model: str = "llama-1b") -> results.Run:
    """A run whose decode speeds are `speeds` and whose prompt speeds are ten times that."""
    files = {name: {"n_bytes": 1, "bits_per_weight": 2.0 + i, "contents": {name: 1.0}} for i, name in enumerate(speeds)}
    rounds = [
        {
            "bandwidth": 1e9,
            "speeds": {n: {"decode": value, "prompt": 10 * value} for n, value in zip(speeds, values, strict=True)},
        }
        for values in zip(*speeds.values(), strict=True)
    ]
    return results.Run(results.Settings(model, cpu, 512, 64, 2, "key", {}), "commit", files, rounds)


def test_ratios_are_taken_within_rounds() -> None:
    # The machine halves its speed after the first round; the ratio of the medians would be 1.5.
    run = _run({"TRIT2": [40, 30, 15], "Q4_K": [20, 15, 30]})
    assert run.speed("TRIT2", "decode") == (30, 15, 40)
    assert run.ratio("TRIT2", "Q4_K", "prompt") == (2, 0.5, 2)
    assert run.ratio("TRIT2", "Q4_K", "prompt").format(1) == "2.0 (0.5 - 2.0)"


@pytest.mark.parametrize(
    ("ratio", "model", "avx512", "expected"),
    [
        (1.10, "llama-1b", True, results.Verdict.MET),
        (1.09, "llama-1b", True, results.Verdict.MISSED),
        (1.09, "llama-1b", False, results.Verdict.BAR_MET),
        (0.98, "llama-1b", False, results.Verdict.MISSED),
        (1.20, "llama-1b", False, results.Verdict.MET),
        (9.99, "smollm2-135m", True, results.Verdict.NO_TARGET),
    ],
)
def test_verdicts(ratio: float, model: str, avx512: bool, expected: results.Verdict) -> None:
    target = results.Target("decode", "TRIT2", "Q4_K", 1.10)
    assert results.verdict(ratio, target, model, avx512) is expected


def test_targets_name_what_exists() -> None:
    for target in results.TARGETS:
        assert {target.ours, target.peer} <= contestants.TYPES.keys()
        assert set(target.models) <= contestants.MODELS.keys()
        assert target.phase in results.PHASES


def test_earlier_rounds_count_where_they_are_comparable(tmp_path: Path) -> None:
    path, run = tmp_path / "report.json", _run({"TRIT2": [1, 2], "Q4_K": [3, 4]})
    assert results.read_rounds(path, run.settings, run.files) == []
    path.write_text(run.as_json())
    assert results.read_rounds(path, run.settings, run.files) == run.rounds
    assert results.read_rounds(path, run.settings, {"Q4_K": run.files["Q4_K"]}) == run.rounds
    assert results.read_rounds(path, run.settings, run.files | {"Q8_0": {}}) == []
    assert results.read_rounds(path, _run({"TRIT2": [1]}, cpu="haswell").settings, run.files) == []
    path.write_text("[]")
    assert results.read_rounds(path, run.settings, run.files) == []


def test_the_chart_has_a_labelled_point_for_each_type() -> None:
    names = {name: [float(i + 1), float(i + 2)] for i, name in enumerate(contestants.TYPES)}
    root = ElementTree.fromstring(draw("a & <b>", [_run(names), _run(names, cpu="haswell")]))
    svg = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{svg}circle")) == 4 * len(names)
    assert len(root.findall(f".//{svg}circle[@class='ours']")) == 4 * 4
    labels = [text.text for text in root.iter(f"{svg}text")]
    assert all(labels.count(name) == 4 for name in names)
    assert root.findtext(f"{svg}title") == "a & <b>"
    width, height = float(root.attrib["width"]) / 2, float(root.attrib["height"]) / 2
    for circle in root.iter(f"{svg}circle"):
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height


@pytest.mark.build
def test_speed_measures_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = contestants.Model("tiny", "a tiny model", lambda path: write_random_model(path, LLAMA))
    monkeypatch.setitem(contestants.MODELS, "tiny", tiny)
    words = ["--models", "tiny", "--types", "TRIT2,Q4_K,Q3_K", "-p", "8", "-n", "2", "-t", "1"]
    words += ["-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    speed.report(speed.parse([*words, "--rounds", "1"]))
    report = tmp_path / "out" / f"speed-tiny-{variants.in_use()}.json"
    (first,) = json.loads(report.read_text())["rounds"]
    speed.report(speed.parse([*words, "--rounds", "2"]))
    saved = json.loads(report.read_text())
    assert saved["rounds"][0] == first
    assert [list(one["speeds"]) for one in saved["rounds"]] == [["TRIT2", "Q4_K", "Q3_K"], ["Q4_K", "Q3_K", "TRIT2"]]
    assert all(1e8 < one["bandwidth"] < 1e13 for one in saved["rounds"])
    figures = [value for one in saved["rounds"] for speeds in one["speeds"].values() for value in speeds.values()]
    assert len(figures) == 2 * 3 * 2
    assert min(figures) > 0
    assert saved["medians"]["Q4_K"]["decode"] == np.median([one["speeds"]["Q4_K"]["decode"] for one in saved["rounds"]])
    ElementTree.parse(tmp_path / "out" / "speed-tiny.svg")
    printed = capsys.readouterr().out
    assert "decode TRIT2 / Q3_K" in printed
    assert "GB/s" in printed


@pytest.mark.build
def test_another_engine_in_the_same_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        contestants.MODELS, "tiny", contestants.Model("tiny", "tiny", lambda path: write_random_model(path, LLAMA))
    )
    model = write_random_model(tmp_path / "other.gguf", LLAMA)
    words = ["--models", "tiny", "--types", "TRIT2", "-p", "8", "-n", "2", "-t", "1", "--rounds", "2"]
    words += ["-o", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    words += ["--engine", f"fork F16={find_tool('llama-bench')} -m {model} -ngl 0"]
    speed.report(speed.parse(words))
    saved = json.loads((tmp_path / "out" / f"speed-tiny-{variants.in_use()}.json").read_text())
    assert [list(one["speeds"]) for one in saved["rounds"]] == [["TRIT2", "fork F16"], ["fork F16", "TRIT2"]]
    assert all(one["speeds"]["fork F16"]["prompt"] > 0 for one in saved["rounds"])
    assert "fork F16" in capsys.readouterr().out

    broken = engine.parse(f"fork={find_tool('llama-bench')} -m {tmp_path / 'missing.gguf'}")
    with pytest.raises(TritError, match="fork"):
        broken.measure(BenchRun(8, 2, 1, 1, cpu_only=True))


@pytest.mark.parametrize(
    "text", ["a fork", "=true -m x", "fork=true x", "fork=true -m", "fork=no-such-program -m x", "TRIT2=true -m x y"]
)
def test_wrong_engines(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        speed.parse(["--engine", text])
    assert stop.value.code == 2
    assert "--engine" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--types", "Q9_K"], ["--models", "gpt"], ["--rounds", "0"], ["--threads", "-1"]])
def test_wrong_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        speed.parse(words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.build
def test_micro_measures_every_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "micro.json"
    words = ["--types", "TRIT2,Q4_0,Q4_K", "--rounds", "2", "--milliseconds", "1", "--columns", "128", "-o", str(path)]
    micro.report(micro.parse(words))
    samples = json.loads(path.read_text())["samples"]
    assert all(0 < sample["cycles"] < 1e4 for sample in samples)
    plain = {(s["type"], s["kernel"], s["n"], s["rows"]) for s in samples if s["buffer"] == "plain"}
    assert len(plain) == 2 * (2 + 2 * 2)  # Q4_K needs rows of 256
    assert {sample["type"] for sample in samples} == {"TRIT2", "Q4_0"}
    assert len(samples) == 2 * len(
        {tuple(s[key] for key in ("type", "kernel", "buffer", "n", "rows")) for s in samples}
    )
    assert "mul_mat, n = 512" in capsys.readouterr().out


def test_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise TritError("what\nand how")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert exit_status(lambda: None) == 0
    assert exit_status(fail) == 1
    assert "error: what and how" in capsys.readouterr().err
    assert exit_status(interrupt) == 130
