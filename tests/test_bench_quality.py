"""bench/: the bases of the quality comparisons, types laid across rows, and files that are made once."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import llama_quantize, logits, make_checkpoint, to_f16_gguf, tritconv
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from tiny_gguf import write_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import across_rows
import dither
import made
import quality
import rotate
from command import exit_status
from tritcore import ggml
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file
from tritrun.comparison import contents

pytestmark = pytest.mark.build

Q3_K = GGMLQuantizationType.Q3_K


def tensors(path: Path) -> dict[str, np.ndarray]:
    """float32 values of each tensor of a GGUF file."""
    return {t.name: quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def q4_1(f16_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as the published SmolLM2 is: layers in Q4_1, embeddings and output matrix in Q8_0."""
    target = tmp_path_factory.mktemp("q4_1") / "tiny-Q4_1.gguf"
    q8_0 = ("--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")
    done = llama_quantize("--pure", *q8_0, f16_gguf, target, "Q4_1")
    assert done.returncode == 0, done.stderr
    return target


def dithered(source: Path, folder: Path, *options: str) -> tuple[Path, Path]:
    """The GGUF file and the checkpoint that the command makes."""
    dither.make(dither.parse(["--source", str(source), "--output", str(folder), *options]))
    name = "plain" if "--no-noise" in options else "base"
    return folder / f"{name}-F16.gguf", folder / f"{name}-hf"


def test_noise_is_one_step_wide_and_uniform(q4_1: Path, tmp_path: Path) -> None:
    gguf, _ = dithered(q4_1, tmp_path)
    before, after = tensors(q4_1), tensors(gguf)
    blocks = {t.name: t.data for t in GGUFReader(q4_1).tensors if t.tensor_type is GGMLQuantizationType.Q4_1}
    assert len(blocks) == 2 * 7
    in_steps = {name: (after[name] - before[name]) / dither.steps(data) for name, data in blocks.items()}
    every = np.concatenate([noise.ravel() for noise in in_steps.values()])
    assert np.abs(every).max() < 0.52  # float16 rounds the sum
    share = np.histogram(every, bins=10, range=(-0.5, 0.5))[0] / every.size
    np.testing.assert_allclose(share, 0.1, atol=0.005)
    q, k = in_steps["blk.0.ffn_gate.weight"], in_steps["blk.0.ffn_up.weight"]
    assert abs(np.corrcoef(q.ravel(), k.ravel())[0, 1]) < 0.02
    for name in before.keys() - blocks.keys():
        np.testing.assert_array_equal(after[name], before[name].astype(np.float16))
    assert read_model_file(gguf).metadata["bench.noise"] == "uniform, one step of the Q4_1 source wide, seed 0"


def test_steps_are_those_of_the_type() -> None:
    weights = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    blocks = quants.quantize(weights, GGMLQuantizationType.Q4_1)
    levels = quants.dequantize(blocks, GGMLQuantizationType.Q4_1).reshape(-1, 32)
    step = (levels.max(1) - levels.min(1)) / 15  # the encoder uses both ends of a block
    np.testing.assert_allclose(dither.steps(blocks), np.repeat(step, 32).reshape(3, 64), rtol=1e-5)


def test_a_seed_gives_the_same_base(q4_1: Path, tmp_path: Path) -> None:
    files = [dithered(q4_1, tmp_path / str(i), "--seed", seed) for i, seed in enumerate(("7", "7", "8"))]
    (a, a_folder), (b, b_folder), (other, _) = files
    assert a.read_bytes() == b.read_bytes() != other.read_bytes()
    assert (a_folder / "model.safetensors").read_bytes() == (b_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [(), ("--no-noise",)], ids=["noise", "plain"])
def test_checkpoint_and_file_hold_the_same_weights(q4_1: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    gguf, folder = dithered(q4_1, tmp_path, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((gguf.name, folder.name))
    by_llama = tensors(to_f16_gguf(folder, tmp_path / "converted.gguf"))  # which permutes the rows of q and k
    ours = tensors(gguf)
    assert by_llama.keys() == ours.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(by_llama[name], values, err_msg=name)
    dithered(q4_1, tmp_path, *options)  # replaces what is there
    if options:
        plain = tensors(q4_1)
        assert all(np.array_equal(ours[name], plain[name].astype(np.float16)) for name in plain)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "none.gguf is missing: python models/fetch.py"),
        ("f16", "has no Q4_1 matrices"),
        ("text", "not a GGUF file"),
    ],
)
def test_sources_that_cannot_be_dithered(source: str | None, message: str, tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    if source is not None:
        path.write_bytes(tiny_model.read_bytes() if source == "f16" else b"text")
    with pytest.raises(TritError, match=message):
        dithered(path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_rows_of_whole_blocks_are_encoded_as_they_are() -> None:
    rng = np.random.default_rng(1)
    weights, importance = rng.normal(size=(6, 512)).astype(np.float32), rng.uniform(0.1, 10, 512).astype(np.float32)
    for columns in (None, importance):
        expected = quants.dequantize(ggml.quantize(weights, Q3_K, columns), Q3_K)
        np.testing.assert_array_equal(across_rows.across_rows(weights, Q3_K, columns, threads=4), expected)


def test_rows_of_other_lengths_are_laid_end_to_end() -> None:
    rng = np.random.default_rng(2)
    weights, importance = rng.normal(size=(8, 192)).astype(np.float32), rng.uniform(0.1, 10, 192).astype(np.float32)
    decoded = across_rows.across_rows(weights, Q3_K, importance)
    blocks, weighting = weights.reshape(6, 256), np.tile(importance, 8).reshape(6, 256)
    for block, columns, got in zip(blocks, weighting, decoded.reshape(6, 256), strict=True):
        expected = quants.dequantize(ggml.quantize(block[None], Q3_K, columns), Q3_K)[0]
        np.testing.assert_array_equal(got, expected)


def finish(writer: GGUFWriter) -> None:
    """Write the file of a writer that has been told all."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_imatrix(path: Path, entries: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """An imatrix as llama-imatrix writes it: for each tensor the sums (matrices, n) and the counts (matrices, 1)."""
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (sums, counts) in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts.astype(np.float32))
    finish(writer)
    return path


def random_imatrix(model: Path, path: Path) -> Path:
    """An imatrix of a model's layers with random sums."""
    rng = np.random.default_rng(3)
    matrices = {
        t.name: t.shape for t in read_model_file(model).tensors if t.name.startswith("blk.") and len(t.shape) > 1
    }
    entries = {}
    for name, shape in matrices.items():
        n = shape[2] if len(shape) > 2 else 1
        entries[name] = (rng.uniform(0.1, 10, (n, shape[0])), rng.integers(1, 9, (n, 1)))
    return write_imatrix(path, entries)


def run(base: Path, folder: Path, *options: str) -> Path:
    """The one file that the command makes."""
    across_rows.make(across_rows.parse(["--base", str(base), "--output", str(folder), *options]))
    (path,) = folder.iterdir()
    return path


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["without", "imatrix"])
def test_it_makes_what_llama_quantize_does_where_that_can(with_imatrix: bool, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", hidden=256)
    options = ["--imatrix", str(random_imatrix(base, tmp_path / "imatrix.gguf"))] if with_imatrix else []
    made = run(base, tmp_path / "out", "--type", "Q3_K", *options)
    assert made.name == ("Q3_K-imatrix-across.gguf" if with_imatrix else "Q3_K-across.gguf")

    q8_0 = ("--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")
    done = llama_quantize("--pure", *q8_0, *options, base, tmp_path / "expected.gguf", "Q3_K_S", 1)
    assert done.returncode == 0, done.stderr
    expected, got = tensors(tmp_path / "expected.gguf"), tensors(made)
    assert expected.keys() == got.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values.astype(np.float16) if "blk" in name else values, err_msg=name)

    model = read_model_file(made)
    types = {tensor.name: tensor.type.name for tensor in model.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "F16"
    assert model.metadata["trit.stand_in.type"] == "Q3_K"
    assert model.metadata["trit.stand_in.bits_per_weight"] == 3.4375
    assert model.metadata["bench.across_rows.imatrix"] is with_imatrix
    assert np.isfinite(logits(made, "any text")).all()


def test_each_expert_has_its_own_importances(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "mixtral", "Mixtral")
    base = to_f16_gguf(checkpoint, tmp_path / "base.gguf")
    name = "blk.0.ffn_down_exps.weight"
    imatrix = random_imatrix(base, tmp_path / "imatrix.gguf")
    made = run(base, tmp_path / "out", "--type", "Q3_K", "--imatrix", str(imatrix))
    got, weights = tensors(made)[name], tensors(base)[name]
    statistics = {t.name: t.data for t in GGUFReader(imatrix).tensors}
    for expert, matrix in enumerate(weights):
        importance = statistics[f"{name}.in_sum2"][expert] / statistics[f"{name}.counts"][expert]
        expected = across_rows.across_rows(matrix, Q3_K, importance)
        np.testing.assert_array_equal(got[expert], expected.astype(np.float16))
        other = across_rows.across_rows(matrix, Q3_K, importance[::-1])
        assert not np.array_equal(expected, other)


def test_the_imatrix_of_another_model(f16_gguf: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", hidden=256)
    imatrix = random_imatrix(other, tmp_path / "imatrix.gguf")
    options = argparse.Namespace(base=f16_gguf, output=tmp_path / "out", type=["Q4_K"], imatrix=imatrix, threads=1)
    with pytest.raises(TritError, match=r"has 1 x (256|512) columns, not 1 x (192|320); .*from the base itself"):
        across_rows.make(options)
    options.imatrix = write_imatrix(tmp_path / "short.gguf", {"none.weight": (np.ones((1, 4)), np.ones((1, 1)))})
    with pytest.raises(TritError, match=r"blk\.0\..* is missing"):
        across_rows.make(options)
    assert not list((tmp_path / "out").iterdir())


def test_a_matrix_without_whole_blocks(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", hidden=72)
    with pytest.raises(TritError, match=r"base.gguf: blk.0.attn_q.weight has 5184 weights.*Q3_K's block of 256"):
        run(base, tmp_path / "out", "--type", "Q3_K")


def test_decoded_files_hold_the_same_weights_in_float16(f16_gguf: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny-TRIT3.gguf"
    done = tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", 3, "-o", source)
    assert done.returncode == 0, done.stderr
    across_rows.make(across_rows.parse(["--decode", str(source), "-o", str(tmp_path)]))
    decoded = tmp_path / "tiny-TRIT3-decoded.gguf"
    before, after = tensors(source), tensors(decoded)
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-3, atol=1e-7)
    about = contents(read_model_file(decoded))
    assert about.stand_in
    assert about.layers == {"TRIT3": 1.0}
    assert about.layer_bits == pytest.approx(5.25)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    weights = np.ones((4, 64), np.float16)
    weights[1, 2] = np.inf
    writer = GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", weights)
    finish(writer)
    with pytest.raises(TritError, match=r"blk\.0\.ffn_up\.weight holds NaN or infinity"):
        run(tmp_path / "base.gguf", tmp_path / "out", "--type", "Q3_K")
    assert not list((tmp_path / "out").iterdir())


def test_types_that_need_an_imatrix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        across_rows.parse(["--base", "F16.gguf", "-o", str(tmp_path), "--type", "IQ2_XS"])
    assert stopped.value.code == 2
    assert "IQ2_XS does not go without --imatrix" in capsys.readouterr().err


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = across_rows.parse(["--base", str(tmp_path / "none.gguf"), "-o", str(tmp_path), "--type", "Q3_K"])
    assert exit_status(lambda: across_rows.make(options)) == 1
    assert capsys.readouterr().err.strip() == f"error: {tmp_path / 'none.gguf'}: no such file"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Digests of the programs and of tritconv's code."""
    digests = {"programs": "a", "sources": "b"}
    monkeypatch.setattr(made, "fingerprint", lambda: digests["programs"])
    monkeypatch.setattr(made, "digest_of_sources", lambda: digests["sources"])
    return digests


def test_files_are_made_again_when_anything_that_they_depend_on_changes(
    tmp_path: Path, programs: dict[str, str]
) -> None:
    source, script, target = tmp_path / "source", tmp_path / "script.py", tmp_path / "out" / "target"
    target.parent.mkdir()
    source.write_text("one")
    script.write_text("pass")
    runs = 0

    def run(command: Sequence[object]) -> None:
        nonlocal runs
        runs += 1
        assert not target.with_name("target.made").exists()
        target.write_text(source.read_text())

    def is_made(*options: object) -> bool:
        before = runs
        made.make([target], [script, source, "-o", target, *options], [source], run)
        return runs > before

    assert is_made()
    assert not is_made()
    for change in (
        lambda: source.write_text("two"),
        lambda: script.write_text("pass  # another"),
        lambda: target.write_text("by somebody else"),
        lambda: target.unlink(),
        lambda: target.with_name("target.made").write_text("damaged"),
        lambda: programs.update(programs="c"),
        lambda: programs.update(sources="d"),
    ):
        change()
        assert is_made()
        assert not is_made()
    assert is_made("--another", "option")
    source.unlink()
    with pytest.raises(TritError, match="source is missing"):
        is_made()


class _Interrupted(Exception):
    pass


@pytest.mark.usefixtures("programs")
def test_an_interrupted_comparison_is_completed_and_a_quick_one_shares_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("calibrate.txt", "text.txt", "model.gguf"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(quality, "_SOURCE", tmp_path / "model.gguf")
    monkeypatch.setattr(quality, "find_tool", Path)
    monkeypatch.setattr(quality, "as_markdown", lambda models: "")
    commands: list[list[str]] = []
    left = [5]

    def run(command: Sequence[object]) -> None:
        words = [str(word) for word in command]
        commands.append(words)
        if not left[0]:
            raise _Interrupted
        left[0] -= 1
        out = Path(words[words.index("-o") + 1]) if "-o" in words else None
        if "compare" in words:
            Path(words[words.index("--json") + 1]).write_text(json.dumps({"models": []}))
        elif words[0].endswith("dither.py"):
            assert out is not None
            (out / "base-hf").mkdir(exist_ok=True)
            (out / "base-hf" / "model.safetensors").write_text("weights")
            (out / "base-F16.gguf").write_text("base")
        elif words[0].endswith("across_rows.py"):
            assert out is not None
            if "--type" in words:
                qtype = words[words.index("--type") + 1]
                (out / across_rows.across_name(qtype, "--imatrix" in words)).write_text(qtype)
            else:
                (out / across_rows.decoded_name(Path(words[words.index("--decode") + 1]))).write_text("decoded")
        else:
            assert out is not None
            out.write_text(" ".join(words))

    monkeypatch.setattr(quality, "run", run)

    def compare(*options: str) -> list[list[str]]:
        commands.clear()
        texts = ["--calibrate", str(tmp_path / "calibrate.txt"), "--text", str(tmp_path / "text.txt")]
        monkeypatch.setattr(sys, "argv", ["quality.py", *texts, "-o", str(tmp_path / "out"), *options])
        quality.main()
        return list(commands)

    for steps in (5, 6):  # within the methods, and among the types across rows
        left[0] = steps
        with pytest.raises(_Interrupted):
            compare()
    left[0] = 100
    whole = compare()[-1]
    n_models = sum("=" in word for word in whole)
    assert n_models == len(quality._METHODS) + len(quality._ACROSS_ROWS) + 1 + len(quality._DECODED)
    assert len({word.partition("=")[0] for word in whole if "=" in word}) == n_models
    assert [words[2] for words in compare()] == ["compare"]
    quick = compare("--quick")
    assert len(quick) == n_models + 3
    assert all(str(tmp_path / "out" / "quick") in " ".join(words) for words in quick)
    assert [words[2] for words in compare()] == ["compare"]
    (tmp_path / "calibrate.txt").write_text("another text")
    again = [" ".join(words) for words in compare()]
    assert any("llama-imatrix" in words for words in again)
    assert not any("dither.py" in words or "search" in words.split("compare")[0] for words in again[:-1])


def test_a_rotated_model_computes_the_same(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = LlamaConfig(
        **sizes, num_hidden_layers=2, intermediate_size=64, vocab_size=96, tie_word_embeddings=True, rms_norm_eps=1e-2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(tmp_path / "small")
    command = [tmp_path / "small", "-o", tmp_path / "large", "--hidden", "64", "--groups", "4"]
    rotate.make(rotate.parse([str(word) for word in command]))
    large = LlamaForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32)
    assert (large.config.hidden_size, large.config.num_attention_heads) == (64, 8)
    tokens = torch.arange(40)[None] % 96
    with torch.no_grad():
        expected, got = model(tokens).logits, large(tokens).logits
    assert float((got - expected).abs().max()) < 0.01 * float(expected.abs().max())
