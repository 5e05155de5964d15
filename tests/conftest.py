"""Fixtures that several test files share."""

import signal
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, smollm2_checkpoint, to_f16_gguf
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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint. Tests must not change it: copy it first."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-llama")


@pytest.fixture(scope="session")
def f16_gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in F16."""
    return to_f16_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "tiny-llama-F16.gguf")
