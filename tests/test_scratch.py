"""Tensors in memory up to a budget, and in a file beyond it."""

from pathlib import Path

import pytest
import torch

from tritconv.calibration import scratch as module
from tritconv.calibration.scratch import Scratch
from tritcore.errors import TritError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    scratch = Scratch(budget=5000, folder=tmp_path)
    values = [torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (40, 100, 7, 300, 41)]
    kept = [scratch.keep(one) for one in values]
    assert [one.offset is None for one in kept].count(False) >= 1, "the budget is smaller"
    for one, right in zip(kept, values, strict=True):
        assert torch.equal(one.get(), right)
    assert not list(tmp_path.iterdir()), "the file has no name"
    scratch.close()


def test_room_is_used_again(tmp_path: Path) -> None:
    scratch = Scratch(budget=0, folder=tmp_path)
    first, second = scratch.keep(torch.zeros(100)), scratch.keep(torch.ones(100))
    first.release()
    third = scratch.keep(torch.full((100,), 2.0))
    assert third.offset == 0
    assert torch.equal(second.get(), torch.ones(100))
    assert torch.equal(third.get(), torch.full((100,), 2.0))


def test_released_memory_counts_no_more(tmp_path: Path) -> None:
    scratch = Scratch(budget=400, folder=tmp_path)
    for _ in range(3):
        kept = scratch.keep(torch.zeros(100))
        assert kept.offset is None
        kept.release()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    with pytest.raises(TritError, match=r"No space left on device; raise --memory"):
        Scratch(budget=0, folder=tmp_path).keep(torch.zeros(10))
