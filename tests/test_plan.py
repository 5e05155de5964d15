"""Which tensor gets which type: by kind, by rule, and what the file and the report say of it."""

import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import logits
from command_line import tritconv
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from tritconv.plan import Plan, TypeRule
from tritconv.sources.source import Kind, SourceTensor, kind_of
from tritcore.errors import TritError
from tritcore.gguf_header import read_model_file

Q8_0, F16 = Type.Q8_0, Type.F16


def _tensor(name: str, shape: tuple[int, ...] = (64, 64), kept_type: Type | None = None) -> SourceTensor:
    kind = Kind.KEPT if kept_type is not None else kind_of(name)
    return SourceTensor(name, shape, kind, lambda: np.zeros(shape, np.float32), kept_type)


TENSORS = [
    _tensor("token_embd.weight"),
    _tensor("blk.0.attn_q.weight"),
    _tensor("blk.0.attn_norm.weight", (64,), Type.F32),
    _tensor("blk.0.ffn_down.weight"),
    _tensor("blk.1.ffn_down.weight"),
    _tensor("blk.1.ffn_up.weight", (64, 96)),
    _tensor("output.weight"),
]
PLAN = Plan(2, Q8_0, F16, Q8_0)


def _types(plan: Plan) -> dict[str, str]:
    return {tensor.name.removesuffix(".weight"): plan.type_of(tensor).name for tensor in TENSORS}


def _rule(pattern: str, qtype: Type) -> TypeRule:
    return TypeRule(re.compile(pattern), qtype)


def test_types_by_kind() -> None:
    assert _types(PLAN) == {
        "token_embd": "Q8_0",
        "blk.0.attn_q": "TRIT2",
        "blk.0.attn_norm": "F32",
        "blk.0.ffn_down": "TRIT2",
        "blk.1.ffn_down": "TRIT2",
        "blk.1.ffn_up": "Q8_0",  # rows of 96
        "output": "F16",
    }
    assert PLAN.exceptions(TENSORS) == []


def test_chosen_types_change_no_others() -> None:
    chosen = PLAN.with_types({"token_embd.weight": Type.TRIT3, "blk.0.attn_q.weight": Type.TRIT3})
    wanted = _types(PLAN) | {"token_embd": "TRIT3", "blk.0.attn_q": "TRIT3"}
    assert _types(chosen) == wanted
    assert chosen.depth == 2
    more = chosen.with_types({"blk.0.ffn_down.weight": Type.TRIT3}).with_most_frequent_depth(TENSORS)
    assert more.depth == 2, "of the layers: two matrices in TRIT3, one in TRIT2 and one that should be"
    most = more.with_types({"blk.1.ffn_down.weight": Type.TRIT3}).with_most_frequent_depth(TENSORS)
    assert most.depth == 3
    assert _types(most) == wanted | {"blk.0.ffn_down": "TRIT3", "blk.1.ffn_down": "TRIT3"}
    assert most.exceptions(TENSORS) == ["token_embd.weight=3", "blk.1.ffn_up.weight=2"]


def test_later_rules_win() -> None:
    rules = [_rule(r"ffn_down", Type.TRIT3), _rule(r"^blk\.1\.", Type.TRIT4), _rule("token_embd", F16)]
    plan = PLAN.with_rules(rules, TENSORS)
    assert _types(plan) == _types(PLAN) | {
        "token_embd": "F16",
        "blk.0.ffn_down": "TRIT3",
        "blk.1.ffn_down": "TRIT4",
        "blk.1.ffn_up": "Q8_0",
    }
    assert plan.exceptions(TENSORS) == [
        "token_embd.weight=f16",
        "blk.0.ffn_down.weight=3",
        "blk.1.ffn_down.weight=4",
        "blk.1.ffn_up.weight=4",
    ]
    assert PLAN.exceptions(TENSORS) == []


def test_rules_come_on_top_of_a_ready_plan() -> None:
    plan = Plan(2, Q8_0, F16, Q8_0, {"blk.0.attn_q.weight": Type.TRIT4, "blk.0.ffn_down.weight": Q8_0})
    assert plan.exceptions(TENSORS) == ["blk.0.attn_q.weight=4", "blk.0.ffn_down.weight=q8_0"]
    plan = plan.with_rules([_rule("attn_q", Type.TRIT2)], TENSORS)
    assert plan.exceptions(TENSORS) == ["blk.0.ffn_down.weight=q8_0"]


@pytest.mark.parametrize("pattern", ["blk.7", "attn_norm"])
def test_a_rule_for_nothing(pattern: str) -> None:
    with pytest.raises(TritError, match="no matrix of the model has a name like"):
        PLAN.with_rules([_rule(pattern, Q8_0)], TENSORS)


@pytest.mark.build
def test_mixed_files(checkpoint: Path, tmp_path: Path) -> None:
    path, plain = tmp_path / "mixed.gguf", tmp_path / "plain.gguf"
    options = [
        "--tensor-depth",
        r"ffn_(up|down)=4",
        "--tensor-depth",
        r"blk\.1\.ffn_up=q8_0",
        "--tensor-depth",
        "embd=3",
    ]
    done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", path, *options)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("TRIT2", "TRIT3", "TRIT4", "Q8_0"))
    model = read_model_file(path)
    types = {tensor.name: tensor.type for tensor in model.tensors}
    assert types["token_embd.weight"] is Type.TRIT3
    assert (
        types["blk.0.ffn_up.weight"] is types["blk.0.ffn_down.weight"] is types["blk.1.ffn_down.weight"] is Type.TRIT4
    )
    assert types["blk.1.ffn_up.weight"] is types["output.weight"] is Q8_0
    assert types["blk.0.attn_q.weight"] is types["blk.1.ffn_gate.weight"] is Type.TRIT2
    assert model.metadata["trit.depth"] == 2
    assert model.metadata["general.file_type"] == 86
    plan = GGUFReader(path).fields["trit.plan"].contents()
    assert plan == [
        "token_embd.weight=3",
        "blk.0.ffn_down.weight=4",
        "blk.0.ffn_up.weight=4",
        "blk.1.ffn_down.weight=4",
        "blk.1.ffn_up.weight=q8_0",
    ]
    assert np.isfinite(logits(path, "The capital of France is")).all()

    # the plan as it stands in the file makes the same file
    again = tmp_path / "again.gguf"
    options = [option for entry in plan for option in ("--tensor-depth", entry)]
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", again, *options).returncode == 0
    assert again.read_bytes() == path.read_bytes()
    assert tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", plain).returncode == 0
    assert "trit.plan" not in read_model_file(plain).metadata


@pytest.mark.parametrize(
    ("text", "exit_code", "words"),
    [
        ("ffn_down", 2, "--tensor-depth ffn_down: not of the form REGEX=D with D one of 1, 2, 3, 4, f32"),
        ("ffn_down=5", 2, "--tensor-depth ffn_down=5: not of the form REGEX=D"),
        ("=3", 2, "--tensor-depth =3: not of the form"),
        ("ffn_(down=3", 2, "--tensor-depth ffn_(down=3: not a regular expression"),
        ("ffn_sideways=3", 1, "no matrix of the model has a name like 'ffn_sideways'"),
    ],
)
def test_wrong_rules(text: str, exit_code: int, words: str, f16_gguf: Path, tmp_path: Path) -> None:
    done = tritconv("gguf-to-gguf", f16_gguf, "--fast", "--depth", 2, "-o", tmp_path / "x.gguf", "--tensor-depth", text)
    assert (done.returncode, done.stdout) == (exit_code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []
