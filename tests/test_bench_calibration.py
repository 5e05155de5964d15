"""bench/: checkpoints of large shapes, and the time and memory of calibrations."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tritconv
from safetensors.torch import load_file

import calibration
import large_checkpoint
from large_checkpoint import PRESETS, Shape, write_checkpoint
from tritcore.errors import TritError

SHAPE = Shape(192, 320, 3, 1, vocabulary=2100, layers=2)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the index; each shard must hold what the index says."""
    places: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in set(places.values())}
    assert {name for shard in shards.values() for name in shard} == places.keys()
    assert sorted(shards) == sorted(path.name for path in folder.glob("*.safetensors"))
    return {name: shards[place][name] for name, place in places.items()}


def test_checkpoints_have_the_shape_and_outliers(tmp_path: Path) -> None:
    found = weights(write_checkpoint(tmp_path / "model", SHAPE, shard_bytes=10**6))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert found["model.layers.1.self_attn.k_proj.weight"].shape == (64, 192)
    assert found["model.layers.1.mlp.down_proj.weight"].shape == (192, 320)
    assert found["lm_head.weight"].shape == found["model.embed_tokens.weight"].shape == (2100, 192)
    embeddings = found.pop("model.embed_tokens.weight")
    assert embeddings[: large_checkpoint.PIECES].count_nonzero(1).min() > 0
    assert not embeddings[large_checkpoint.PIECES :].any()
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name
        assert (tensor.count_nonzero() / tensor.numel()) > 0.99, name
    columns = torch.cat([t.float().square().mean(0).sqrt() for n, t in found.items() if n.endswith("down_proj.weight")])
    usual = columns.median()
    assert usual == pytest.approx(320**-0.5, rel=0.2)
    norms = torch.cat([tensor.float() for name, tensor in found.items() if "norm" in name])
    assert set(norms.unique().tolist()) == {1.0, 8.0}


def test_presets_are_the_models_and_sizes_can_be_changed() -> None:
    def n_weights(shape: Shape) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in shape.tensors())

    assert n_weights(PRESETS["qwen2.5-0.5b"]) == 494032768  # as its model card has it: 0.49 billion
    assert n_weights(PRESETS["qwen2.5-32b"]) == 32763876352  # 32.5 billion
    options = large_checkpoint.parse(["--preset", "qwen2.5-0.5b", "--layers", "3", "--no-tied", "-o", "x"])
    assert options.shape == replace(PRESETS["qwen2.5-0.5b"], layers=3, tied=False)
    with pytest.raises(SystemExit):
        large_checkpoint.parse(["--shard-size", "large", "-o", "x"])


