"""The predicted losses of matrices in types."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, maps_of
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tritconv.allocate import CANDIDATES
from tritconv.calibration.inputs import Inputs, digest_of_tokens
from tritconv.calibration.matrices import Matrix
from tritconv.calibration.model import LayeredModel
from tritconv.calibration.ranks import ALONE
from tritconv.calibration.rows import OUTSIDE, RowMap
from tritconv.calibration.store import LayerStore
from tritconv.methods.gptq import sensitivity
from tritconv.methods.gptq.sensitivity import Losses, Measurement, origins
from tritcore import ggml

pytestmark = pytest.mark.build

MEMORY = 1 << 30
Q, DOWN = Matrix("self_attn.q_proj.weight"), Matrix("mlp.down_proj.weight")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 600, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LayeredModel:
    return LayeredModel(checkpoint)


def store_of(model: LayeredModel, tokens: torch.Tensor, maps: dict[str, RowMap], seed: int) -> LayerStore:
    inputs = Inputs("sensitivity", "tiny", digest_of_tokens(tokens), seed, model.machinery, origins(maps, CANDIDATES))
    return LayerStore(inputs, "tiny")


def measured(model: LayeredModel, tokens: torch.Tensor, maps: dict[str, RowMap] | None = None, seed: int = 0) -> Losses:
    maps = maps_of(model) if maps is None else maps
    store = store_of(model, tokens, maps, seed)
    return Measurement(model, maps, {}, tokens, seed, CANDIDATES, lambda what: None).losses(store, MEMORY)


def stored(weights: torch.Tensor, qtype: Type) -> torch.Tensor:
    """What a type makes of weights."""
    return torch.from_numpy(quants.dequantize(ggml.quantize(weights.numpy(), qtype), qtype))


def test_predicts_the_divergence(checkpoint: Path) -> None:
    model = LayeredModel(checkpoint)
    tokens = torch.randint(3, 600, (128, 32), generator=torch.Generator().manual_seed(1))
    predicted = measured(model, tokens)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def predictions() -> torch.Tensor:
        with torch.no_grad():
            return whole(input_ids=tokens).logits.double().log_softmax(dim=-1)

    before = predictions()
    for index, layer in enumerate(whole.model.layers):
        for matrix in (Q, DOWN):
            weights = matrix.of(layer)
            kept = weights.clone()
            weights.copy_(stored(weights, Type.TRIT3))
            divergence = (before.exp() * (before - predictions())).sum(dim=-1).mean()
            weights.copy_(kept)
            # gptq makes errors that cost less than those of the search
            assert 0.4 * divergence < predicted[f"blk.{index}.{matrix}"][Type.TRIT3] < 1.15 * divergence


def test_more_bits_lose_less(model: LayeredModel, tokens: torch.Tensor) -> None:
    found = measured(model, tokens)
    assert found.keys() == maps_of(model).keys()
    for losses in found.values():
        assert tuple(losses) == CANDIDATES
        assert list(losses.values()) == sorted(losses.values(), reverse=True)
        assert losses[Type.TRIT2] > 4 * losses[Type.TRIT3] > 16 * losses[Type.TRIT4] > 0


def test_a_tensor_has_the_losses_of_its_rows(model: LayeredModel, tokens: torch.Tensor) -> None:
    whole = maps_of(model)
    name = f"blk.1.{Q}"
    order = whole[name].row[::-1]
    first, second = (RowMap([(1, Q)], np.zeros(len(rows), np.int32), rows) for rows in np.split(order, [50]))
    both = RowMap([(1, Q), (1, DOWN)], np.repeat(np.array([0, 1], np.int32), 192), np.tile(np.arange(192), 2))
    found = measured(model, tokens, {"first": first, "second": second})
    alone, joined = measured(model, tokens), measured(model, tokens, {"both": both})
    for qtype in CANDIDATES:
        assert found["first"][qtype] + found["second"][qtype] == pytest.approx(alone[name][qtype])
        assert joined["both"][qtype] == pytest.approx(alone[name][qtype] + alone[f"blk.1.{DOWN}"][qtype])


def test_some_rows_stand_for_all(model: LayeredModel, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"blk.0.{DOWN}"
    whole = measured(model, tokens)[name]
    monkeypatch.setattr(sensitivity, "_SOME_ROWS", 50)
    monkeypatch.setenv("TRITCONV_CACHE", os.environ["TRITCONV_CACHE"] + "/some")
    some = measured(model, tokens)[name]
    for qtype in CANDIDATES:
        assert some[qtype] == pytest.approx(whole[qtype], rel=0.4)
        assert some[qtype] != whole[qtype]


@pytest.mark.parametrize(
    ("n_layers", "of_all", "chosen"), [(3, True, 3), (3, False, 3), (40, True, 40), (40, False, 8)]
)
def test_some_layers_stand_for_all(n_layers: int, of_all: bool, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, RowMap]] = []

    class Fake:
        def __init__(self, _: object, maps: dict[str, RowMap], *rest: object) -> None:
            seen.append(maps)

        def losses(self, *_: object) -> Losses:
            return {}

    monkeypatch.setattr(sensitivity, "Measurement", Fake)
    maps = {f"blk.{i}.q": RowMap.whole((i, Q), 64) for i in range(n_layers)}
    maps["token_embd.weight"] = RowMap.whole((OUTSIDE, Matrix("token_embd.weight")), 64)
    source = SimpleNamespace(tensors=(), origin=SimpleNamespace(name="tiny"))
    context: Any = SimpleNamespace(
        model=SimpleNamespace(n_layers=n_layers),
        maps=maps,
        outside={},
        source=source,
        ranks=ALONE,
        tokens=None,
        inputs=SimpleNamespace(seed=0),
        memory=0,
        store=lambda *_, **__: None,
    )
    assert sensitivity.sensitivities(context, CANDIDATES, lambda what: None, of_all=of_all) == {}
    assert len(seen[0]) == chosen
    assert "token_embd.weight" not in seen[0]


def test_experts_without_tokens_count_like_the_others(tmp_path: Path) -> None:
    model = LayeredModel(make_checkpoint(tmp_path / "mixtral", "Mixtral"))
    one_word = torch.full((4, 32), 5)  # all tokens are alike, and go to the same two of four experts
    maps = maps_of(model)
    found = measured(model, one_word, maps)
    for index in range(2):
        name = f"blk.{index}.mlp.experts.down_proj"
        experts = [
            RowMap([place], np.zeros(192, np.int32), np.arange(192, dtype=np.int64)) for place in maps[name].places
        ]
        alone = measured(model, one_word, {f"blk.{index}.{number}": expert for number, expert in enumerate(experts)})
        assert len(alone) == 2
        total = sum(losses[Type.TRIT2] for losses in alone.values())
        assert found[name][Type.TRIT2] == pytest.approx(2 * total)


def test_a_type_that_cannot_hold_a_matrix_is_no_candidate(
    checkpoint: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "small")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1e-4  # below the codebook
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = measured(LayeredModel(folder), tokens)
    assert tuple(found[f"blk.0.{Q}"]) == (Type.Q8_0,)
    assert tuple(found[f"blk.1.{Q}"]) == CANDIDATES


def test_rows_that_blocks_do_not_fit_are_left_out(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = LayeredModel(make_checkpoint(tmp_path / "odd", intermediate_size=96))
    found = measured(model, tokens)
    assert f"blk.0.{DOWN}" not in found
    assert f"blk.0.{Q}" in found


def test_same_seed_same_losses(
    model: LayeredModel, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cache, seed in (("a", 1), ("b", 1), ("b", 2)):
        monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / cache))
        found.append(measured(model, tokens, seed=seed))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_kept_losses_are_used_once_all_are_there(model: LayeredModel, tokens: torch.Tensor) -> None:
    maps = maps_of(model)
    steps: list[str] = []
    store = store_of(model, tokens, maps, 0)
    measurement = Measurement(model, maps, {}, tokens, 0, CANDIDATES, steps.append)
    first = measurement.losses(store, MEMORY)
    assert steps
    steps.clear()
    assert measurement.losses(store, MEMORY) == first
    assert not steps
    (store.entry.folder / "layer-0001.safetensors").unlink()
    assert measurement.losses(store, MEMORY) == first
    assert steps
