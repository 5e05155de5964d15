"""Matrix products inside llama.cpp: strips interleaved at load time, on the way, and no strips at all give the same."""

import os
import re
import subprocess
from pathlib import Path

import ggml
import pytest
from checkpoints import make_checkpoint, to_f16_gguf

from tritcore.format import DEPTHS
from tritrun import variants

pytestmark = pytest.mark.build

ARCHITECTURES = ["Llama", "Mixtral"]  # Mixtral's experts take MUL_MAT_ID
CHUNKS = 2
LIMIT = 0.03  # a token for which another expert is chosen is worth 0.01
TEXT = "The quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun. " * 40


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of an architecture in F16."""
    folder = tmp_path_factory.mktemp("products")
    return to_f16_gguf(make_checkpoint(folder / request.param, request.param), folder / f"{request.param}-F16.gguf")


@pytest.fixture(scope="module", params=DEPTHS)
def model(request: pytest.FixtureRequest, base: Path) -> Path:
    """The model in a TRIT type, embeddings and output matrix too."""
    path = base.with_name(f"{base.stem}-TRIT{request.param}.gguf")
    command = [str(ggml.tool("llama-quantize")), "--pure", str(base), str(path), f"TRIT{request.param}"]
    subprocess.run(command, check=True, capture_output=True)
    return path


def _run(model: Path, logits: Path, *options: str, variant: str | None = None) -> str:
    """llama-perplexity over a text; it writes logits, or reads them where the options say --kl-divergence."""
    text = logits.with_suffix(".txt")
    text.write_text(TEXT, encoding="utf-8")
    command = [
        str(ggml.tool("llama-perplexity")),
        "-m",
        str(model),
        "-f",
        str(text),
        "-c",
        "64",
        "--chunks",
        str(CHUNKS),
    ]
    command += ["-t", "2", "--kl-divergence-base", str(logits), *options]
    forced = variants.environment(variant) if variant else {}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | forced)
    return done.stdout + done.stderr


def _divergence(model: Path, logits: Path, *options: str, variant: str | None = None) -> float:
    """Mean Kullback-Leibler divergence from the logits that another run has written."""
    output = _run(model, logits, "--kl-divergence", *options, variant=variant)
    # the row of the last chunk: perplexity, log of the ratio, divergence, each with its error
    found = re.search(rf"^ +{CHUNKS} +\S+ ± +\S+ +\S+ ± +\S+ +(\S+) ±", output, re.MULTILINE)
    assert found is not None, output
    return float(found[1])


def test_same_logits_without_repacking(model: Path, tmp_path: Path) -> None:
    _run(model, tmp_path / "repacked")
    _run(model, tmp_path / "plain", "--no-repack")
    assert (tmp_path / "repacked").read_bytes() == (tmp_path / "plain").read_bytes()


def test_a_token_at_a_time(model: Path, tmp_path: Path) -> None:
    """One column takes other kernels than many."""
    _run(model, tmp_path / "logits")
    assert _divergence(model, tmp_path / "logits", "-ub", "1") < LIMIT


def test_all_variants(model: Path, tmp_path: Path) -> None:
    """Their activations differ here and there by one in Q8_0, as upstream's code rounds them."""
    _run(model, tmp_path / "logits")
    for name in variants.runnable():
        assert _divergence(model, tmp_path / "logits", variant=name) < LIMIT, name
