"""Checkpoints that already lie on a lattice of trits keep their codes; no others are taken for such."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import depths

from tritconv.codec import unpack
from tritconv.errors import RangeError
from tritconv.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS
from tritconv.lattice import Lattice, LatticeImport, lattice_depth, read_lattice
from tritconv.methods.search import Search
from tritconv.methods.search import quantize as search
from tritconv.methods.uniform import Uniform, encode
from tritconv.model_file import read_model_file
from tritconv.plan import Kind, SourceTensor
from tritconv.workers import Workers


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


ROUNDINGS = {
    "float16": lambda values: values.astype(np.float16),
    "bfloat16": _bfloat16,
    "float32": lambda values: values,
}


def _values(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return (np.repeat(scales, 16, axis=1) * codes).astype(np.float32)


def _weights(rng: np.random.Generator, tails: float = 0.5) -> np.ndarray:
    """float32 (300, 192)."""
    return (0.03 * rng.standard_normal((300, 192)) * np.exp(tails * rng.standard_normal((300, 1)))).astype(np.float32)


def _read(values: np.ndarray, depth: int) -> Lattice | None:
    with Workers(2) as workers:
        return read_lattice(values, depth, workers)


def _import(values: np.ndarray, depth: int) -> tuple[np.ndarray, LatticeImport]:
    lattice_import = LatticeImport(Search())
    tensor = SourceTensor("blk.0.ffn_up.weight", values.shape, Kind.MATRIX, lambda: values)
    with Workers(2) as workers:
        return lattice_import.quantize(tensor, values, depth, workers), lattice_import


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_codes_are_found(depth: int, rounding: str) -> None:
    rng = np.random.default_rng(depth)
    for tails in (0.0, 0.5, 1.0):
        weights = _weights(rng, tails)
        weights[7, 32:64] = 0
        codes, scales = encode(weights, depth)
        values = ROUNDINGS[rounding](_values(codes, scales))
        assert lattice_depth(values) == depth
        found = _read(values, depth)
        assert found is not None
        assert np.array_equal(found.codes, codes)
        assert np.allclose(found.scales, scales, rtol=4e-3)


def test_the_scales_of_the_matrix_decide_between_readings() -> None:
    """Codes 2 and 4 of scale s are codes 1 and 2 of scale 2 s: the codebook has only one of them."""
    rng = np.random.default_rng(0)
    book = 0.01 * 1.17 ** np.arange(27)
    book = book[np.abs(book / book[4] - 2) > 0.05][:20]  # without twice the fifth scale
    codes = rng.integers(-4, 5, (200, 64)).astype(np.int8)
    codes[:, ::16] = 4  # certain, with a code of 3 beside it
    codes[:, 1::16] = 3
    scales = book[rng.integers(0, len(book), (200, 4))].astype(np.float32)
    scales[:50, 0] = book[4]
    codes[:50, :16] = 2 * rng.integers(-1, 2, (50, 16))  # -2, 0, 2: codes 1, 2, 3 and 4 would all do
    codes[:50, 0] = 2
    found = _read(ROUNDINGS["float16"](_values(codes, scales)), 2)
    assert found is not None
    assert np.array_equal(found.codes, codes)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["float16", "bfloat16", "float32"]), st.floats(0, 2), depths)
def test_random_weights_are_on_no_lattice(seed: int, rounding: str, tails: float, depth: int) -> None:
    values = ROUNDINGS[rounding](_weights(np.random.default_rng(seed), tails))
    assert lattice_depth(values) is None
    assert _read(values, depth) is None


@pytest.mark.parametrize("qtype", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0, Type.TQ1_0])
def test_other_quantized_weights_are_on_no_lattice(qtype: Type) -> None:
    """Some have few levels too, but a scale of its own for each block."""
    rng = np.random.default_rng(0)
    weights = (0.05 * rng.standard_normal((300, 256))).astype(np.float32)
    values = quants.dequantize(quants.quantize(weights, qtype), qtype)
    assert lattice_depth(values) is None
    assert lattice_depth(values.astype(np.float16)) is None


def test_a_lattice_of_one_scale() -> None:
    """As models that were trained with three levels have."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (100, 128)).astype(np.int8)
    values = (codes * np.float32(0.0371)).astype(np.float16)
    assert lattice_depth(values) == 1
    found = _read(values, 1)
    assert found is not None
    assert np.array_equal(found.codes, codes)


