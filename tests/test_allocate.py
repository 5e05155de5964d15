"""The types that mixed depth chooses: of least predicted loss, within the size."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_gguf import write_tiny_model
from typer.testing import CliRunner

from tritconv.allocate import Allocation, BitsPerWeight, Budget, FileSize, allocate, cheapest_outside, check
from tritconv.cli import app
from tritconv.encode import n_bytes
from tritconv.plan import Plan
from tritconv.sources.source import Kind, SourceTensor, kind_of
from tritcore.errors import TritError, UsageError

PLAN = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)
NAMED = replace(PLAN, named=frozenset([Kind.EMBEDDING, Kind.OUTPUT]))
TYPES = (Type.TRIT2, Type.TRIT3, Type.TRIT4, Type.Q8_0)

Losses = dict[str, dict[Type, float]]


def _tensor(name: str, rows: int = 64, width: int = 64) -> SourceTensor:
    return SourceTensor(name, (rows, width), kind_of(name), lambda: np.zeros((rows, width), np.float32))


def _losses(*losses: float) -> dict[Type, float]:
    return dict(zip(TYPES, losses, strict=True))


# 4096 weights each: 1792, 2688, 3456 or 4352 bytes
TENSORS = [_tensor(f"blk.{i}.{role}.weight") for i in range(2) for role in ("attn_q", "ffn_up")]
EMBEDDING = _tensor("token_embd.weight", 100)
NORM = replace(_tensor("output_norm.weight", 1), shape=(64,), kind=Kind.KEPT, kept_type=Type.F32)
LOSSES = {
    "blk.0.attn_q.weight": _losses(9, 1, 0.1, 0.01),
    "blk.0.ffn_up.weight": _losses(4, 0.5, 0.05, 0.005),
    "blk.1.attn_q.weight": _losses(2, 0.2, 0.02, 0.002),
    "blk.1.ffn_up.weight": _losses(1, 0.1, 0.01, 0.001),
}


def _types(allocation: Allocation) -> list[str]:
    return [qtype.name for qtype in allocation.types.values()]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[SourceTensor], Losses]:
    rows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    tensors = [_tensor(f"blk.{i}.ffn_up.weight", n) for i, n in enumerate(rows)]
    some_losses = st.dictionaries(st.sampled_from(TYPES), st.floats(0, 1e6), min_size=1)
    return tensors, {tensor.name: draw(some_losses) for tensor in tensors}


@settings(deadline=None)
@given(problems(), st.floats(0, 1))
def test_within_the_size_and_less_than_a_step_from_the_best(
    problem: tuple[list[SourceTensor], Losses], share: float
) -> None:
    tensors, losses = problem
    sizes = {t.name: {qtype: n_bytes(t.shape, qtype) for qtype in losses[t.name]} for t in tensors}

    def outcome(types: dict[str, Type]) -> tuple[float, int]:
        return sum(losses[name][types[name]] for name in types), sum(sizes[name][types[name]] for name in types)

    all_ways = [outcome(dict(zip(losses, way, strict=True))) for way in itertools.product(*losses.values())]
    least, enough = min(size for _, size in all_ways), min(all_ways)[1]
    room = round(least + share * (enough - least))
    n_weights = sum(64 * tensor.shape[0] for tensor in tensors)

    found = allocate(tensors, losses, PLAN, BitsPerWeight(8 * (room + 0.5) / n_weights))
    loss, size = outcome(dict(found.types))
    assert size <= room
    assert loss == pytest.approx(sum(found.losses.values()))
    step = max(max(of_tensor.values()) - min(of_tensor.values()) for of_tensor in sizes.values())
    best = min((loss for loss, size in all_ways if size <= room - step), default=np.inf)
    assert loss <= best * (1 + 1e-9)


@pytest.mark.parametrize(
    ("bpw", "types"),
    [
        (3.5, ["TRIT2", "TRIT2", "TRIT2", "TRIT2"]),
        (3.93, ["TRIT2", "TRIT2", "TRIT2", "TRIT2"]),
        (3.94, ["TRIT3", "TRIT2", "TRIT2", "TRIT2"]),
        (5.25, ["TRIT4", "TRIT3", "TRIT3", "TRIT2"]),
        (8.5, ["Q8_0", "Q8_0", "Q8_0", "Q8_0"]),
    ],
)
def test_bits_per_weight(bpw: float, types: list[str]) -> None:
    assert _types(allocate(TENSORS, LOSSES, PLAN, BitsPerWeight(bpw))) == types


def test_bits_per_weight_are_those_of_all_weights() -> None:
    tensors = [EMBEDDING, *TENSORS, NORM]
    weights = 6400 + 4 * 4096 + 64

    def types(bits: float, plan: Plan = NAMED) -> list[str]:
        return _types(allocate(tensors, LOSSES, plan, BitsPerWeight(bits / weights)))

    others = 6400 * 8.5 + 64 * 32
    assert types(others + 4 * 4096 * 3.5 + 1) == ["TRIT2"] * 4
    assert types(others + 4096 * (5.25 + 3 * 3.5) + 1) == ["TRIT3"] + ["TRIT2"] * 3
    losses = LOSSES | {EMBEDDING.name: _losses(3, 0.3, 0.03, 0.003)}
    found = allocate(tensors, losses, PLAN, BitsPerWeight((others + 4 * 4096 * 3.5 + 1) / weights))
    assert found.types[EMBEDDING.name] is Type.TRIT3  # what it spares goes to the layers
    assert _types(found) != ["TRIT2"] * 4


@pytest.mark.parametrize("room", range(20_000, 40_000, 1111))
def test_a_large_step_of_the_embeddings_is_no_obstacle(room: int) -> None:
    """As good as the best of all ways, up to a step of a layer's matrix."""
    tensors = [_tensor("token_embd.weight", 600), *TENSORS]
    losses = LOSSES | {"token_embd.weight": _losses(5, 2, 1, 0.5)}
    sizes = {t.name: {qtype: n_bytes(t.shape, qtype) for qtype in TYPES} for t in tensors}

    def outcome(way: tuple[Type, ...]) -> tuple[int, float]:
        pairs = list(zip(sizes, way, strict=True))
        return sum(sizes[name][qtype] for name, qtype in pairs), sum(losses[name][qtype] for name, qtype in pairs)

    ways = [outcome(way) for way in itertools.product(TYPES, repeat=5)]
    best = min((loss for size, loss in ways if size <= room - 2560), default=np.inf)
    try:
        found = allocate(tensors, losses, PLAN, FileSize(room, 0))
    except TritError:
        assert room < min(ways)[0] or room > max(ways)[0]
    else:
        assert found.loss <= best


