"""tritrun's command line: help, version, usage errors, and models that are refused before they are loaded."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tritcore.console import error
from tritrun.cli import app


def run(*arguments: object, exit_code: int) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, result.output
    return result


def test_version() -> None:
    assert run("--version", exit_code=0).stdout.startswith("tritrun ")


@pytest.mark.parametrize("command", ["chat", "perplexity", "bench"])
def test_help_has_examples(command: str) -> None:
    text = run(command, "--help", exit_code=0).stdout
    assert f"tritrun {command} model-TRIT" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat"],
        ["chat", "m.gguf", "--temp", "-1"],
        ["chat", "m.gguf", "--top-p", "1.5"],
        ["chat", "m.gguf", "--threads", "0"],
        ["perplexity", "m.gguf"],
        ["perplexity", "m.gguf", "--file", "t", "--ctx", "8"],
        ["bench"],
        ["bake"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    run(*arguments, exit_code=2)


@pytest.mark.parametrize("command", [["chat", "--prompt", "x"], ["perplexity", "--file", "x"], ["bench"]])
def test_missing_model(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    result = run(*command, path, exit_code=1)
    assert (result.stdout, result.stderr) == ("", f"error: {path}: no such file\n")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["chat", "--prompt", "x"], marks=pytest.mark.build),
        ["bench"],
        ["perplexity", "--file", __file__],
    ],
)
def test_model_that_does_not_fit(command: list[str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("loading", "perplexity"):
        monkeypatch.setattr(f"tritrun.{module}.available_memory", lambda: 100_000)
    message = run(*command, tiny_model, exit_code=1).stderr
    assert "does not fit into memory" in message
    assert "100.0 kB are free" in message
    assert message.count("\n") == 1


def test_names_from_a_file_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error("tensor '\x1b[2J\x9b31m[red]x'\nsecond line")
    assert capsys.readouterr().err == "error: tensor '[2J31m[red]x' second line\n"