@pytest.mark.parametrize("depth", DEPTHS)
def test_zeros_are_no_lattice(depth: int) -> None:
    assert lattice_depth(np.zeros((10, 64), np.float16)) is None
    data, lattice_import = _import(np.zeros((10, 64), np.float16), depth)
    assert lattice_import.remarks() == []
    assert not unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth])).codes.any()


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_are_those_of_the_method(depth: int) -> None:
    weights = _weights(np.random.default_rng(1))
    codes, scales = encode(weights, depth)
    data, lattice_import = _import(_values(codes, scales), depth)
    tensor = SourceTensor("blk.0.ffn_up.weight", weights.shape, Kind.MATRIX, lambda: weights)
    with Workers(2) as workers:
        assert np.array_equal(data, Uniform().quantize(tensor, weights, depth, workers))
    assert lattice_import.n_imported == 1


def test_the_remark_says_how_far_the_scales_moved() -> None:
    codes, scales = encode(_weights(np.random.default_rng(1)), 2)
    data, lattice_import = _import(_values(codes, scales), 2)
    stored = unpack(2, data.reshape(-1, BYTES_PER_BLOCK[2])).group_scales().reshape(scales.shape)
    off = np.abs(stored / scales - 1)
    (remark,) = lattice_import.remarks()
    assert f"within 6% for {(off < 0.06).mean():.1%} of the groups, {off.max():.1%} off at worst" in remark
    assert (off < 0.06).mean() > 0.75


def test_a_weight_off_the_lattice_outside_the_sample() -> None:
    rng = np.random.default_rng(0)
    codes, scales = encode((0.05 * rng.standard_normal((1024, 64))).astype(np.float32), 2)
    values = _values(codes, scales).astype(np.float16)
    values[1, 3] *= np.float16(1.1)
    assert values[1, 3] != 0
    assert lattice_depth(values) == 2
    data, lattice_import = _import(values, 2)
    assert lattice_import.n_imported == 0
    assert np.array_equal(data, search(values.astype(np.float32), 2))


@pytest.mark.parametrize(("found", "asked"), [(1, 2), (2, 1), (3, 4), (4, 2)])
def test_another_depth(found: int, asked: int) -> None:
    values = _values(*encode(_weights(np.random.default_rng(2)), found)).astype(np.float16)
    data, lattice_import = _import(values, asked)
    assert np.array_equal(data, search(values.astype(np.float32), asked))
    assert lattice_import.n_imported == 0
    (remark,) = lattice_import.remarks()
    assert f"on a lattice of {found} trits, not {asked}: --depth {found} keeps their codes" in remark


def test_experts() -> None:
    rng = np.random.default_rng(0)
    matrices = [encode(_weights(rng), 3) for _ in range(4)]
    values = np.stack([_values(*matrix) for matrix in matrices]).astype(np.float16)
    data, lattice_import = _import(values, 3)
    got = unpack(3, data.reshape(-1, BYTES_PER_BLOCK[3])).codes.reshape(values.shape)
    assert all(np.array_equal(got[i], matrices[i][0]) for i in range(4))
    assert lattice_import.n_imported == 1
    values[2] = rng.standard_normal(values[2].shape)
    assert _import(values, 3)[1].n_imported == 0


def test_scales_out_of_range() -> None:
    codes, scales = encode(_weights(np.random.default_rng(0)), 2)
    with pytest.raises(RangeError, match="above"):
        _import(_values(codes, 1000 * scales), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_published_checkpoint(depth: int, dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    codes = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            codes[name], scales = encode(tensor.float().numpy(), depth)
            tensors[name] = torch.from_numpy(_values(codes[name], scales)).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    path = tmp_path / "out.gguf"
    done = tritconv("hf-to-gguf", folder, "--depth", depth, "-o", path)
    assert done.returncode == 0, done.stderr
    assert "14 tensors lie on a lattice of trits: their codes are kept" in " ".join(done.stdout.split())
    assert read_model_file(path).metadata["trit.imported"] == 14
    stored = {t.name: t.data for t in GGUFReader(path).tensors if t.tensor_type == Type[f"TRIT{depth}"]}
    assert len(stored) == len(codes) == 14
    names = {"o_proj": "attn_output", "v_proj": "attn_v", "q_proj": "attn_q", "k_proj": "attn_k"}
    names |= {f"{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
    for name, wanted in codes.items():
        _, _, layer, _, matrix, _ = name.split(".")
        data = np.asarray(stored[f"blk.{layer}.{names[matrix]}.weight"])
        got = unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth])).codes.reshape(wanted.shape)
        if matrix in ("q_proj", "k_proj"):  # llama.cpp orders their rows in another way
            got, wanted = got[np.lexsort(got.T)], wanted[np.lexsort(wanted.T)]
        assert np.array_equal(got, wanted)
    assert all(np.abs(c).max() == CODE_MAX[depth] for c in codes.values())


def test_other_checkpoints_import_nothing(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    done = tritconv("hf-to-gguf", checkpoint, "--depth", 2, "-o", path)
    assert done.returncode == 0, done.stderr
    assert "lattice" not in done.stdout
    assert read_model_file(path).metadata["trit.imported"] == 0
