"""Models from the hub, which a local server stands in for."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hub
import pytest
from checkpoints import tritconv
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from tritconv.sources.checkpoint import find_checkpoint
from tritconv.sources.foreign_code import trusted
from tritconv.sources.hub import download
from tritconv.sources.weight_files import indexed
from tritconv.sources.weights import read_weights
from tritcore.errors import TritError


def _environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", **more}


def _convert(source: str, folder: Path, env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    return tritconv("hf-to-gguf", source, "--fast", "--depth", 2, *options, cwd=folder, env=env)


def _fails(done: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert list(folder.iterdir()) == []


def _text(file: GGUFReader, key: str) -> str:
    field = file.get_field(key)
    assert field is not None
    return field.contents()


def _copy(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def _shard(folder: Path, *names: str) -> None:
    """Spread the weights over files of these names, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {tensor: names[i % len(names)] for i, tensor in enumerate(sorted(weights))}
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({t: weights[t] for t in weights if weight_map[t] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.build
def test_a_model_of_the_hub_converts(checkpoint: Path, tmp_path: Path) -> None:
    local = tmp_path / "local.gguf"
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", local).returncode == 0
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
    assert _text(result, "trit.source") == "org/tiny"
    assert _text(result, "trit.revision") == hub.COMMIT

    # offline, from the cache, with nobody to ask
    offline = _environment(tmp_path / "home", server.url, HF_HUB_OFFLINE="1")
    assert _convert("org/tiny", work, offline, "--force").returncode == 0


@pytest.mark.build
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


def test_a_push_in_the_middle_mixes_no_commits(
    checkpoint: Path, ask: Callable[[hub.Hub], None], tmp_path: Path
) -> None:
    first, pushed = _copy(checkpoint, tmp_path / "first"), _copy(checkpoint, tmp_path / "pushed")
    weights = {name: -values for name, values in load_file(pushed / "model.safetensors").items()}
    save_file(weights, pushed / "model.safetensors", {"format": "pt"})
    for folder in (first, pushed):
        _shard(folder, "one.safetensors", "two.safetensors")

    with hub.serve({"org/tiny": first}) as server:
        ask(server)

        def push(path: str) -> None:
            if path.endswith("/model.safetensors.index.json"):
                server.push("org/tiny", pushed)

        server.after_request = push
        found = download("org/tiny", None)
        assert found.name == hub.COMMIT
        assert (found / "two.safetensors").read_bytes() == (first / "two.safetensors").read_bytes()

        # the branch has moved on, and a commit can be named
        found = download("org/tiny", "main")
        assert found.name == hub.NEXT_COMMIT
        assert (found / "two.safetensors").read_bytes() == (pushed / "two.safetensors").read_bytes()
        assert download("org/tiny", hub.COMMIT).name == hub.COMMIT


def test_shards_of_any_name_that_the_index_lists(
    checkpoint: Path, ask: Callable[[hub.Hub], None], tmp_path: Path
) -> None:
    folder = _copy(checkpoint, tmp_path / "model")
    _shard(folder, "weights [1].safetensors", "more/part-b.safetensors")
    save_file({}, folder / "unlisted.safetensors")
    with hub.serve({"org/tiny": folder}) as server:
        ask(server)
        found = find_checkpoint("org/tiny")
        assert set(read_weights(found)) == set(load_file(checkpoint / "model.safetensors"))
        assert not any("unlisted" in request for request in server.requests)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b", "C:\\b"])
def test_an_index_that_reaches_out_of_the_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(TritError, match="outside of the checkpoint"):
        indexed(index)


def _only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def _only_consolidated(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def _only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tiny-Q8_0.gguf")


def _nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_only_adapter, "adapter.*merge"),
        (_only_consolidated, "consolidated"),
        (_only_gguf, "GGUF.*gguf-to-gguf"),
        (_nothing, "no weights"),
    ],
)
def test_what_has_no_weights_to_convert(
    change: Callable[[Path], None], words: str, checkpoint: Path, ask: Callable[[hub.Hub], None], tmp_path: Path
) -> None:
    folder = _copy(checkpoint, tmp_path / "model")
    change(folder)
    with hub.serve({"org/tiny": folder}) as server:
        ask(server)
        with pytest.raises(TritError, match=f"org/tiny.*{words}") as raised:
            download("org/tiny", None)
        assert "\n" not in str(raised.value)
        assert not any("safetensors" in request or "gguf" in request for request in server.requests)


def test_code_comes_along_only_where_it_is_trusted(
    checkpoint: Path, ask: Callable[[hub.Hub], None], tmp_path: Path
) -> None:
    folder = _copy(checkpoint, tmp_path / "model")
    (folder / "tok.py").write_text("")
    with hub.serve({"org/tiny": folder}) as server:
        ask(server)
        assert not (download("org/tiny", None) / "tok.py").exists()
        with trusted():
            assert (download("org/tiny", None) / "tok.py").is_file()


def test_weights_as_pickles_only(checkpoint: Path, ask: Callable[[hub.Hub], None], tmp_path: Path) -> None:
    folder = _copy(checkpoint, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with hub.serve({"org/tiny": folder}) as server:
        ask(server)
        assert (download("org/tiny", None) / "pytorch_model.bin").is_file()
