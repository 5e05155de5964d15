"""Models from the hub, which a local server stands in for."""

import os
import subprocess
from pathlib import Path

import hub
from checkpoints import tritconv
from gguf import GGUFReader


def _environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}


def _convert(source: str, folder: Path, env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return tritconv("hf-to-gguf", source, "--depth", 2, *options, cwd=folder, env=env)


def _fails(done: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert list(folder.iterdir()) == []


def test_a_model_of_the_hub_converts(checkpoint: Path, tmp_path: Path) -> None:
    local = tmp_path / "local.gguf"
    assert tritconv("hf-to-gguf", checkpoint, "--depth", 2, "-o", local).returncode == 0
    expected = {t.name: t.data.tobytes() for t in GGUFReader(local).tensors}

    work = tmp_path / "work"
    with hub.serve({"org/tiny": checkpoint}) as server:
        env = _environment(tmp_path / "home", server.url)
        done = _convert("org/tiny", work, env)
        assert done.returncode == 0, done.stderr
        first = len(server.requests)
        assert any(request.endswith("/model.safetensors") for request in server.requests)

        # the cache serves the second run: the weights do not travel again
        again = _convert("org/tiny", work, env, "--force", "--revision", "main")
        assert again.returncode == 0, again.stderr
        assert not any(request.startswith("GET /org") for request in server.requests[first:])

    result = GGUFReader(work / "tiny-TRIT2.gguf")
    name = result.get_field("general.name")
    assert name is not None
    assert name.contents() == "tiny"
    assert {t.name: t.data.tobytes() for t in result.tensors} == expected
    field = result.get_field("trit.source")
    assert field is not None
    assert field.contents() == "org/tiny"

    # offline, from the cache, with nobody to ask
    offline = _environment(tmp_path / "home", server.url, HF_HUB_OFFLINE="1")
    assert _convert("org/tiny", work, offline, "--force").returncode == 0


def test_gated_models_need_the_token(checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with hub.serve({"org/gated": checkpoint}, gated={"org/gated"}, token="secret") as server:
        env = _environment(tmp_path / "home", server.url)
        _fails(_convert("org/gated", work, env), work, "org/gated is gated", "HF_TOKEN")
        done = _convert("org/gated", work, env | {"HF_TOKEN": "secret"})
        assert done.returncode == 0, done.stderr


def test_unknown_id_and_revision(checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with hub.serve({"org/tiny": checkpoint}) as server:
        env = _environment(tmp_path / "home", server.url)
        _fails(_convert("org/other", work, env), work, "org/other is not on http://127.0.0.1")
        done = _convert("org/tiny", work, env, "--revision", "v9")
        _fails(done, work, "org/tiny has no revision 'v9'")


def test_no_network(tmp_path: Path) -> None:
    work = tmp_path / "work"
    env = _environment(tmp_path / "home", "http://127.0.0.1:9")  # the discard port: nobody answers
    _fails(_convert("org/tiny", work, env), work, "org/tiny is not in the cache", "network")
    _fails(_convert("org/tiny", work, env | {"HF_HUB_OFFLINE": "1"}), work, "org/tiny is not in the cache")
