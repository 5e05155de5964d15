"""Fixtures that several test files share."""

import signal
from collections.abc import Callable
from pathlib import Path

import hub
import pytest
from checkpoints import SMOLLM2_GGUF, make_checkpoint, smollm2_checkpoint, to_f16_gguf, tritconv
from huggingface_hub import constants
from tiny_gguf import write_tiny_model


def pytest_configure() -> None:
    """Undo what nohup and a shell's background jobs do: tests send these signals, and children would ignore them."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny Llama with random weights and a chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of SmolLM2-135M-Instruct, in float16."""
    return smollm2_checkpoint(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def smollm2_trit3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model: SmolLM2-135M-Instruct in TRIT3, by search."""
    path = tmp_path_factory.mktemp("trit3") / "SmolLM2-135M-Instruct-TRIT3.gguf"
    done = tritconv("gguf-to-gguf", SMOLLM2_GGUF, "--fast", "--depth", 3, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint. Tests must not change it: copy it first."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="session")
def f16_gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in F16."""
    return to_f16_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "tiny-llama-F16.gguf")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[hub.Hub], None]:
    """Make downloads of this process go to a stand-in, with a cache of their own, `tmp_path / "cache"`."""

    def of(server: hub.Hub) -> None:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    return of
