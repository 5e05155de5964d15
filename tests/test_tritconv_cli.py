"""tritconv's command line: help, version, start-up, default names."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from typer.main import get_command
from typer.testing import CliRunner

from tritconv.cli import ConversionOptions, app
from tritconv.convert import Job, gguf_to_gguf
from tritconv.plan import Plan


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("tritconv ")


@pytest.mark.parametrize("command", ["hf-to-gguf", "gguf-to-gguf", "inspect"])
def test_help_has_examples(command: str) -> None:
    assert f"tritconv {command} " in CliRunner().invoke(app, [command, "--help"]).stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, tritconv.cli, tritconv.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_both_conversions_have_the_shared_options() -> None:
    shared = {field.name for field in fields(ConversionOptions)}
    commands = get_command(app).commands  # type: ignore[attr-defined]
    own = {name: {one.name for one in commands[name].params} - shared - {"help"} for name in commands}
    assert own["hf-to-gguf"] == {"source", "revision", "pre", "trust_remote_code"}
    assert own["gguf-to-gguf"] == {"source"}
    for name in ("hf-to-gguf", "gguf-to-gguf"):
        assert shared <= {one.name for one in commands[name].params}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--memory", "1GB", "--method", "uniform"], "--memory is for calibrations"),
        (["--memory", "much", "--calibrate", __file__], "--memory much is no size"),
    ],
)
def test_memory_that_makes_no_sense(options: list[str], reason: str) -> None:
    run = CliRunner().invoke(app, ["gguf-to-gguf", "no.gguf", "-d", "2", *options])
    assert run.exit_code == 2
    assert reason in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.build
@pytest.mark.parametrize("stem", ["tiny", "tiny-F16", "tiny.Q4_K_M", "tiny-IQ3_S", "tiny-TRIT4"])
def test_default_name(stem: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / f"{stem}.gguf"
    source.write_bytes(tiny_model.read_bytes())
    monkeypatch.chdir(tmp_path)
    written = gguf_to_gguf(source, Job(Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)))
    assert written is not None
    assert written.path == Path("tiny-TRIT2.gguf")
