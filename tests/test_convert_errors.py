"""What a user can mend: one line on stderr, exit code 1, and no file left behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import make_checkpoint
from command_line import tritconv
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    copy = tmp_path / "model"
    shutil.copytree(checkpoint, copy)
    return copy


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _fails(done: subprocess.CompletedProcess[str], *words: str, exit_code: int = 1) -> None:
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def _convert_fails(source: object, work: Path, *words: str, depth: int = 2) -> None:
    out = work / "out"
    out.mkdir()
    _fails(tritconv("hf-to-gguf", source, "--fast", "--depth", depth, "-o", out / "x.gguf"), *words)
    assert list(out.iterdir()) == []


def test_no_such_source(tmp_path: Path) -> None:
    _convert_fails("no/such/folder", tmp_path, "no/such/folder: no such folder")


def test_a_file_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    _convert_fails(folder / "config.json", tmp_path, "not a folder", "gguf-to-gguf")


def test_missing_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    _convert_fails(folder, tmp_path, f"{folder}: no config.json")


def test_config_is_no_json(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    _convert_fails(folder, tmp_path, "config.json is not valid JSON")


def test_no_weights(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    _convert_fails(folder, tmp_path, "no weights")


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000])
def test_truncated_safetensors(keep: int, folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    _convert_fails(folder, tmp_path, "model.safetensors is truncated or damaged", "download it again")


def test_corrupt_safetensors(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[20:60] = b"\xff" * 40
    file.write_bytes(data)
    _convert_fails(folder, tmp_path, "model.safetensors is truncated or damaged")


def test_missing_shard(folder: Path, tmp_path: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    weight_map = dict.fromkeys(names, "model.safetensors") | {names[0]: "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    _convert_fails(folder, tmp_path, "model-00002.safetensors")


def test_damaged_bin(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not a zip file")
    _convert_fails(folder, tmp_path, "pytorch_model.bin holds more than tensors, or is damaged")


def test_unsupported_architecture(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["NonesuchForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    _convert_fails(folder, tmp_path, "does not support NonesuchForCausalLM")


def test_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.model").unlink()
    _convert_fails(folder, tmp_path, "no tokenizer")


@pytest.mark.build
@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_not_finite(value: float, shown: str, folder: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][7, 300] = value

    _change_weights(folder, spoil)
    _convert_fails(folder, tmp_path, f"tensor blk.1.ffn_down.weight holds {shown} at [7, 300]")


@pytest.mark.build
def test_not_finite_norm(folder: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][3] = float("nan")

    _change_weights(folder, spoil)
    _convert_fails(folder, tmp_path, "tensor output_norm.weight holds nan at [3]")


@pytest.mark.parametrize("depth", [0, 5, -1])
def test_depth_out_of_range(depth: int, checkpoint: Path, tmp_path: Path) -> None:
    done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", depth, "-o", tmp_path / "x.gguf")
    _fails(done, f"--depth {depth} is out of range", exit_code=2)
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_exit_with_2(checkpoint: Path) -> None:
    assert tritconv("hf-to-gguf", checkpoint).returncode == 2
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", "two").returncode == 2
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "--embed-type", "q9").returncode == 2


@pytest.mark.build
def test_output_exists(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    _fails(tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", out), "x.gguf exists", "--force")
    assert out.read_text() == "precious"
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", out, "--force").returncode == 0
    assert out.read_bytes().startswith(b"GGUF")
    assert list(tmp_path.iterdir()) == [out]


def test_no_output_folder(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "no" / "x.gguf"
    _fails(tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", out), "does not exist")


def test_disk_full_is_seen_before(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tritconv.convert import Job, hf_to_gguf
    from tritconv.plan import Plan
    from tritcore import output
    from tritcore.errors import TritError
    from tritcore.gguf_types import TRIT_TYPE

    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    q = TRIT_TYPE[2]
    with pytest.raises(TritError, match="no space left"):
        hf_to_gguf(str(checkpoint), None, Job(Plan(2, q, q, q), tmp_path / "x.gguf"))
    assert list(tmp_path.iterdir()) == []


def test_disk_full_while_writing(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: write() fails in the middle."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    out = tmp_path / "x.gguf"
    done = checkpoints.tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", out, preexec_fn=limit)
    _fails(done, "no space left", "x.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.build
def test_interrupt(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    process = subprocess.Popen(
        [sys.executable, "-m", "tritconv", "hf-to-gguf", str(smollm2), "--fast", "--depth", "2", "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )
    deadline = time.monotonic() + 300
    while not (parts := list(tmp_path.iterdir())) or parts[0].stat().st_size == 0:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.build
def test_a_killed_conversion_leaves_nothing_in_the_way(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".x.gguf.part").write_bytes(b"GGUF of a run that was killed" * 1_000_000)
    out = tmp_path / "x.gguf"
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", out).returncode == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    _fails(tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", tmp_path / "x.gguf"), "cannot write")


@pytest.mark.build
def test_row_length_of_the_model_that_nothing_fits(tmp_path: Path) -> None:
    """Rows of 200 fit neither TRIT nor Q8_0: F16, and a line for each matrix."""
    folder = make_checkpoint(tmp_path / "odd", intermediate_size=200)
    done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 2, "-o", tmp_path / "x.gguf")
    assert done.returncode == 0, done.stderr
    assert "blk.0.ffn_down.weight is stored as F16: its rows of 200" in " ".join(done.stdout.split())