def test_the_smallest_types_outside_that_cost_little() -> None:
    tensors = [EMBEDDING, *TENSORS, _tensor("output.weight", 100)]
    of_layers = {name: {Type.TRIT2: 1.0} for name in list(LOSSES)[::2]}  # two stand for all: 4
    outside = {EMBEDDING.name: _losses(0.1, 0.03, 0.01, 0.001), "output.weight": _losses(0.3, 0.04, 0.02, 0.002)}
    losses = of_layers | outside

    def types(share: float, plan: Plan = PLAN) -> list[str]:
        return [qtype.name for qtype in cheapest_outside(tensors, losses, plan, share).values()]

    assert types(0.02) == ["TRIT3", "TRIT3"]  # 0.07 of 0.08
    assert types(0.1) == ["TRIT2", "TRIT2"]
    assert types(0.0125) == ["TRIT3", "TRIT4"]
    assert types(1e-9) == ["Q8_0", "Q8_0"], "none costs so little"
    assert types(0.02, replace(PLAN, named=frozenset([Kind.EMBEDDING]))) == ["TRIT3"]
    assert types(0.02, NAMED) == []


def test_the_rest_of_the_file_counts_towards_its_size() -> None:
    rest = 10_000
    assert _types(allocate(TENSORS, LOSSES, PLAN, FileSize(rest + 4 * 1792 + 895, rest))) == ["TRIT2"] * 4
    assert _types(allocate(TENSORS, LOSSES, PLAN, FileSize(rest + 4 * 1792 + 896, rest))) == ["TRIT3"] + ["TRIT2"] * 3


def test_the_padding_between_tensors_counts_towards_the_size_of_the_file() -> None:
    tensor = _tensor("blk.0.attn_q.weight", 1)  # 28 bytes in TRIT2, 42 in TRIT3
    losses = {tensor.name: _losses(4, 3, 2, 1)}
    assert _types(allocate([tensor], losses, PLAN, FileSize(63, 0))) == ["TRIT2"]
    assert _types(allocate([tensor], losses, PLAN, FileSize(64, 0))) == ["TRIT4"]  # 54 bytes: padded, no more than 42


def test_tensors_with_a_type_already_keep_it_and_their_bytes_count() -> None:
    plan = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0, {"blk.0.attn_q.weight": Type.Q8_0})
    found = allocate(TENSORS, LOSSES, plan, BitsPerWeight((8.5 + 5.25 + 3.5 + 3.5) / 4))
    assert {name: qtype.name for name, qtype in found.types.items()} == {
        "blk.0.ffn_up.weight": "TRIT3",
        "blk.1.attn_q.weight": "TRIT2",
        "blk.1.ffn_up.weight": "TRIT2",
    }


def test_tensors_without_a_prediction_keep_the_type_of_the_plan() -> None:
    tensors = [*TENSORS, _tensor("blk.1.ffn_gate.weight", 64, 96)]  # Q8_0: no blocks of 64 in 96
    share = 1.5 / 5.5  # of the weights
    found = allocate(tensors, LOSSES, PLAN, BitsPerWeight(8.5 * share + 3.5 * (1 - share)))
    assert _types(found) == ["TRIT2"] * 4
    with pytest.raises(TritError, match=r"can have 4\.87 to 8\.50"):
        allocate(tensors, LOSSES, PLAN, BitsPerWeight(4.86))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (BitsPerWeight(3.49), "--bpw 3.49 is out of range: this model can have 3.50 to 8.50 bits per weight"),
        (BitsPerWeight(8.51), "--bpw 8.51 is out of range: this model can have 3.50 to 8.50 bits per weight"),
        (FileSize(997_000, 990_000), "--target-size 1.00 MB is out of range: this model can have 1.00 to 1.00 MB"),
    ],
)
def test_sizes_that_cannot_be_had(budget: Budget, words: str) -> None:
    with pytest.raises(TritError, match=re.escape(words)):
        allocate(TENSORS, LOSSES, PLAN, budget)


