"""What the writer does with weights that a type cannot hold, and that no unsound file comes out of it."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from tritconv.methods import Quantizer
from tritconv.methods.per_tensor import PerTensor
from tritconv.methods.search import Search
from tritconv.plan import Plan
from tritconv.sources.source import Kind, Origin, Source, SourceTensor
from tritconv.verify import findings
from tritconv.workers import Workers
from tritconv.writer import Header, StoredTensor, write
from tritcore.errors import TritError
from tritcore.output import reserve

PLAN = Plan(2, Type.Q8_0, Type.F16, Type.Q8_0)


def _tensor(name: str, values: np.ndarray, kind: Kind = Kind.MATRIX, kept: Type | None = None) -> SourceTensor:
    return SourceTensor(name, values.shape, kind, lambda: values, kept)


def _write(
    folder: Path, *tensors: SourceTensor, plan: Plan = PLAN, quantizer: Quantizer | None = None
) -> tuple[Path, list[StoredTensor]]:
    source = Source("x", "llama", {}, tensors, Origin(folder))
    method = PerTensor(quantizer or Search())
    header = Header(source.architecture, source.metadata, tensors, method.methods)
    with reserve(folder / "x.gguf", force=False) as output, Workers(1) as workers:
        stored = write(header, plan, method.run(source, plan, workers), output, workers, lambda name, n: None)
        return output.target, stored


def _stored(path: Path) -> dict[str, tuple[Type, np.ndarray]]:
    return {t.name: (t.tensor_type, gguf.dequantize(t.data, t.tensor_type)) for t in GGUFReader(path).tensors}


@pytest.mark.build
@pytest.mark.parametrize(
    ("kind", "kept", "largest"),
    [
        (Kind.EMBEDDING, None, 1e9),  # the scale of a Q8_0 block is float16
        (Kind.OUTPUT, None, 70000.0),  # stored in F16
        (Kind.KEPT, Type.F16, 70000.0),
    ],
)
def test_what_float16_cannot_hold_becomes_f32(kind: Kind, kept: Type | None, largest: float, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(0, 0.1, (4, 64)).astype(np.float32)
    values[2, 5] = -largest
    path, (outcome,) = _write(tmp_path, _tensor("t.weight", values, kind, kept))
    assert findings(path, 1) == []
    stored_type, stored = _stored(path)["t.weight"]
    if largest > 65504 * 127 or stored_type is Type.F32:
        assert np.array_equal(stored, values)
    assert np.isfinite(stored).all()
    assert abs(stored[2, 5] + largest) <= 0.01 * largest
    assert outcome.fallback is not None
    assert "above the range" in outcome.fallback


@pytest.mark.build
def test_a_matrix_above_every_range(tmp_path: Path) -> None:
    values = np.full((2, 64), 1e9, np.float32)
    path, _ = _write(tmp_path, _tensor("blk.0.ffn_up.weight", values))
    assert _stored(path)["blk.0.ffn_up.weight"][0] is Type.F32
    assert findings(path, 1) == []


@pytest.mark.build
def test_the_header_says_what_became_of_each_tensor(tmp_path: Path) -> None:
    """It is written last, into room that was reserved before anything was known."""
    rng = np.random.default_rng(0)
    lattice = (rng.integers(-1, 2, (64, 128)) * 0.0371).astype(np.float16)
    tensors = (
        _tensor("token_embd.weight", np.ones((4, 64), np.float32), Kind.EMBEDDING),
        _tensor("blk.0.a.weight", rng.normal(0, 0.05, (64, 128)).astype(np.float32)),
        _tensor("blk.0.b.weight", lattice),
        _tensor("blk.0.c.weight", np.full((2, 64), 1e9, np.float32)),
    )
    plan = Plan(1, Type.Q8_0, Type.F16, Type.Q8_0).with_lattices(tensors)
    path, stored = _write(tmp_path, *tensors, plan=plan)
    fields = GGUFReader(path).fields
    assert fields["trit.methods"].contents() == ["none", "search"]
    assert fields["trit.tensor.method"].contents() == [0, 1, 1, 0]
    assert fields["trit.imported"].contents() == 1
    assert [one.imported for one in stored] == [False, False, True, False]
    assert [found[0] for found in _stored(path).values()] == [Type.Q8_0, Type.TRIT1, Type.TRIT1, Type.F32]


class _Broken:
    """A method whose blocks are no encodings."""

    name = "broken"

    def quantize(self, tensor: SourceTensor, values: np.ndarray, depth: int, workers: Workers) -> np.ndarray:
        return np.ones((len(values), values.shape[1] // 64 * 14), np.uint16).view(np.uint8)

    def remarks(self) -> list[str]:
        return []


@pytest.mark.build
def test_blocks_that_are_not_valid_are_never_published(tmp_path: Path) -> None:
    values = np.full((2, 64), 0.1, np.float32)
    with pytest.raises(TritError, match=r"x\.gguf is not written, .*blk\.0\.ffn_up\.weight.* is not TRIT2 data"):
        _write(tmp_path, _tensor("blk.0.ffn_up.weight", values), quantizer=_Broken())
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_the_source_with_a_bad_scale_are_never_published(tmp_path: Path) -> None:
    block = np.zeros((1, 34), np.uint8)
    block[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    tensor = SourceTensor("odd.weight", (1, 32), Kind.KEPT, lambda: block, Type.Q8_0)
    with pytest.raises(TritError, match=r"x\.gguf is not written, .*odd\.weight.* NaN or infinite"):
        _write(tmp_path, tensor)
    assert list(tmp_path.iterdir()) == []