def test_checkpoints_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(TritError, match=r"exists: delete it"):
        write_checkpoint(tmp_path, SHAPE)
    with pytest.raises(TritError, match=r"192, 5 heads"):
        write_checkpoint(tmp_path / "model", replace(SHAPE, heads=5))
    (tmp_path / "file").write_text("")
    with pytest.raises(TritError, match=r"choose another folder"):
        write_checkpoint(tmp_path / "file" / "model", SHAPE)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_seed_gives_the_same_checkpoint(tmp_path: Path) -> None:
    a, b, other = (weights(write_checkpoint(tmp_path / str(i), SHAPE, seed)) for i, seed in enumerate((1, 1, 2)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(a[name], b[name])
    assert not torch.equal(a[name], other[name])


@pytest.mark.build
def test_checkpoints_convert_and_their_activations_are_finite(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_checkpoint(tmp_path / "model", SHAPE)
    tokens = AutoTokenizer.from_pretrained(folder)("any text", return_tensors="pt").input_ids
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert logits.shape[-1] == SHAPE.vocabulary
    assert 1 < logits.std() < 10
    done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 2, "-o", tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr
    assert "TRIT2" in done.stdout


def test_time_and_memory_are_those_of_the_child(tmp_path: Path) -> None:
    script = "import pathlib, time; x = bytearray(400 << 20); time.sleep(0.2); pathlib.Path('out').write_text('done')"
    done = calibration.measure([sys.executable, "-c", script], os.environ, tmp_path, tmp_path / "out")
    assert 0.2 < done.wall < 30
    assert 400 << 20 < done.peak < 1000 << 20
    assert done.cpu < done.wall + 1
    assert done.digest == calibration.sha256(tmp_path / "out")
    with pytest.raises(TritError, match=r"exit code 3: it failed$"):
        calibration.measure(
            [sys.executable, "-c", "print('it failed'); raise SystemExit(3)"], os.environ, tmp_path, tmp_path / "out"
        )


def test_cpu_time_is_that_of_all_processes(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "stat").write_text("cpu  100 200 300 9999 8888 1 2 3 50 0\ncpu0 1 2 3\n")
    assert calibration.busy_seconds(tmp_path) * os.sysconf("SC_CLK_TCK") == pytest.approx(606)


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter((0.0, 0.0, 0.5, 1.5))
    monkeypatch.setattr(calibration, "busy_seconds", lambda: next(used))
    calibration.wait_until_quiet(patience=0, sample=0.01)
    processes = iter(({(7, "loud"): 1.0, (8, "idle"): 1.0}, {(7, "loud"): 2.0, (8, "idle"): 1.0}))
    monkeypatch.setattr(calibration, "_cpu_of_processes", lambda: next(processes))
    with pytest.raises(TritError, match=r"use 100\.0 cores \(loud\)"):
        calibration.wait_until_quiet(patience=0, sample=0.01)


def test_packages_of_a_revision_are_imported_in_place_of_these(tmp_path: Path) -> None:
    if subprocess.run(["git", "-C", str(calibration.ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not in git")
    revision = calibration.extract("HEAD", tmp_path / "other")
    (tmp_path / "empty").mkdir()
    code = "import tritconv; print(tritconv.__file__)"
    environment = os.environ | {"PYTHONPATH": revision.path}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == tmp_path / "other" / "convert" / "tritconv" / "__init__.py"
    with pytest.raises(TritError, match=r"--against none-such: git does not give"):
        calibration.extract("none-such", tmp_path / "none")


def run(wall: float, peak: float, digest: str = "a") -> calibration.Run:
    """A run with a CPU time of twice its wall time; `peak` in GiB."""
    return calibration.Run(wall, 2 * wall, int(peak * 2**30), 0.01, digest)


def test_the_table_has_medians_all_runs_and_ratios(tmp_path: Path) -> None:
    case = calibration.Case("model", "hf-to-gguf", tmp_path, 1024)
    runs = {(case, "new"): [run(4, 1), run(5, 2), run(90, 1)], (case, "old"): [run(10, 4), run(10, 4, "b")]}
    *_, new, old, ratio = calibration._table([case], ["new", "old"], runs).splitlines()
    assert new == (
        "| model | 1024 | new | 5.0 (4.0, 5.0, 90.0) | 10.0 (8.0, 10.0, 180.0) | 1.00 (1.00, 2.00, 1.00) "
        "| 0.01 at most | yes |"
    )
    assert old.endswith("| no |")
    assert ratio == "| model | 1024 | ratio | 0.50 | 0.50 | 0.25 |  |  |"


def test_the_time_of_a_whole_model_is_extrapolated() -> None:
    last = calibration._large_table({3: run(100, 10), 6: run(160, 10.5)}, whole=64).splitlines()[-1]
    assert last == "20.0 s for each layer more; 64 layers: 0.37 hours; peak with 6 layers / with 3: 1.050"
    assert len(calibration._large_table({3: run(100, 10)}, whole=64).splitlines()) == 3


def test_revisions_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text"
    text.write_text("text")
    order = []

    def convert(
        case: calibration.Case, revision: calibration.Revision, options: object, target: Path
    ) -> calibration.Run:
        order.append((case.tokens, revision.name, revision.options))
        return run(1, 1)

    monkeypatch.setattr(calibration, "convert", convert)
    monkeypatch.setattr(calibration, "_make_checkpoint", lambda folder, shape: folder)
    monkeypatch.setattr(calibration, "extract", lambda name, folder: calibration.Revision(name, ""))
    arguments = ["--text", str(text), "-o", str(tmp_path / "out"), "--models", "qwen2.5-0.5b", "--against", "old"]
    calibration.report(calibration.parse([*arguments, "--runs", "2", "--tokens", "512", "--options=--memory 4GB"]))
    here, other = ("this tree", ("--memory", "4GB")), ("old", ())
    assert order == [(512, *here), (512, *other), (512, *other), (512, *here)]
    figures = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [len(case["runs"]) for case in figures["cases"]] == [2, 2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["calibration.json"]
    assert "| ratio | 1.00 |" in capsys.readouterr().out
    with pytest.raises(TritError, match="no such file"):
        calibration.report(calibration.parse(["--text", str(tmp_path / "none")]))


@pytest.mark.build
@pytest.mark.slow
def test_a_quick_run_measures_this_tree(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 400)
    arguments = ["--text", str(text), "--quick", "--busy", "--large", "-o", str(tmp_path / "out")]
    calibration.report(calibration.parse(arguments))
    figures = json.loads((tmp_path / "out" / "large.json").read_text())
    assert figures["layers"].keys() == {"1", "2"}
    assert all(done["peak"] > 10**8 and done["cpu"] > 0 for done in figures["layers"].values())
    assert "for each layer more" in capsys.readouterr().out