def test_both_ends_that_the_message_names_can_be_had() -> None:
    tensors = [_tensor("blk.0.ffn_up.weight", 3), _tensor("blk.0.attn_q.weight", 7, 96)]
    losses = {"blk.0.ffn_up.weight": _losses(3, 2, 1, 0.5)}
    with pytest.raises(TritError) as refused:
        allocate(tensors, losses, PLAN, BitsPerWeight(1))
    bounds = re.findall(r"\d\.\d\d", str(refused.value))
    assert len(bounds) == 2
    for bound, qtype in zip(bounds, ("TRIT2", "Q8_0"), strict=True):
        assert _types(allocate(tensors, losses, PLAN, BitsPerWeight(float(bound)))) == [qtype]


def test_table_counts_types_by_role() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(allocate(TENSORS, LOSSES, PLAN, BitsPerWeight(3.94)).table())
    rows = [re.split(r"[^\w.%]+", line)[1:-1] for line in capture.get().splitlines() if "%" in line]
    # 1 + 2, 4 + 1 and 8 in all
    assert rows == [["attn_q", "1", "1", "37.5%"], ["ffn_up", "2", "62.5%"], ["total", "3", "1", "100.0%"]]


def test_the_shapes_alone_tell_what_sizes_can_be_had() -> None:
    for bpw in (2, 8.5):
        check(TENSORS, PLAN, BitsPerWeight(bpw))
    for bpw in (1.99, 8.51):
        with pytest.raises(UsageError, match=r"this model can have 2\.00 to 8\.50 bits per weight"):
            check(TENSORS, PLAN, BitsPerWeight(bpw))
    odd = [*TENSORS, _tensor("blk.1.ffn_gate.weight", 64, 96)]  # Q8_0: no blocks of 64 in 96
    with pytest.raises(UsageError, match=r"can have 3\.78 to 8\.50"):
        check(odd, PLAN, BitsPerWeight(3.7))
    fixed = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0, {"blk.0.attn_q.weight": Type.TRIT1})
    with pytest.raises(UsageError, match=r"can have 2\.00 to 6\.87"):
        check(TENSORS, fixed, BitsPerWeight(7))
    check(TENSORS, PLAN, FileSize(10_000 + 4 * 1024, 10_000))
    with pytest.raises(UsageError, match=r"--target-size 1000000\.00 MB is out of range: this model can have"):
        check(TENSORS, PLAN, FileSize(10**12, 10_000))
    with pytest.raises(UsageError, match="no matrices to choose types for"):
        check([EMBEDDING], PLAN, BitsPerWeight(4))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--bpw", "nan"], "--bpw nan is out of range: 2.00 to 8.50"),
        (["--bpw", "inf"], "--bpw inf is out of range"),
        (["--bpw", "-1"], "--bpw -1 is out of range"),
        (["--bpw", "0"], "--bpw 0 is out of range"),
        (["--bpw", "9"], "--bpw 9 is out of range"),
        (["--bpw", "40", "--tensor-depth", "attn=f32"], "--bpw 40 is out of range: 2.00 to 32.00"),
        (["--target-size", "120"], "--target-size 120 is 120 bytes, too few for a model: write 120MB"),
        (["--target-size", "0"], "too few for a model"),
        (["--target-size", "nan"], "--target-size nan is no size"),
        (["--target-size", "-5MB"], "--target-size -5MB is no size"),
        (["--depth", "5"], "--depth 5 is out of range: choose 1 to 4"),
        (["--depth", "2", "--bpw", "4"], "give one of --depth, --bpw and --target-size"),
    ],
)
def test_numbers_that_are_refused_before_any_work(options: list[str], reason: str) -> None:
    run = CliRunner().invoke(app, ["hf-to-gguf", "no/such/model", "--calibrate", "nowhere.txt", *options])
    assert run.exit_code == 2
    assert reason in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [["--bpw", "8.4"], ["--target-size", "9MB"], ["--target-size", "1TB"]])
def test_sizes_of_a_model_are_refused_before_it_is_calibrated(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tritconv.convert._calibrated", lambda *_: pytest.fail("calibrated"))
    text = tmp_path / "text.txt"
    text.write_text("text")
    source = write_tiny_model(tmp_path / "tiny.gguf")
    command = ["gguf-to-gguf", source, "--calibrate", text, "--tensor-depth", "ffn=2", "-o", tmp_path / "o.gguf"]
    run = CliRunner().invoke(app, [str(part) for part in (*command, *options)])
    assert run.exit_code == 2, run.output
    assert "is out of range: this model can have" in run.stderr
    assert not (tmp_path / "o.gguf").exists()
