"""tritconv with --calibrate: from a checkpoint and a text to a file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
from checkpoints import logits, make_checkpoint, tritconv
from command_line import tritconv as in_process
from gguf import GGUFReader, quants

from tritconv import effort
from tritcore import gguf_types  # noqa: F401 - gguf then knows the TRIT types

pytestmark = pytest.mark.build

PROMPT = "The assert statement"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.topics.values())[:60_000], encoding="utf-8")
    return path


def convert(source: Path, target: Path, text: Path, *options: object, cache: Path) -> str:
    """Run tritconv; return what it printed."""
    command = "gguf-to-gguf" if source.suffix == ".gguf" else "hf-to-gguf"
    run = tritconv(
        *(command, source, "--calibrate", text, "--calib-tokens", 2048, "--calib-seq", 64, "-o", target, *options),
        env=os.environ | {"TRITCONV_CACHE": str(cache)},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def field(path: Path, name: str) -> Any:
    found = GGUFReader(path).get_field(name)
    return found.contents() if found else None


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mixtral"])
def test_architectures(architecture: str, tmp_path: Path, text: Path) -> None:
    """All matrices are reached, whatever the converter does to their rows, and the file computes what it should."""
    source = make_checkpoint(tmp_path / "model", architecture)
    printed = convert(source, tmp_path / "d4.gguf", text, "--depth", 4, cache=tmp_path / "cache")
    assert "not reached" not in printed
    assert field(tmp_path / "d4.gguf", "trit.method") == "gptq"
    run = tritconv("hf-to-gguf", source, "--fast", "--depth", 4, "-o", tmp_path / "search.gguf")
    assert run.returncode == 0, run.stderr
    assert correlation(logits(tmp_path / "d4.gguf", PROMPT), logits(tmp_path / "search.gguf", PROMPT)) > 0.99
    # rows stand where they belong: calibrated weights are near the searched ones, not near those of other rows
    searched = weights(tmp_path / "search.gguf")
    for name, values in weights(tmp_path / "d4.gguf").items():
        if values.ndim > 1:
            assert correlation(values.ravel(), searched[name].ravel()) > 0.95, name


def test_gguf_source_gives_the_same(checkpoint: Path, f16_gguf: Path, tmp_path: Path, text: Path) -> None:
    convert(checkpoint, tmp_path / "hf.gguf", text, "--depth", 3, cache=tmp_path / "cache")
    convert(f16_gguf, tmp_path / "gguf.gguf", text, "--depth", 3, cache=tmp_path / "cache")
    first, second = weights(tmp_path / "hf.gguf"), weights(tmp_path / "gguf.gguf")
    assert first.keys() == second.keys()
    for name, values in first.items():
        if values.ndim > 1:
            assert correlation(values.ravel(), second[name].ravel()) > 0.98, name


def test_same_seed_same_file(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    blanked = tmp_path / "blanked.txt"
    blanked.write_text(text.read_text(encoding="utf-8").replace("expression", "<unk>"), encoding="utf-8")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert(checkpoint, tmp_path / f"{name}.gguf", blanked, "--depth", 2, "--seed", seed, cache=tmp_path / name)
    assert "rare words made up" in " ".join(field(tmp_path / "a.gguf", "trit.calibration"))
    first, second, other = ((tmp_path / f"{name}.gguf").read_bytes() for name in "abc")
    assert first == second
    assert first != other


@pytest.mark.parametrize(("method", "embeddings"), [("gptq", "q8_0"), ("gptq", "trit3"), ("tune", "trit2")])
def test_killed_and_started_again(method: str, embeddings: str, checkpoint: Path, tmp_path: Path, text: Path) -> None:
    options = ("--depth", 2, "--method", method, "--embed-type", embeddings)
    convert(checkpoint, tmp_path / "whole.gguf", text, *options, cache=tmp_path / "one")
    cache, target = tmp_path / "two", tmp_path / "resumed.gguf"
    command = [sys.executable, "-m", "tritconv", "hf-to-gguf", checkpoint, "--calibrate", text, *options]
    command += ["--calib-tokens", 2048, "--calib-seq", 64, "-o", target]
    process = subprocess.Popen(
        list(map(str, command)), env=os.environ | {"TRITCONV_CACHE": str(cache)}, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not list(cache.glob("*/layer-0000*")):
        assert process.poll() is None, "it ended before a layer was kept"
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    (layer,) = cache.glob("*/layer-0000*")
    kept = layer.stat().st_mtime_ns
    convert(checkpoint, target, text, *options, cache=cache)
    assert layer.stat().st_mtime_ns == kept, "the layer was made again"
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("method", ["gptq", "tune"])
def test_text_that_the_model_writes(method: str, checkpoint: Path, tmp_path: Path, text: Path) -> None:
    options = ("--depth", 2, "--method", method)
    convert(checkpoint, tmp_path / "without.gguf", text, *options, cache=tmp_path / "cache")
    for name in ("a", "b"):
        convert(checkpoint, tmp_path / f"{name}.gguf", text, *options, "--calib-own", 1000, cache=tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "without.gguf").read_bytes()
    description = field(tmp_path / "a.gguf", "trit.calibration")
    assert "16 that the model wrote" in description
    assert "32 sequences of 64 tokens" in description


def test_the_text_of_tritconv_besides(checkpoint: Path, tmp_path: Path, text: Path) -> None:
    target = tmp_path / "both.gguf"
    printed = convert(checkpoint, target, text, "--depth", 2, "--calib-bundled", 1000, cache=tmp_path / "cache")
    assert "gptq on 3,048 tokens" in " ".join(printed.split())
    description = field(target, "trit.calibration")
    assert description[:2] == ["topics.txt", "the text of tritconv"]
    assert "47 sequences of 64 tokens" in description  # 32 of the one, 15 of the other


def test_a_text_is_taken_as_far_as_an_hour_allows(
    checkpoint: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "_AFFORDABLE", 0.0)
    options = ("--depth", 2, "--calibrate", text, "--calib-seq", 64, "--embed-type", "q8_0", "--force")

    def said(*more: object) -> str:
        done = in_process("hf-to-gguf", checkpoint, *options, *more, "-o", tmp_path / "x.gguf")
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "not by gptq on 262,144 tokens" in said()
    assert "gptq on 16,384 tokens" in said()
    assert "not by" not in said("--calib-tokens", 2048)
    assert "not by" not in said("--method", "gptq", "--calib-tokens", 2048)


def test_experts_without_tokens_go_by_the_search(tmp_path: Path, text: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "Mixtral", num_local_experts=4, num_experts_per_tok=1)
    printed = convert(source, tmp_path / "m.gguf", text, "--depth", 2, "--calib-tokens", 256, cache=tmp_path / "cache")
    assert "weighted search" in " ".join(printed.split())
    assert np.isfinite(logits(tmp_path / "m.gguf", PROMPT)).all()


def test_messages_need_a_chat_template(checkpoint: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}), encoding="utf-8")
    run = tritconv("hf-to-gguf", checkpoint, "--depth", 2, "--calibrate", chat, "-o", tmp_path / "x.gguf")
    assert run.returncode == 1
    assert "no chat template" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(
    ("options", "exit_code", "reason"),
    [
        (["--fast", "--calibrate", __file__], 2, "--fast is plain search"),
        (["--fast", "--method", "gptq"], 2, "--fast is plain search"),
        (["--fast", "--memory", "1GB"], 2, "--memory is for calibrations"),
        (["--calib-bundled", "512"], 2, "--calib-bundled adds to a text of yours"),
        (["--calibrate", "nowhere.txt"], 1, "no such file"),
        (["--calibrate", __file__, "--imatrix", "x"], 2, "leave one of them out"),
        (["--calibrate", __file__, "--method", "uniform"], 2, "does not use --calibrate"),
    ],
)
def test_options_that_do_not_go_together(
    checkpoint: Path, tmp_path: Path, options: list[str], exit_code: int, reason: str
) -> None:
    run = tritconv("hf-to-gguf", checkpoint, "--depth", 2, "-o", tmp_path / "x.gguf", *options)
    assert run.returncode == exit_code
    assert reason in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
