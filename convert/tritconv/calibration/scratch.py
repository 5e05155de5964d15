"""Tensors that a calibration needs again later: in memory up to a budget, else in a file."""

import mmap
import os
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from tritconv.calibration import memory
from tritcore.errors import TritError

_GIVE_BACK = 1 << 28  # bytes that are kept from one time that free memory is given back to the next: it takes 0.1 s


class Kept:
    """A tensor in a `Scratch`."""

    def __init__(self, scratch: "Scratch", values: torch.Tensor, offset: int | None) -> None:
        """Hold `values`, a tensor on the CPU, or with an `offset` only describe what the file has there."""
        self._scratch = scratch
        self._shape, self._dtype = values.shape, values.dtype
        self.n_bytes = values.nbytes
        self.offset = offset
        self._values = values if offset is None else None

    def get(self) -> torch.Tensor:
        """The tensor, on the CPU. Its values must not be changed. Raises TritError if the file cannot be read."""
        if self.offset is None:
            assert self._values is not None, "released"
            return self._values
        return self._scratch.read(self.offset, self._shape, self._dtype)

    def release(self) -> None:
        """Give the room back; the tensor is gone."""
        self._scratch.free(self)
        self._values = None


class Scratch:
    """Room for tensors. They are in memory until they take the budget, else in a file.

    Each in memory is a mapping of its own, so a released one goes back to the system at once. Among the short-lived
    tensors of the heap, what is kept would leave holes that the heap can neither fill nor give back.

    The file has no name, so nothing remains of it after the process ends, however it ends.
    """

    def __init__(self, budget: int, folder: Path) -> None:
        """Prepare.

        Args:
            budget: bytes of memory.
            folder: where the file is made once it is needed.
        """
        self._budget = budget
        self._folder = folder
        self._in_memory = 0
        self._until_given_back = _GIVE_BACK
        self._file: int | None = None
        self._end = 0
        self._holes: dict[int, list[int]] = defaultdict(list)  # offsets of free places, by their bytes

    def keep(self, values: torch.Tensor, *, for_long: bool = False) -> Kept:
        """Keep a tensor of any device.

        Args:
            for_long: whether it is needed much later than others: then it is in the file in any case.

        Raises:
            TritError: the file cannot be written.
        """
        values = values.detach()
        self._until_given_back -= values.nbytes
        if self._until_given_back <= 0:
            memory.give_back()
            self._until_given_back = _GIVE_BACK
        if not for_long and self._in_memory + values.nbytes <= self._budget:
            self._in_memory += values.nbytes
            return Kept(self, _mapped(values), None)
        values = values.contiguous().cpu()
        holes = self._holes[values.nbytes]
        offset = holes.pop() if holes else self._end
        self._end = max(self._end, offset + values.nbytes)
        self._write(offset, values)
        return Kept(self, values, offset)

    def read(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that the file has at `offset`."""
        assert self._file is not None
        values = torch.empty(shape, dtype=dtype)
        rest = memoryview(values.view(-1).view(torch.uint8).numpy())
        try:
            while rest:
                count = os.preadv(self._file, [rest], offset)
                if not count:
                    raise OSError("the file is too short")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise TritError(f"cannot read temporary data in {self._folder}: {error.strerror or error}") from error
        return values

    def free(self, kept: Kept) -> None:
        """Take back the room of a tensor."""
        if kept.offset is None:
            self._in_memory -= kept.n_bytes
        else:
            self._holes[kept.n_bytes].append(kept.offset)

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, offset: int, values: torch.Tensor) -> None:
        rest = memoryview(values.view(-1).view(torch.uint8).numpy())
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._file = os.dup(file.fileno())
            while rest:
                count = os.pwrite(self._file, rest, offset)
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise TritError(
                f"cannot write temporary data to {self._folder}: {error.strerror or error}; raise --memory, or set "
                "TRITCONV_CACHE to a folder on a larger disk"
            ) from error


def _mapped(values: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, in a mapping of its own."""
    if not values.nbytes:
        return values.cpu()
    room = torch.frombuffer(mmap.mmap(-1, values.nbytes), dtype=values.dtype)
    return room.view(values.shape).copy_(values)
