"""SmolLM2-135M-Instruct, a real model with rows of 576 and 1536: quality by depth, and an answer.

The figures of the README are measured on WikiText-2; here the text is the documentation that Python brings.
"""

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
from checkpoints import llama_quantize, to_f16_gguf, tritconv
from gguf import GGMLQuantizationType as Type

from tritcore.gguf_header import read_model_file

pytestmark = pytest.mark.build

CHUNKS = 6


def _tritrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tritrun", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The model at depths 2, 3 and 4."""
    folder = tmp_path_factory.mktemp("converted")
    paths = {depth: folder / f"TRIT{depth}.gguf" for depth in (2, 3, 4)}
    for depth, path in paths.items():
        done = tritconv("hf-to-gguf", smollm2, "--fast", "--depth", depth, "-o", path)
        assert done.returncode == 0, done.stderr
        assert "is stored as" not in done.stdout
    return paths


def test_all_linear_layers_are_trit(converted: dict[int, Path]) -> None:
    for depth, path in converted.items():
        tensors = [t for t in read_model_file(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
        assert len(tensors) == 30 * 7
        assert {t.type for t in tensors} == {Type[f"TRIT{depth}"]}


def test_kl_divergence_falls_with_depth(
    converted: dict[int, Path], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("kl")
    base = to_f16_gguf(smollm2, folder / "f16.gguf")
    text = folder / "text.txt"
    text.write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)))
    divergence = {}
    for depth, path in converted.items():
        report = folder / f"{depth}.json"
        options = ("--file", text, "--chunks", CHUNKS, "--logits", folder / "logits", "--json", report)
        done = _tritrun("perplexity", path, "--base", base, *options)
        assert done.returncode == 0, done.stderr
        divergence[depth] = json.loads(report.read_text())["divergence"]["mean"]["value"]
    assert divergence[2] > divergence[3] > divergence[4] > 0
    assert divergence[3] <= 0.13
    assert divergence[4] <= 0.015


def test_the_demo_model_knows_the_capital_of_france(smollm2_trit3: Path) -> None:
    done = _tritrun("chat", smollm2_trit3, "--prompt", "What is the capital of France?", "--system", "", "--temp", 0)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_llama_quantize_makes_the_same_matrices(converted: dict[int, Path], smollm2: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    base, target = to_f16_gguf(smollm2, tmp_path / "f16.gguf"), tmp_path / "trit2.gguf"
    assert llama_quantize(base, target, "TRIT2").returncode == 0
    ours, theirs = (
        {t.name: t.data for t in GGUFReader(path).tensors if t.tensor_type == Type.TRIT2}
        for path in (converted[2], target)
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
