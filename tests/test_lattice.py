"""Checkpoints that already lie on a lattice of trits keep their codes; no others are taken for such."""

import re
import shutil
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import torch
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import depths
from tensors import finish, tensor_of

from tritconv.lattice import Lattice, lattice_depth, read_lattice
from tritconv.methods import lattice_import
from tritconv.methods.uniform import Uniform, encode
from tritconv.workers import Workers
from tritcore.codec import unpack
from tritcore.encoder import quantize as search
from tritcore.format import BYTES_PER_BLOCK, CODE_MAX, DEPTHS
from tritcore.gguf_header import read_model_file

pytestmark = pytest.mark.build


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


def _finish(values: np.ndarray, depth: int) -> tuple[np.ndarray, bool, list[str]]:
    """The blocks of a matrix, whether its codes were kept, and the remarks."""
    found, remarks = finish(values, depth)
    assert found.blocks is not None, found.reason
    return found.blocks, found.imported, remarks


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
    data, _, remarks = _finish(np.zeros((10, 64), np.float16), depth)
    assert remarks == []
    assert not unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth])).codes.any()


@pytest.mark.parametrize("depth", DEPTHS)
def test_blocks_are_those_of_the_method(depth: int) -> None:
    weights = _weights(np.random.default_rng(1))
    codes, scales = encode(weights, depth)
    with Workers(2) as workers:
        imported = lattice_import._import(_values(codes, scales), depth, workers)
        assert imported is not None
        assert np.array_equal(imported.data, Uniform().quantize(tensor_of(weights), weights, depth, workers))


def test_the_remark_says_how_far_the_scales_moved() -> None:
    codes, scales = encode(_weights(np.random.default_rng(1)), 2)
    data, _, remarks = _finish(_values(codes, scales), 2)
    stored = unpack(2, data.reshape(-1, BYTES_PER_BLOCK[2])).group_scales().reshape(scales.shape)
    off = np.abs(stored / scales - 1)
    (remark,) = remarks
    assert f"within 6% for {(off < 0.06).mean():.1%} of the groups, {off.max():.1%} off at worst" in remark
    assert (off < 0.06).mean() > 0.75


def test_a_weight_off_the_lattice_outside_the_sample() -> None:
    rng = np.random.default_rng(0)
    codes, scales = encode((0.05 * rng.standard_normal((1024, 64))).astype(np.float32), 2)
    values = _values(codes, scales).astype(np.float16)
    values[1, 3] *= np.float16(1.1)
    assert values[1, 3] != 0
    assert lattice_depth(values) == 2
    data, imported, _ = _finish(values, 2)
    assert not imported
    assert np.array_equal(data, search(values.astype(np.float32), 2))


def _relative_error(data: np.ndarray, values: np.ndarray, depth: int) -> float:
    stored = unpack(depth, data.reshape(-1, BYTES_PER_BLOCK[depth])).decode().reshape(values.shape)
    return float(np.linalg.norm(stored - values) / np.linalg.norm(values))


def _sources() -> dict[str, np.ndarray]:
    """float32 (300, 192), of types with few levels."""
    rng = np.random.default_rng(0)
    weights = _weights(rng)
    step = np.abs(weights).max() / 7
    found = {
        "MXFP4": quants.dequantize(_mxfp4(rng, (300, 192)), Type.MXFP4),
        "int4, one scale": np.rint(weights / step).clip(-8, 7) * step,
        "int8, one scale": np.rint(weights / step * 16) * step / 16,
        "int4, a scale for each row": np.rint(weights / np.abs(weights).max(1, keepdims=True) * 7) / 7,
        "ternary, one scale": rng.integers(-1, 2, weights.shape) * 0.0371,
        "powers of two": 2.0 ** rng.integers(-6, 0, weights.shape),
        "two values": rng.choice(np.array([-0.5, 0.25]), weights.shape),
        "one value": np.full(weights.shape, 0.3),
        "zeros among others": np.where(rng.random(weights.shape) < 0.9, 0, np.sign(weights) * 0.01),
    }
    for depth in DEPTHS:
        found[f"the codec's, depth {depth}"] = _values(*encode(weights, depth))
        found[f"decoded TRIT{depth}"] = quants.dequantize(search(weights, depth), Type[f"TRIT{depth}"])
    for qtype in (Type.Q4_0, Type.Q8_0):
        found[qtype.name] = quants.dequantize(quants.quantize(weights, qtype), qtype)
    return {name: values.astype(np.float32) for name, values in found.items()}


