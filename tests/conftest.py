"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from tiny_gguf import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a tiny Llama with random weights and a chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
