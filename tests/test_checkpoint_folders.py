"""Folders as people have them: weights in files of any layout and scheme, settings that do not fit, adapters."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_bpe_tokenizer, make_checkpoint, to_f16_gguf, tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from tritconv.convert import Job, hf_to_gguf
from tritconv.plan import Plan
from tritconv.sources import lazy
from tritconv.sources.checkpoint import find_checkpoint
from tritconv.sources.mapped import open_checkpoint
from tritconv.sources.source import Kind, Source, SourceTensor
from tritcore.errors import TritError

Weights = dict[str, torch.Tensor]

UP = "model.layers.1.mlp.up_proj.weight"
UP_GGUF = "blk.1.ffn_up.weight"
ROWS = 600  # of the tiny checkpoint's embeddings, and its tokens


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be changed."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def _opened(folder: Path) -> Source:
    return open_checkpoint(find_checkpoint(str(folder)))


def _refused(folder: Path, *words: str) -> None:
    with pytest.raises(TritError) as caught:
        _opened(folder)
    (line,) = str(caught.value).splitlines()
    for word in words:
        assert word in line


def _converted(folder: Path) -> dict[str, Any]:
    """The tensors of the file that comes of a checkpoint, by name. llama.cpp has been asked whether it loads."""
    q8_0 = Type.Q8_0
    written = hf_to_gguf(str(folder), None, Job(Plan(2, q8_0, q8_0, q8_0), folder.with_suffix(".gguf"), threads=1))
    assert written is not None
    return {tensor.name: tensor for tensor in GGUFReader(written.path).tensors}


def _tensor(found: Source, name: str) -> SourceTensor:
    return next(tensor for tensor in found.tensors if tensor.name == name)


def test_tensors_are_read_again_and_in_part(checkpoint: Path, tmp_path: Path) -> None:
    """Llama's q and k are permuted by the converter: of these, a sample takes the whole."""
    folder = shutil.copytree(checkpoint, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for place in (checkpoint, folder):
        for tensor in _opened(place).tensors:
            whole = tensor.load()
            assert np.array_equal(tensor.load(), whole), tensor.name
            if tensor.kind is Kind.MATRIX:
                assert np.array_equal(tensor.sample(7)[0], whole[::7]), tensor.name


def test_a_sample_reads_few_rows(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (down,) = (tensor for tensor in _opened(checkpoint).tensors if tensor.name == "blk.0.ffn_down.weight")
    monkeypatch.setattr(lazy.LazyLoad, "__call__", lambda _: pytest.fail("read the whole"))
    assert down.sample(7).shape == (1, -(-down.shape[0] // 7), down.shape[1])


def _values(found: Source) -> dict[str, bytes]:
    return {tensor.name: np.asarray(tensor.load()).tobytes() for tensor in found.tensors}


def _weights(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def _save(folder: Path, weights: Weights) -> None:
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def _configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def _split(folder: Path, names: Iterable[str], index: bool = True) -> list[Path]:
    """Move the weights into files of these names, in turn."""
    weights = _weights(folder)
    (folder / "model.safetensors").unlink()
    files = [folder / name for name in names]
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files):
        part = {name: weights[name] for name in sorted(weights)[number :: len(files)]}
        save_file(part, file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file.name)
    if index:
        _write_index(folder, weight_map)
    return files


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def _read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


# files


@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_is_named_with_its_base(with_config: bool, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "who/base"}')
    if not with_config:
        (folder / "config.json").unlink()
    _refused(folder, "LORA adapter", "who/base", "merge_and_unload")


def test_an_adapter_beside_its_base_is_no_merged_model(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    _refused(folder, "adapter", "merge_and_unload")


def test_the_command_line_says_it_in_one_line(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    done = tritconv("hf-to-gguf", folder, "--fast", "--depth", 2, "-o", folder / "x.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "merge_and_unload" in line
    assert not (folder / "x.gguf").exists()


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors"])
def test_consolidated_weights_alone(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    (folder / "config.json").unlink()
    _refused(folder, "consolidated", "transformers layout")


def test_weights_that_only_another_program_reads(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.gguf")
    _refused(folder, "gguf-to-gguf")


def test_weights_of_a_name_that_says_nothing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "my-tune.safetensors")
    _refused(folder, "my-tune.safetensors", "call it model.safetensors")


def test_variants_beside_the_model_stay_out(checkpoint: Path, folder: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(192)}, folder / "model.fp16.safetensors", {"format": "pt"})
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


def test_shards_of_any_name(checkpoint: Path, folder: Path) -> None:
    _split(folder, ["first.safetensors", "zweite-datei.safetensors"])
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


def test_shards_without_an_index(checkpoint: Path, folder: Path) -> None:
    _split(folder, [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)], index=False)
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("missing", [0, 1])
def test_a_shard_is_missing(missing: int, index: bool, folder: Path) -> None:
    files = _split(folder, [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)], index)
    files[missing].unlink()
    _refused(folder, f"model-0000{missing + 1}-of-00002.safetensors is missing")


def test_a_name_that_speaks_of_very_many_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / f"model-1-of-{'9' * 100}.safetensors")
    _refused(folder, "it holds 1 of 99999")


def test_shards_of_two_sets(folder: Path) -> None:
    _split(folder, ["model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"], index=False)
    _refused(folder, "several sets")


def test_files_that_the_index_does_not_list_stay_out(checkpoint: Path, folder: Path) -> None:
    files = _split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
    stray = {name: weight * 2 for name, weight in load_file(files[0]).items()}
    save_file(stray, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


@pytest.mark.parametrize("index", [True, False])
def test_shards_beside_a_whole_file(index: bool, folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    _split(folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], index)
    (folder / "model.safetensors").write_bytes(whole)
    _refused(folder, "holds its weights twice", "model.safetensors", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index(text: str, folder: Path) -> None:
    _split(folder, ["a.safetensors", "b.safetensors"])
    (folder / "model.safetensors.index.json").write_text(text)
    _refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b.safetensors"])
def test_an_index_that_leads_out_of_the_folder(outside: str, folder: Path) -> None:
    _split(folder, ["a.safetensors", "b.safetensors"])
    shutil.copy(folder / "a.safetensors", folder.parent / "secret.safetensors")
    _write_index(folder, _read_index(folder) | {"x": outside})
    _refused(folder, repr(outside), "outside")


def test_an_index_that_lists_what_a_shard_does_not_hold(folder: Path) -> None:
    _split(folder, ["a.safetensors", "b.safetensors"])
    _write_index(folder, _read_index(folder) | {"no.such.weight": "a.safetensors"})
    _refused(folder, "no.such.weight in a.safetensors, which does not hold it")


def test_a_tensor_in_two_shards(folder: Path) -> None:
    first, second = _split(folder, ["a.safetensors", "b.safetensors"])
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    _refused(folder, "is in a.safetensors and in b.safetensors")


def test_a_truncated_shard(folder: Path) -> None:
    _, second = _split(folder, ["a.safetensors", "b.safetensors"])
    second.write_bytes(second.read_bytes()[:-1000])
    _refused(folder, "b.safetensors is truncated or damaged", "download it again")


# pickles


@pytest.mark.parametrize("as_zip", [True, False])
def test_pickled_weights(as_zip: bool, checkpoint: Path, folder: Path) -> None:
    weights = _weights(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


def test_pickled_parameters(checkpoint: Path, folder: Path) -> None:
    weights = {name: torch.nn.Parameter(w) for name, w in _weights(folder).items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


def test_pickled_shards(checkpoint: Path, folder: Path) -> None:
    weights = _weights(folder)
    (folder / "model.safetensors").unlink()
    for number in (0, 1):
        part = {name: weights[name] for name in list(weights)[number::2]}
        torch.save(part, folder / f"pytorch_model-0000{number + 1}-of-00002.bin")
    assert _values(_opened(folder)) == _values(_opened(checkpoint))
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    _refused(folder, "pytorch_model-00001-of-00002.bin is missing")


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_hostile_pickle_is_refused(how: str, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = {"weight": _Hostile(tmp_path / "executed")}
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "zip")
    _refused(folder, "pytorch_model.bin holds more than tensors", "safetensors")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2, 2)], "not tensors by name"),
        ({"state_dict": {"weight": torch.ones(2, 2)}}, "state_dict is a dict, no tensor"),
        ({"weight": torch.ones(1).expand(10**6, 10**6)}, "without values of its own"),
        ({"weight": torch.ones(2, 2).to_sparse()}, "sparse"),
        ({"weight": torch.ones(2, 2, dtype=torch.complex64)}, "complex64"),
    ],
)
def test_pickles_of_something_else(content: Any, words: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    _refused(folder, "pytorch_model.bin", words)


# what config.json says, and what is there


@pytest.mark.parametrize(
    ("n_layers", "words"),
    [(4, "missing: 2, 3"), (10_000, "missing: 2, 3, 4, 5, 6 and 9993 more"), (1, "hold model.layers.1 too")],
)
def test_number_of_layers(n_layers: int, words: str, folder: Path) -> None:
    _configure(folder, num_hidden_layers=n_layers)
    _refused(folder, f"num_hidden_layers in config.json is {n_layers}, but the files hold", words)


def test_layers_are_not_dropped_by_converters_that_drop_some(folder: Path) -> None:
    """DeepSeek's leaves out layers past the number of the config, for MTP: only such may be."""
    from tritconv.sources.agreement import check_layers

    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    with pytest.raises(TritError, match=r"model\.layers\.3 too"):
        check_layers(folder, names, {"num_hidden_layers": 3})
    check_layers(folder, names, {"num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    check_layers(folder, [*names, "model.layers.3.eh_proj.weight"], {"num_hidden_layers": 3})
    check_layers(folder, [*names, "vision_tower.layers.7.up.weight"], {"num_hidden_layers": 4})


def _cut(weights: Weights) -> None:
    weights[UP] = weights[UP][:100]


def _without(weights: Weights) -> None:
    del weights[UP]


def _longer_head(weights: Weights) -> None:
    weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"]] * 2)[:640]


@pytest.mark.build
@pytest.mark.parametrize(("change", "words"), [(_cut, UP_GGUF), (_without, UP_GGUF), (_longer_head, "output.weight")])
def test_what_llama_cpp_would_not_load(change: Callable[[Weights], None], words: str, folder: Path) -> None:
    weights = _weights(folder)
    change(weights)
    _save(folder, weights)
    with pytest.raises(TritError, match=words):
        _converted(folder)
    assert not folder.with_suffix(".gguf").exists()


def _resize(folder: Path, n_rows: int) -> None:
    weights = _weights(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name]] * 2)[:n_rows]
    _save(folder, weights)


@pytest.mark.build
@pytest.mark.parametrize("vocab_size", [ROWS, 700, 640])
def test_more_rows_than_tokens_are_padded(vocab_size: int, folder: Path) -> None:
    _resize(folder, 700)
    _configure(folder, vocab_size=vocab_size)
    tensors = _converted(folder)
    assert tensors["token_embd.weight"].shape[1] == 700
    tokens = _opened(folder).metadata["tokenizer.ggml.tokens"].value
    assert len(tokens) == len(set(tokens)) == 700


def test_more_rows_than_a_tokenizer_of_another_kind_has(folder: Path) -> None:
    """tokenizer.json, as a fine-tune leaves it: llama.cpp's converter does not look at vocab_size there."""
    (folder / "tokenizer.model").unlink()
    make_bpe_tokenizer(folder)
    _resize(folder, 700)
    found = open_checkpoint(folder, pre="gpt-2")
    fields = found.metadata
    assert len(fields["tokenizer.ggml.tokens"].value) == len(fields["tokenizer.ggml.token_type"].value) == 700


@pytest.mark.parametrize("vocab_size", [ROWS, 500])
@pytest.mark.parametrize("bpe", [False, True])
def test_fewer_rows_than_tokens(bpe: bool, vocab_size: int, folder: Path) -> None:
    if bpe:
        (folder / "tokenizer.model").unlink()
        make_bpe_tokenizer(folder)
    _resize(folder, 500)
    _configure(folder, vocab_size=vocab_size)
    _refused(folder, "the tokenizer has ", " tokens", "embeddings have 500 rows")


def test_added_tokens_without_a_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": ROWS}))
    tokens = _opened(folder).metadata["tokenizer.ggml.tokens"].value
    assert len(tokens) == ROWS
    assert "none for the added tokens <pad>: they are left out" in capsys.readouterr().err


@pytest.mark.parametrize("said", [False, ...])
def test_a_missing_head(said: object, folder: Path) -> None:
    weights = _weights(folder)
    del weights["lm_head.weight"]
    _save(folder, weights)
    _configure(folder, tie_word_embeddings=said)  # where it is not said, Llama's default is false
    _refused(folder, "no output matrix", "tie_word_embeddings", "incomplete")
    _configure(folder, tie_word_embeddings=True)
    assert "output.weight" not in {tensor.name for tensor in _opened(folder).tensors}


def test_a_head_of_its_own_counts_though_the_config_ties_it(folder: Path) -> None:
    """As in transformers, which ties nothing where both are there and differ."""
    head = _weights(folder)["lm_head.weight"]
    _configure(folder, tie_word_embeddings=True)
    assert np.array_equal(_tensor(_opened(folder), "output.weight").load(), head.numpy())


def test_no_embeddings(folder: Path) -> None:
    weights = _weights(folder)
    del weights["model.embed_tokens.weight"]
    _save(folder, weights)
    _refused(folder, "no embeddings")
    _save(folder, weights | {"model.embed_tokens.weight": torch.tensor(1.0)})
    _refused(folder, "no embeddings")


@pytest.mark.parametrize("content", ["[]", '"x"', "1", "null", "[" * 100_000])
def test_config_is_no_object(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    _refused(folder, "config.json")


@pytest.mark.parametrize("names", [None, ..., [], "LlamaForCausalLM", {}, [1], [""]])
def test_no_architecture(names: object, folder: Path) -> None:
    _configure(folder, architectures=names)
    _refused(folder, "config.json names no architecture")


@pytest.mark.parametrize("part", ["text_config", "llm_config"])
@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_parts_of_the_config_that_are_none(part: str, value: object, folder: Path) -> None:
    _configure(folder, **{part: value})
    _refused(folder, f"config.json: {part} is {json.dumps(value)}")


def test_settings_in_a_part_of_the_config(checkpoint: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    outer = {"architectures": config["architectures"], "model_type": config["model_type"], "text_config": config}
    (folder / "config.json").write_text(json.dumps(outer))
    assert _values(_opened(folder)) == _values(_opened(checkpoint))


@pytest.mark.parametrize("value", [0, -1, 1.5, 10**40, "192", True, {}])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_absurd_numbers(key: str, value: object, folder: Path) -> None:
    _configure(folder, **{key: value})
    _refused(folder, "config.json")


@pytest.mark.build
@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size"])
def test_absurd_sizes_are_seen_before_the_work(key: str, folder: Path) -> None:
    _configure(folder, **{key: 10**9})
    with pytest.raises(TritError, match=r"llama\.cpp would not load"):
        _converted(folder)


@pytest.mark.parametrize("value", ["x", float("nan"), float("inf"), {}, [1]])
def test_settings_that_gguf_cannot_hold(value: object, folder: Path) -> None:
    _configure(folder, rms_norm_eps=value)
    _refused(folder, "llama.attention.layer_norm_rms_epsilon", "correct config.json")


def test_an_assertion_of_the_converter_says_what_it_wants(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "Mamba", intermediate_size=200)
    _refused(folder, "converter failed on MambaForCausalLM: it wants d_inner == 2 * d_model")


@pytest.mark.build
def test_a_converter_that_delegates(tmp_path: Path) -> None:
    """Ministral 3: upstream's class holds another, which has the tensors and the metadata."""
    folder = make_checkpoint(tmp_path / "model", "Ministral3", head_dim=64, max_position_embeddings=262144)
    expected = {tensor.name: tensor.data for tensor in GGUFReader(to_f16_gguf(folder, tmp_path / "f16.gguf")).tensors}
    found = _opened(folder)
    assert found.architecture == "mistral3"
    assert {"mistral3.block_count", "tokenizer.ggml.tokens"} <= found.metadata.keys()
    assert {tensor.name for tensor in found.tensors} == expected.keys()
    for tensor in found.tensors:
        assert np.array_equal(tensor.load(), expected[tensor.name])
    assert _converted(folder).keys() == expected.keys()