def _mxfp4(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """uint8 (rows, bytes per row): blocks of 32 weights, an exponent and 16 bytes of two codes each."""
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 32, 17), dtype=np.uint8)
    blocks[..., 0] = rng.integers(118, 124, blocks.shape[:2])
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_import_is_no_worse_than_the_search_and_no_worse_depth_is_advised(depth: int) -> None:
    for name, values in _sources().items():
        data, _, remarks = _finish(values, depth)
        error = _relative_error(data, values, depth)
        assert error <= _relative_error(search(values, depth), values, depth) * (1 + 1e-6), name
        for remark in remarks:
            if advised := re.search(r"--depth (\d) keeps their codes", remark):
                better = int(advised[1])
                at_better, imported, _ = _finish(values, better)
                assert imported, name
                assert _relative_error(at_better, values, better) <= error * (1 + 1e-6), name


def test_ternary_weights_are_imported_and_mxfp4_is_not() -> None:
    sources = _sources()
    assert _finish(sources["ternary, one scale"], 1)[1]
    assert lattice_depth(sources["MXFP4"]) == 3
    assert not _finish(sources["MXFP4"], 3)[1]


@pytest.mark.parametrize(("found", "asked"), [(1, 2), (2, 1), (3, 4), (4, 2)])
def test_another_depth(found: int, asked: int) -> None:
    values = _values(*encode(_weights(np.random.default_rng(2)), found)).astype(np.float16)
    data, imported, remarks = _finish(values, asked)
    assert np.array_equal(data, search(values.astype(np.float32), asked))
    assert not imported
    if (found, asked) == (2, 1):
        (remark,) = remarks
        assert "on a lattice of 2 trits, not 1: --depth 2 keeps their codes" in remark
    else:  # the search comes closer, with the depth asked for or with that of the lattice
        assert remarks == []


def test_experts() -> None:
    rng = np.random.default_rng(0)
    matrices = [encode(_weights(rng), 2) for _ in range(4)]
    values = np.stack([_values(*matrix) for matrix in matrices]).astype(np.float16)
    data, imported, _ = _finish(values, 2)
    got = unpack(2, data.reshape(-1, BYTES_PER_BLOCK[2])).codes.reshape(values.shape)
    assert all(np.array_equal(got[i], matrices[i][0]) for i in range(4))
    assert imported
    values[2] = rng.standard_normal(values[2].shape)
    assert not _finish(values, 2)[1]


def test_scales_out_of_range() -> None:
    codes, scales = encode(_weights(np.random.default_rng(0)), 2)
    found, _ = finish(_values(codes, 1000 * scales), 2)
    assert found.blocks is None
    assert found.reason is not None
    assert "above the range" in found.reason


def _published(folder: Path, checkpoint: Path, depth: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Make a checkpoint whose matrices lie on lattices, of another; their codes."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    codes = {}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            codes[name], scales = encode(tensor.float().numpy(), depth)
            tensors[name] = torch.from_numpy(_values(codes[name], scales)).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2])  # with more, the search comes closer
def test_a_published_checkpoint(depth: int, dtype: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    codes = _published(folder, checkpoint, depth, dtype)
    path = tmp_path / "out.gguf"
    done = tritconv("hf-to-gguf", folder, "--fast", "--depth", depth, "-o", path)
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


@pytest.mark.slow
def test_what_is_calibrated_is_not_imported(checkpoint: Path, tmp_path: Path) -> None:
    """The trained blocks and norms belong together."""
    folder, text = tmp_path / "published", tmp_path / "text.txt"
    codes = _published(folder, checkpoint, 2, torch.float16)
    text.write_text("\n\n".join(topics.topics.values())[:60_000], encoding="utf-8")
    path = tmp_path / "out.gguf"
    calibration = ("--calibrate", text, "--calib-tokens", 2048, "--calib-seq", 64, "--method", "tune", "--epochs", 1)
    done = tritconv(
        *("hf-to-gguf", folder, "--depth", 2, "-o", path, *calibration),
        TRITCONV_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert "lattice" not in done.stdout
    metadata = read_model_file(path).metadata
    assert (metadata["trit.method"], metadata["trit.imported"]) == ("tune", 0)
    stored = {t.name: np.asarray(t.data) for t in GGUFReader(path).tensors}
    down = unpack(2, stored["blk.1.ffn_down.weight"].reshape(-1, BYTES_PER_BLOCK[2])).codes
    assert not np.array_equal(down.ravel(), codes["model.layers.1.mlp.down_proj.weight"].ravel())


def test_other_checkpoints_import_nothing(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", path)
    assert done.returncode == 0, done.stderr
    assert "lattice" not in done.stdout
    assert read_model_file(path).metadata["trit.imported"] == 0
