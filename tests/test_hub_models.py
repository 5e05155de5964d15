"""GGUF models of the hub, which a local server stands in for, in the place of local files."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hub
import pytest
from command_line import tritconv
from gguf import GGUFReader
from huggingface_hub import constants
from rich.console import Console
from typer.testing import CliRunner

import tritcore.hub
from tritcore import console
from tritcore.errors import TritError
from tritcore.reference import find_model
from tritrun.cli import app as tritrun
from tritrun.naming import find_labelled

Repository = Callable[..., Path]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Make a folder with files of these names, each with a content of its own."""

    def of(*names: str) -> Path:
        folder = tmp_path / "repository"
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode() * 1000)
        return folder

    return of


@pytest.fixture
def served(repository: Repository, ask: Callable[[hub.Hub], None]) -> Iterator[hub.Hub]:
    """org/tiny with two TRIT files, one of another type, and what is no model."""
    names = ("tiny-TRIT2.gguf", "tiny-TRIT3.gguf", "more/tiny-q4_k_m.gguf", "mmproj-F16.gguf", "tiny.imatrix.gguf")
    folder = repository(*names, "tiny-LoRA-F16.gguf", "README.md", "model.safetensors")
    with hub.serve({"org/tiny": folder}) as server:
        ask(server)
        yield server


def content(name: str) -> bytes:
    """What `repository` writes."""
    return name.encode() * 1000


def downloads(server: hub.Hub) -> list[str]:
    """The names of the files that were asked for."""
    return [request.split(f"{hub.COMMIT}/")[1] for request in server.requests if request.startswith("GET /org")]


@pytest.mark.parametrize(
    "text",
    ["no.gguf", "./org/name", "/org/name", "org/name.gguf", "a/b/c/d", "org", "C:/x.gguf", "org/name:a/b", "~/x/y", ""],
)
def test_what_cannot_be_on_the_hub_is_a_path(text: str) -> None:
    assert find_model(text) == Path(text)


def test_a_local_path_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name") == Path("org/name")
    # the folder is there: a file in it is meant, even one that is missing
    assert find_model("org/name/no.gguf") == Path("org/name/no.gguf")


def test_the_hub_is_loaded_only_for_a_reference() -> None:
    code = "import sys, tritrun.cli, tritconv.cli\nfrom tritcore.reference import find_model\nfind_model('no.gguf')\n"
    subprocess.run([sys.executable, "-c", f"{code}assert 'huggingface_hub' not in sys.modules"], check=True)


def test_the_only_model_of_a_repository(repository: Repository, ask: Callable[[hub.Hub], None]) -> None:
    with hub.serve({"org/tiny": repository("tiny-TRIT3.gguf", "mmproj-tiny.gguf", "tiny-adapter.gguf")}) as server:
        ask(server)
        found = find_model("org/tiny")
        assert found.name == "tiny-TRIT3.gguf"
        assert found.read_bytes() == content("tiny-TRIT3.gguf")
        assert find_model("org/tiny") == found
        assert downloads(server) == ["tiny-TRIT3.gguf"]  # once


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("org/tiny:TRIT3", "tiny-TRIT3.gguf"),
        ("org/tiny:trit2", "tiny-TRIT2.gguf"),
        ("org/tiny:Q4_K_M", "more/tiny-q4_k_m.gguf"),
        ("org/tiny/tiny-TRIT3.gguf", "tiny-TRIT3.gguf"),
        ("org/tiny/more/tiny-q4_k_m.gguf", "more/tiny-q4_k_m.gguf"),
        ("org/tiny/mmproj-F16.gguf", "mmproj-F16.gguf"),
        ("org/tiny:TRIT3@main", "tiny-TRIT3.gguf"),
        (f"org/tiny/tiny-TRIT3.gguf@{hub.COMMIT}", "tiny-TRIT3.gguf"),
    ],
)
def test_a_model_by_its_type_or_file(reference: str, name: str, served: hub.Hub) -> None:
    found = find_model(reference)
    assert found.as_posix().endswith(f"/snapshots/{hub.COMMIT}/{name}")
    assert found.read_bytes() == content(name)
    assert downloads(served) == [name]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/tiny", "org/tiny has 3 models that fit: choose org/tiny:Q4_K_M, org/tiny:TRIT2 or org/tiny:TRIT3"),
        ("org/tiny@main", "choose org/tiny:Q4_K_M@main, org/tiny:TRIT2@main or org/tiny:TRIT3@main"),
        ("org/tiny:TRIT4", "org/tiny has no TRIT4 model: choose org/tiny:Q4_K_M, org/tiny:TRIT2 or org/tiny:TRIT3"),
        ("org/tiny:Q4_K", "org/tiny has no Q4_K model: choose"),
        ("org/tiny:K_M", "org/tiny has no K_M model: choose"),
        ("org/tiny/no.gguf", "org/tiny has no no.gguf: choose"),
    ],
)
def test_without_a_terminal_the_choices_are_named(reference: str, message: str, served: hub.Hub) -> None:
    with pytest.raises(TritError) as raised:
        find_model(reference)
    assert message in str(raised.value)
    assert downloads(served) == []


