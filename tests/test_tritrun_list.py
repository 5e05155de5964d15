"""tritrun list: the models in folders and in the cache of the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
from gguf import GGUFValueType
from huggingface_hub import constants
from tiny_gguf import bare_gguf, entry, u32_entry, write_tiny_model
from typer.testing import CliRunner, Result

from tritcore.reference import find_model
from tritrun.cli import app


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to work in, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")


def run(*arguments: object, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["list", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result


def listed(*folders: object) -> dict[str, dict[str, Any]]:
    """What --json says of each model, by what chat takes for it."""
    models = json.loads(run(*folders, "--json", "-").stdout)
    assert all(find_model(one["model"]).samefile(one["path"]) for one in models)
    return {one.pop("model"): one for one in models}


def test_models_of_the_folders(tiny_model: Path) -> None:
    shutil.copy(tiny_model, "here.gguf")
    shutil.copy(tiny_model, "models/there.gguf")
    Path("models/again.gguf").symlink_to(Path("here.gguf").resolve())
    assert listed() == {
        name: {
            "path": name,
            "architecture": "llama",
            "type": "F16",
            "bytes": tiny_model.stat().st_size,
            "bits_per_weight": pytest.approx(16, rel=0.1),
            "problem": None,
        }
        for name in ("here.gguf", "models/there.gguf")
    }
    table = run().stdout
    assert "models/there.gguf" in table
    assert "16.0" in table
    assert "again" not in table


def test_other_folders_in_the_place_of_these(tiny_model: Path) -> None:
    shutil.copy(tiny_model, "here.gguf")
    Path("other").mkdir()
    shutil.copy(tiny_model, "other/one.gguf")
    assert list(listed("other")) == ["other/one.gguf"]
    result = run("none", exit_code=1)
    assert (result.stdout, result.stderr) == ("", "error: none: cannot be read: No such file or directory\n")


def test_damaged_files_have_a_reason(tiny_model: Path) -> None:
    Path("a.gguf").write_bytes(tiny_model.read_bytes()[:5000])
    Path("b.gguf").write_bytes(b"no model")
    Path("c.gguf").write_bytes(bare_gguf([entry("general.type", GGUFValueType.STRING, "imatrix")], []))
    shutil.copy(tiny_model, "d.gguf")
    problems = {name: one["problem"] for name, one in listed().items()}
    assert problems["a.gguf"].startswith("truncated")
    assert problems["b.gguf"].startswith("not a GGUF file")
    assert "importance matrix" in problems["c.gguf"]
    assert problems["d.gguf"] is None
    table = run().stdout
    assert table.index("truncated") < table.index("importance matrix") < table.index("d.gguf")


def test_a_split_model_is_one_line() -> None:
    for number in (1, 2):
        entries = [u32_entry("split.count", 2), u32_entry("split.no", number - 1)]
        Path(f"big-{number:05}-of-00002.gguf").write_bytes(bare_gguf(entries, []))
    Path("half-00002-of-00002.gguf").write_bytes(Path("big-00002-of-00002.gguf").read_bytes())
    found = listed()
    assert list(found) == ["big-00001-of-00002.gguf", "half-00002-of-00002.gguf"]
    assert "half-00001-of-00002.gguf is not beside it" in found["half-00002-of-00002.gguf"]["problem"]


def test_models_of_the_cache(ask: Callable[[hub.Hub], None], tmp_path: Path) -> None:
    folder, pushed = tmp_path / "repository", tmp_path / "pushed"
    for place in (folder, pushed):
        place.mkdir()
        write_tiny_model(place / "tiny-F16.gguf", seed=int(place == pushed))
        write_tiny_model(place / "tiny-none.gguf", seed=2)
    with hub.serve({"org/tiny": folder}) as server:
        ask(server)
        find_model("org/tiny:F16")
        find_model("org/tiny/tiny-none.gguf")
        assert list(listed()) == ["org/tiny:F16", "org/tiny/tiny-none.gguf"]

        # main has moved on: what it was is there too, what has not changed only once
        server.push("org/tiny", pushed)
        find_model("org/tiny:F16")
        find_model("org/tiny/tiny-none.gguf")
        assert list(listed()) == ["org/tiny:F16", "org/tiny/tiny-none.gguf", f"org/tiny:F16@{hub.COMMIT}"]


def test_names_cannot_drive_the_terminal(tiny_model: Path) -> None:
    shutil.copy(tiny_model, "\x1b[2J[red]x.gguf")
    assert "[2J[red]x.gguf" in run().stdout
    assert "\x1b" not in run().stdout


def test_the_list_as_a_file(tiny_model: Path) -> None:
    shutil.copy(tiny_model, "here.gguf")
    assert "here.gguf" in run("--json", "list.json").stdout
    assert json.loads(Path("list.json").read_text())[0]["model"] == "here.gguf"
    assert "no folder" in run("--json", "none/list.json", exit_code=1).stderr
