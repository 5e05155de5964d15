"""tritconv's command line: help, version, start-up, default names."""

import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type
from typer.testing import CliRunner

from tritconv.cli import app
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


@pytest.mark.build
@pytest.mark.parametrize("stem", ["tiny", "tiny-F16", "tiny.Q4_K_M", "tiny-IQ3_S", "tiny-TRIT4"])
def test_default_name(stem: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / f"{stem}.gguf"
    source.write_bytes(tiny_model.read_bytes())
    monkeypatch.chdir(tmp_path)
    written = gguf_to_gguf(source, Job(Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)))
    assert written.path == Path("tiny-TRIT2.gguf")