def test_names_that_say_no_type_are_named_as_files(repository: Repository, ask: Callable[[hub.Hub], None]) -> None:
    names = ("one.gguf", "other.gguf", ".gguf", "-00001-of-00001.gguf")
    with hub.serve({"org/tiny": repository(*names, "v1-TRIT2.gguf", "v2-TRIT2.gguf")}) as server:
        ask(server)
        with pytest.raises(TritError, match=r"choose org/tiny/-00001-of-00001.gguf, org/tiny/one.gguf, org/tiny/other"):
            find_model("org/tiny")
        with pytest.raises(TritError, match=r"2 models that fit: choose org/tiny/v1-TRIT2.gguf or org/tiny/v2-TRIT2"):
            find_model("org/tiny:TRIT2")


class _Keyboard:
    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return next(self._lines, "")


def test_on_a_terminal_the_user_is_asked(
    served: hub.Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tritcore.hub, "err", Console(stderr=True, force_terminal=True, highlight=False))
    monkeypatch.setattr(sys, "stdin", _Keyboard("9\n", "2\n"))
    assert find_model("org/tiny").name == "tiny-TRIT2.gguf"
    shown = capsys.readouterr()
    assert "2  org/tiny:TRIT2 (15.0 kB)" in shown.err
    assert shown.out == ""
    with pytest.raises(TritError, match="no model of org/tiny was chosen"):  # the end of the input
        find_model("org/tiny")


@pytest.mark.parametrize("names", [("README.md",), ("model.safetensors", "mmproj-F16.gguf")])
def test_a_repository_without_models(
    names: tuple[str, ...], repository: Repository, ask: Callable[[hub.Hub], None]
) -> None:
    with hub.serve({"org/tiny": repository(*names)}) as server:
        ask(server)
        with pytest.raises(TritError, match="org/tiny has no GGUF model; tritconv hf-to-gguf"):
            find_model("org/tiny")


