"""What the methods are predicted to take, and which of them is taken unasked."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from tritconv import effort
from tritconv.effort import affordable, predicted
from tritconv.methods import MethodName
from tritconv.plan import Plan
from tritconv.sources.source import Origin, Source, SourceTensor, Value, kind_of

PLAN = Plan(2, Type.Q8_0, Type.Q8_0, Type.Q8_0)
LENGTH, TOKENS, THREADS = 512, 262144, 2


@pytest.fixture(autouse=True)
def _speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "_speed", lambda: 1e11)


def source_of(width: int, n_layers: int, experts: int = 0) -> Source:
    """A Llama of that width; nothing of it can be read."""
    shapes = {f"attn_{role}": (width, width) for role in ("q", "k", "v", "output")}
    of_experts = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    shapes |= {f"ffn_{role}{suffix}": (*of_experts, 4 * width, width) for role in ("gate", "up")}
    shapes[f"ffn_down{suffix}"] = (*of_experts, width, 4 * width)

    def load() -> np.ndarray:
        raise AssertionError("shapes are enough")

    names = {f"blk.{i}.{role}.weight": shape for i in range(n_layers) for role, shape in shapes.items()}
    names |= {"token_embd.weight": (32000, width), "output.weight": (32000, width)}
    tensors = tuple(SourceTensor(name, shape, kind_of(name), load) for name, shape in names.items())
    metadata = {"llama.expert_used_count": Value(2, GGUFValueType.UINT32)} if experts else {}
    return Source("model", "llama", metadata, tensors, Origin(Path("model")))


def chosen(source: Source, n_tokens: int = TOKENS, *, calibrates: bool = False) -> tuple[str, int, list[str]]:
    found, better = affordable(source, PLAN, LENGTH, n_tokens, THREADS, calibrates=calibrates)
    return found.method.value, found.n_tokens, [one.method.value for one in better]


def test_the_larger_the_model_the_less_is_done() -> None:
    assert chosen(source_of(512, 8)) == ("gptq", 262144, [])
    assert chosen(source_of(768, 12)) == ("gptq", 131072, ["gptq"])
    assert chosen(source_of(1280, 28)) == ("gptq", 16384, 4 * ["gptq"])
    assert chosen(source_of(2304, 32)) == ("imatrix", 32768, 5 * ["gptq"])
    assert chosen(source_of(8192, 80))[0] == "search"


def test_no_more_tokens_than_asked_for() -> None:
    assert chosen(source_of(512, 8), 2048)[:2] == ("gptq", 2048)
    assert chosen(source_of(1280, 28), 4096)[:2] == ("gptq", 4096)


def test_a_calibration_that_is_needed_is_made_however_long_it_takes() -> None:
    assert chosen(source_of(8192, 80), calibrates=True)[:2] == ("imatrix", 8192)


def test_with_a_method_only_the_text_gets_shorter() -> None:
    def tokens(width: int, n_layers: int, method: MethodName) -> int:
        source = source_of(width, n_layers)
        found, _ = affordable(source, PLAN, LENGTH, TOKENS, THREADS, calibrates=False, method=method)
        assert found.method is method
        return found.n_tokens

    assert tokens(512, 8, MethodName.GPTQ) == 262144
    assert tokens(768, 12, MethodName.GPTQ) == 131072
    assert tokens(8192, 80, MethodName.GPTQ) == 16384
    assert tokens(2304, 32, MethodName.IMATRIX) == 32768


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort.memory, "total", lambda: 2 << 30)
    assert chosen(source_of(512, 8))[0] == "gptq"
    monkeypatch.setattr(effort.memory, "total", lambda: 1 << 20)
    assert chosen(source_of(512, 8)) == ("search", 0, [])


def test_time_grows_with_the_work() -> None:
    def seconds(source: Source, method: MethodName, n_tokens: int, threads: int = THREADS) -> float:
        return predicted(source, PLAN, method, n_tokens, threads).seconds

    small, large = source_of(512, 8), source_of(512, 16)
    for method in (MethodName.GPTQ, MethodName.IMATRIX):
        assert seconds(large, method, TOKENS) == pytest.approx(2 * seconds(small, method, TOKENS), rel=0.3)
        assert seconds(small, method, 2 * TOKENS) > 1.5 * seconds(small, method, TOKENS)
    assert seconds(small, MethodName.SEARCH, 0) < seconds(small, MethodName.IMATRIX, TOKENS)
    assert seconds(small, MethodName.IMATRIX, TOKENS) < seconds(small, MethodName.GPTQ, TOKENS) / 2
    assert seconds(small, MethodName.SEARCH, 0, 4) == pytest.approx(seconds(small, MethodName.SEARCH, 0, 2) / 2)


def test_a_token_comes_to_some_of_the_experts() -> None:
    def seconds(source: Source) -> float:
        return predicted(source, PLAN, MethodName.IMATRIX, 1 << 20, 1 << 20).seconds  # passes only

    assert seconds(source_of(512, 8, experts=8)) < 2 * seconds(source_of(512, 8))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (42, "42 s"), (600, "10 min"), (5400, "1.5 h"), (86400, "24 h")]
)
def test_times_as_people_say_them(seconds: float, text: str) -> None:
    assert str(effort.Effort(MethodName.GPTQ, 65536, seconds)) == f"gptq on 65,536 tokens: about {text}"
