"""tritconv publish: what it refuses and leaves out, and what arrives at a local server that stands in for the hub."""

import hashlib
import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hub
import pytest
import upload_hub
from command_line import tritconv
from huggingface_hub import constants, snapshot_download
from tiny_gguf import damaged, write_tiny_model
from upload_hub import READ_TOKEN, TOKEN, Uploads

CARD = "---\nlicense: mit\nbase_model: org/base\n---\n# A model\n"
NAMES = ["LICENSE", "README.md", "README.svg", "figures.json", "tiny.gguf"]

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The parts of a split model."""
    folder = tmp_path_factory.mktemp("parts")
    source = write_tiny_model(tmp_path_factory.mktemp("source") / "tiny-F16.gguf")
    options = ("--fast", "--depth", 2, "--split-max-size", "40kB", "-o", folder / "split.gguf")
    assert tritconv("gguf-to-gguf", source, *options).returncode == 0
    return sorted(folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is to be published, with a card that has the checksum."""
    folder = tmp_path / "publish"
    folder.mkdir()
    model = write_tiny_model(folder / "tiny.gguf")
    (folder / "README.md").write_text(CARD + hashlib.sha256(model.read_bytes()).hexdigest())
    (folder / "README.svg").write_text("<svg/>")
    (folder / "figures.json").write_text("{}")
    (folder / "LICENSE").write_text("MIT")
    return folder


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[hub.Hub, Uploads]]:
    """The stand-in, which this process takes for the hub, with a token that may write."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with upload_hub.serve(tmp_path / "hub") as (server, uploads):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server, uploads


def publish(folder: Path, *options: object, exit_code: int = 0) -> "subprocess.CompletedProcess[str]":
    done = tritconv("publish", folder, *options)
    assert done.returncode == exit_code, done.stderr
    return done


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def test_what_arrives_is_what_was_there(folder: Path, served: tuple[hub.Hub, Uploads], tmp_path: Path) -> None:
    server, uploads = served
    done = publish(folder, "org/tiny", "--yes", "--message", "The first")
    (commit,) = uploads.commits
    assert (commit.model, commit.branch, commit.message) == ("org/tiny", "main", "The first")
    assert commit.files == contents(folder, *NAMES)
    *listing, url = done.stdout.splitlines()
    assert url == f"{server.url}/org/tiny"
    assert [line.split()[-1] for line in listing] == NAMES
    for line, name in zip(listing, NAMES, strict=True):
        assert line.startswith(hashlib.sha256((folder / name).read_bytes()).hexdigest())
    assert re.fullmatch(r"commit [0-9a-f]{40}\n", done.stderr)

    # and what can be downloaded
    found = Path(snapshot_download("org/tiny", cache_dir=tmp_path / "cache"))
    assert contents(found, *NAMES) == contents(folder, *NAMES)


def test_a_second_commit_sends_only_what_is_new(folder: Path, served: tuple[hub.Hub, Uploads]) -> None:
    server, uploads = served
    publish(folder, "org/tiny", "--yes")
    first = len(server.requests)
    (folder / "README.svg").write_text("<svg></svg>")
    publish(folder, "org/tiny", "--yes")
    assert not any(request.startswith("PUT") for request in server.requests[first:])
    assert uploads.commits[-1].files["README.svg"] == b"<svg></svg>"
    assert uploads.commits[-1].message.startswith("Publish with tritconv ")


def test_the_parts_of_a_model_arrive_together(
    folder: Path, parts: list[Path], served: tuple[hub.Hub, Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tritconv import publish as publishing

    checked = []
    faults = publishing.faults

    def noted(path: Path, threads: int) -> list[str]:
        checked.append(path.name)
        return faults(path, threads)

    monkeypatch.setattr(publishing, "faults", noted)
    for part in parts:
        (folder / part.name).write_bytes(part.read_bytes())
    done = publish(folder, "org/tiny", "--yes")
    assert checked == [parts[0].name, "tiny.gguf"]  # each model once
    assert served[1].commits[0].files == contents(folder, *NAMES, *(part.name for part in parts))
    names = ", ".join(part.name for part in parts)
    assert f"README.md does not have the SHA-256 of {names}" in done.stderr


def test_a_dry_run_asks_nobody(folder: Path, served: tuple[hub.Hub, Uploads], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = publish(folder, "org/tiny", "--dry-run")
    assert len(done.stdout.splitlines()) == len(NAMES)
    assert f"nothing is uploaded to {served[0].url}/org/tiny" in done.stderr
    assert served[0].requests == []


def test_branches_are_made(folder: Path, served: tuple[hub.Hub, Uploads]) -> None:
    server, uploads = served
    for option in ("--branch", "--revision"):
        assert publish(folder, "org/tiny", "--yes", option, "v2").stdout.endswith(f"{server.url}/org/tiny/tree/v2\n")
    assert [commit.branch for commit in uploads.commits] == ["v2", "v2"]


def test_what_is_to_be_private_is_never_public(folder: Path, served: tuple[hub.Hub, Uploads]) -> None:
    _, uploads = served
    publish(folder, "org/private", "--yes", "--private")
    publish(folder, "org/private", "--yes", "--private")
    publish(folder, "org/public", "--yes")
    done = publish(folder, "org/public", "--yes", "--private", exit_code=1)
    assert "org/public is public already" in done.stderr
    assert len(uploads.commits) == 3


def test_what_does_not_belong_there_is_left_out(folder: Path, served: tuple[hub.Hub, Uploads]) -> None:
    for name in (".token.txt", "tiny.gguf.part", "notes.md", "run.py"):
        (folder / name).write_text("secret")
    (folder / "README.work").mkdir()
    (folder / "README.work" / "logits.gguf").write_text("large")
    (folder / "also.txt").symlink_to(folder / "LICENSE")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    done = publish(folder, "org/tiny", "--yes")
    assert done.stderr.startswith("left out: .token.txt, README.work, loop.txt, notes.md, run.py, tiny.gguf.part\n")
    assert served[1].commits[0].files == contents(folder, *NAMES, "also.txt")


def _link_out(folder: Path) -> None:
    (folder / "more.txt").symlink_to(folder.parent / "elsewhere.txt")


def _link_out_by_folder(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def _no_card(folder: Path) -> None:
    (folder / "README.md").unlink()


def _no_license(folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace("license: mit\n", ""))


def _no_header(folder: Path) -> None:
    (folder / "README.md").write_text("# A model\n")


def _broken_header(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [\n---\n")


def _binary_card(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"---\n\xff\n---\n")


def _no_model(folder: Path) -> None:
    (folder / "tiny.gguf").unlink()


def _no_gguf(folder: Path) -> None:
    (folder / "other.gguf").write_text("no GGUF")


def _damaged(folder: Path) -> None:
    damaged(folder / "tiny.gguf")


def _not_loaded(folder: Path) -> None:
    content = (folder / "tiny.gguf").read_bytes()
    (folder / "tiny.gguf").write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_link_out, "more.txt is a link to a place outside of"),
        (_link_out_by_folder, "more is a link to a place outside of"),
        (_no_card, "README.md: no card: write one with `tritrun compare --card"),
        (_no_license, "README.md has no license: add it to the header"),
        (_no_header, "README.md has no license and no base_model"),
        (_broken_header, "README.md: its header cannot be read"),
        (_binary_card, "README.md: its header cannot be read"),
        (_no_model, "has no GGUF file to publish"),
        (_no_gguf, "other.gguf: not a GGUF file"),
        (_damaged, "tiny.gguf: tensor 'output.weight': value 0 is NaN or infinite; nothing is published"),
        (_not_loaded, "tiny.gguf: llama.cpp would not load it"),
    ],
)
def test_folders_that_are_not_published(
    change: Callable[[Path], None], words: str, folder: Path, served: tuple[hub.Hub, Uploads]
) -> None:
    change(folder)
    for option in ("--yes", "--dry-run"):
        message = publish(folder, "org/tiny", option, exit_code=1).stderr
        assert words in message
        assert message.count("\n") == 1
    assert served[0].requests == []


def test_a_missing_part(folder: Path, parts: list[Path], served: tuple[hub.Hub, Uploads]) -> None:
    (folder / parts[1].name).write_bytes(parts[1].read_bytes())
    message = publish(folder, "org/tiny", "--yes", exit_code=1).stderr
    assert f"is part 2 of 3: {parts[0].name} and 1 more is not beside it" in message
    assert served[0].requests == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("none", "org/tiny", "--yes"), 1, "none: no such folder"),
        ((".", "tiny", "--yes"), 2, "tiny is no name of a repository: write ORG/NAME"),
        ((".", "org/../tiny", "--yes"), 2, "org/../tiny is no name of a repository"),
        ((".", "org/tiny"), 2, "no terminal to ask on: give --yes"),
    ],
)
def test_misuse(arguments: tuple[str, ...], exit_code: int, words: str, served: tuple[hub.Hub, Uploads]) -> None:
    done = tritconv("publish", *arguments)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert words in done.stderr
    assert served[0].requests == []


def test_no_token(folder: Path, served: tuple[hub.Hub, Uploads], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the hub: set HF_TOKEN" in publish(folder, "org/tiny", "--yes", exit_code=1).stderr


@pytest.mark.parametrize("token", [READ_TOKEN, "made-up"])
def test_tokens_that_may_not_write(
    token: str, folder: Path, served: tuple[hub.Hub, Uploads], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    message = publish(folder, "org/tiny", "--yes", exit_code=1).stderr
    assert "does not let this token write to org/tiny" in message
    assert message.count("\n") == 1
    assert served[1].commits == []


@pytest.mark.parametrize("refused", ["/preupload/", "/batch", "/lfs/content/", "/lfs/verify/", "/commit/"])
def test_a_hub_that_fails_gets_no_commit(refused: str, folder: Path, served: tuple[hub.Hub, Uploads]) -> None:
    _, uploads = served
    uploads.refuse = refused
    message = publish(folder, "org/tiny", "--yes", exit_code=1).stderr
    assert "cannot upload to org/tiny on http://127.0.0.1" in message
    assert message.count("\n") == 1
    assert uploads.commits == []
    uploads.refuse = ""
    publish(folder, "org/tiny", "--yes")
    assert uploads.commits[0].files == contents(folder, *NAMES)


def test_no_network(folder: Path, served: tuple[hub.Hub, Uploads], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    message = publish(folder, "org/tiny", "--yes", exit_code=1).stderr
    assert "cannot upload to org/tiny on http://127.0.0.1:9" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(("answer", "n_commits"), [("y", 1), ("n", 0)])
def test_a_terminal_is_asked(answer: str, n_commits: int, folder: Path, served: tuple[hub.Hub, Uploads]) -> None:
    server, uploads = served
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder.parent)}
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "tritconv", "publish", str(folder), "org/tiny"]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, env=environment) as process:
        os.close(terminal)
        shown = b""
        while b"[y/N]" not in shown:
            assert select.select([controller], [], [], 60)[0], shown
            shown += os.read(controller, 4096)
        assert uploads.commits == []
        os.write(controller, answer.encode() + b"\n")
        output, _ = process.communicate(timeout=60)
    os.close(controller)
    assert f"Upload these {len(NAMES)} files to {server.url}/org/tiny?".encode() in shown
    assert len(uploads.commits) == n_commits
    assert (process.returncode == 0) == bool(n_commits)
    assert output.decode().endswith(f"{server.url}/org/tiny\n") == bool(n_commits)


def test_the_card_of_a_comparison_can_be_published(
    folder: Path, served: tuple[hub.Hub, Uploads], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from tritrun.cli import app

    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    own = ("--fast", "--depth", 2, "-o", folder / "t.gguf")
    assert tritconv("gguf-to-gguf", folder / "tiny.gguf", *own).returncode == 0
    options = ["--text", text, "--chunks", 4, "--ctx", 64, "--no-speed", "--card", folder / "README.md"]
    words = ["compare", "--base", folder / "tiny.gguf", *options, folder / "t.gguf"]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    (folder / "tiny.gguf").unlink()
    message = publish(folder, "org/tiny", "--yes", exit_code=1).stderr
    assert "README.md has no license and no base_model" in message  # the tiny model names none
    card = (folder / "README.md").read_text().replace("---\n", "---\nlicense: mit\nbase_model: org/base\n", 1)
    (folder / "README.md").write_text(card)
    assert "SHA-256" not in publish(folder, "org/tiny", "--yes").stderr
    assert served[1].commits[0].files["README.md"].decode() == card
    assert json.loads(served[1].commits[0].files["figures.json"]) == {}