@pytest.mark.parametrize("reference", ["org/big", "org/big:TRIT2", "org/big/big-TRIT2-00002-of-00003.gguf"])
def test_a_split_model_comes_with_all_parts(
    reference: str, repository: Repository, ask: Callable[[hub.Hub], None]
) -> None:
    names = [f"big-TRIT2-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    with hub.serve({"org/big": repository(*names)}) as server:
        ask(server)
        found = find_model(reference)
        assert found.name == names[0]
        assert [found.with_name(name).read_bytes() for name in names] == [content(name) for name in names]


def test_a_split_model_with_a_part_missing(repository: Repository, ask: Callable[[hub.Hub], None]) -> None:
    with hub.serve({"org/big": repository("a-00001-of-00003.gguf", "a-00003-of-00003.gguf")}) as server:
        ask(server)
        with pytest.raises(TritError, match=r"org/big has 2 of the 3 parts of a-00001-of-00003.gguf"):
            find_model("org/big")
        assert downloads(server) == []


def test_the_cache_serves_without_a_network(served: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model("org/tiny:TRIT3")
    asked = len(served.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/tiny") == found  # the only one that is there
    assert find_model(f"org/tiny:TRIT3@{hub.COMMIT}") == found
    with pytest.raises(TritError, match="no TRIT2 model in the cache, and the hub was not reached: choose org/tiny:TR"):
        find_model("org/tiny:TRIT2")
    with pytest.raises(TritError, match=r"org/other is not in the cache .* check the network and HF_HUB_OFFLINE"):
        find_model("org/other:TRIT2")
    assert len(served.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.is_down = True
    assert find_model("org/tiny:TRIT3") == found
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    assert find_model("org/tiny:TRIT3") == found
    with pytest.raises(TritError, match=r"org/other is not in the cache and http://127\.0\.0\.1:9"):
        find_model("org/other")


def test_parts_that_the_cache_lacks(
    repository: Repository, ask: Callable[[hub.Hub], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.serve({"org/big": repository("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")}) as server:
        ask(server)
        found = find_model("org/big")
        found.with_name("a-00001-of-00002.gguf").unlink()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(TritError, match=r"1 of the 2 parts of a-00002-of-00002.gguf in the cache"):
            find_model("org/big")


def test_a_branch_moves_and_a_commit_stays(served: hub.Hub, tmp_path: Path) -> None:
    before = find_model("org/tiny:TRIT3")
    pushed = shutil.copytree(tmp_path / "repository", tmp_path / "pushed")
    (pushed / "tiny-TRIT3.gguf").write_bytes(b"new")
    served.push("org/tiny", pushed)
    assert find_model("org/tiny:TRIT3").read_bytes() == b"new"
    assert find_model(f"org/tiny:TRIT3@{hub.COMMIT}") == before


def test_a_push_in_the_middle_mixes_no_commits(
    repository: Repository, ask: Callable[[hub.Hub], None], tmp_path: Path
) -> None:
    names = ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
    folder = repository(*names)
    pushed = shutil.copytree(folder, tmp_path / "pushed")
    (pushed / names[1]).write_bytes(b"new")
    with hub.serve({"org/big": folder}) as server:
        ask(server)

        def push(path: str) -> None:
            if path.endswith(names[0]):
                server.push("org/big", pushed)

        server.after_request = push
        found = find_model("org/big")
        assert found.parent.name == hub.COMMIT
        assert found.with_name(names[1]).read_bytes() == content(names[1])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let downloads write what has come without waiting for megabytes, nor between two attempts."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("small_pieces")
def test_a_download_that_broke_off_goes_on_in_the_next_run(served: hub.Hub, tmp_path: Path) -> None:
    def cut(whole: bytes) -> bytes:
        served.is_down = True
        return whole[:4500]

    served.spoil = cut
    with pytest.raises(TritError, match="503"):
        find_model("org/tiny:TRIT3")
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    arrived = partial.stat().st_size
    assert 0 < arrived <= 4500
    served.is_down = False
    assert find_model("org/tiny:TRIT3").read_bytes() == content("tiny-TRIT3.gguf")
    assert served.resumed == [arrived]
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


@pytest.mark.usefixtures("small_pieces")
def test_a_connection_that_breaks_is_taken_up_again(served: hub.Hub) -> None:
    served.spoil = lambda whole: whole[:4500]
    assert find_model("org/tiny:TRIT3").read_bytes() == content("tiny-TRIT3.gguf")
    assert len(served.resumed) == 1


def test_a_partial_file_that_is_too_long_is_of_no_use(served: hub.Hub, tmp_path: Path) -> None:
    find_model("org/tiny:TRIT3")
    (blob,) = (tmp_path / "cache").glob("models--*/blobs/*")
    blob.with_name(f"{blob.name}.incomplete").write_bytes(bytes(20_000))
    blob.unlink()
    assert find_model("org/tiny:TRIT3").read_bytes() == content("tiny-TRIT3.gguf")
    assert served.resumed == []


def test_what_came_damaged_is_not_kept(served: hub.Hub, tmp_path: Path) -> None:
    served.spoil = lambda whole: b"x" + whole[1:]
    with pytest.raises(TritError, match=r"tiny-TRIT3.gguf of org/tiny came damaged: its SHA-256 .* deleted") as raised:
        find_model("org/tiny:TRIT3")
    assert "\n" not in str(raised.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    served.spoil = lambda whole: whole
    assert find_model("org/tiny:TRIT3").read_bytes() == content("tiny-TRIT3.gguf")


def test_a_file_is_hashed_only_when_it_came(served: hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    find_model("org/tiny:TRIT3")
    monkeypatch.setattr(tritcore.hub.files, "sha256", lambda path: pytest.fail("hashed again"))
    find_model("org/tiny:TRIT3")


def test_a_cached_file_of_another_size_comes_anew(served: hub.Hub) -> None:
    found = find_model("org/tiny:TRIT3")
    found.resolve().write_bytes(b"cut off")
    assert find_model("org/tiny:TRIT3").read_bytes() == content("tiny-TRIT3.gguf")
    found.unlink()  # as without symbolic links
    found.write_bytes(b"cut off")
    assert find_model("org/tiny:TRIT3").read_bytes() == content("tiny-TRIT3.gguf")


def test_a_full_disk_is_told_before(served: hub.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(TritError, match=r"no space left .* 15\.0 kB are to come, 100 bytes are free.*HF_HOME"):
        find_model("org/tiny:TRIT3")
    assert downloads(served) == []


def test_two_runs_at_once_download_once(served: hub.Hub) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(find_model, ["org/tiny:TRIT3"] * 2)
    assert one == other
    assert one.read_bytes() == content("tiny-TRIT3.gguf")
    assert downloads(served) == ["tiny-TRIT3.gguf"]


def test_what_plain_http_does_not_carry_is_left_to_huggingface_hub(
    served: hub.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 14_999)
    with pytest.raises(TritError, match=r"cannot download org/tiny .* too large .* hf_xet"):  # which the test has off
        find_model("org/tiny:TRIT3")


def test_progress_is_shown_on_a_terminal_only(
    served: hub.Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_model("org/tiny:TRIT3")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "err", Console(stderr=True, force_terminal=True, highlight=False))
    find_model("org/tiny:TRIT2")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tiny-TRIT2.gguf" in shown.err
    assert "15.0/15.0 kB" in shown.err


@pytest.mark.parametrize("name", ["../x.gguf", "a/../../x.gguf", "/x.gguf", "..\\x.gguf"])
def test_names_that_reach_out_of_the_repository_are_none(name: str, served: hub.Hub) -> None:
    served.rename = lambda stated: name if stated == "tiny-TRIT3.gguf" else stated
    with pytest.raises(TritError, match=r"choose org/tiny:Q4_K_M or org/tiny:TRIT2$"):
        find_model("org/tiny")
    with pytest.raises(TritError, match="no TRIT3 model"):
        find_model("org/tiny:TRIT3")


def _refused(reference: str) -> str:
    result = CliRunner().invoke(tritrun, ["chat", reference, "--prompt", "x"])
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line


def test_errors_are_one_line(served: hub.Hub) -> None:
    assert "org/other is not on http://127.0.0.1" in _refused("org/other:TRIT3")
    assert "org/tiny has no revision 'v9'" in _refused("org/tiny:TRIT3@v9")
    assert "org--x/tiny is no hub id" in _refused("org--x/tiny")
    served.rename = lambda name: f"\x1b[2J{name}"
    assert "\x1b" not in _refused("org/tiny")


def test_gated_models_need_the_token(
    repository: Repository, ask: Callable[[hub.Hub], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.serve({"org/gated": repository("a-TRIT2.gguf")}, gated={"org/gated"}, token="secret") as server:
        ask(server)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(TritError, match="org/gated is gated: accept its terms on the hub, then set HF_TOKEN"):
            find_model("org/gated")
        monkeypatch.setenv("HF_TOKEN", "secret")
        assert find_model("org/gated").read_bytes() == content("a-TRIT2.gguf")


@pytest.fixture
def model_on_the_hub(tiny_model: Path, ask: Callable[[hub.Hub], None], tmp_path: Path) -> Iterator[Path]:
    """org/model, which has a tiny model in F16 that llama.cpp loads."""
    folder = tmp_path / "repository"
    folder.mkdir()
    path = Path(shutil.copy(tiny_model, folder / "tiny-F16.gguf"))
    with hub.serve({"org/model": folder}) as server:
        ask(server)
        yield path


def test_labels_of_references(model_on_the_hub: Path) -> None:
    label, path = find_labelled("half=org/model:F16").split("=")
    assert label == "half"
    assert Path(path).read_bytes() == model_on_the_hub.read_bytes()
    assert find_labelled("org/model") == path
    assert find_labelled("half=no.gguf") == "half=no.gguf"


def test_inspect_takes_a_reference(model_on_the_hub: Path) -> None:
    done = tritconv("inspect", "org/model:F16")
    assert done.returncode == 0, done.stderr
    assert "tiny-F16.gguf: metadata" in done.stdout
    assert tritconv("inspect", "org/model:Q8_0").returncode == 1


@pytest.mark.build
def test_the_other_commands_take_references(
    model_on_the_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = tritconv("verify", "org/model", "org/model:F16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": ok") == 2

    done = tritconv("gguf-to-gguf", "org/model", "--depth", 2, "--fast")
    assert done.returncode == 0, done.stderr
    assert GGUFReader("tiny-TRIT2.gguf").tensors

    text = tmp_path / "text"
    text.write_text("abcdefghij " * 40)
    perplexity = ["perplexity", "org/model:F16", "--base", "org/model", "--file", str(text), "--ctx", "32"]
    bench = ["bench", "org/model", "-p", "4", "-n", "2", "-r", "1"]
    compare = ["compare", "--base", "org/model", "--text", str(text), "--ctx", "32", "--no-speed", "two=org/model:F16"]
    chat = ["chat", "org/model", "--prompt", "x", "--max-tokens", "3"]
    for command in (perplexity, bench, compare, chat):
        result = CliRunner().invoke(tritrun, command)
        assert result.exit_code == 0, result.output
        assert result.stdout
