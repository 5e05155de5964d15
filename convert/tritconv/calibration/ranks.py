"""The processes that share a calibration, by torch.distributed: `torchrun` starts them.

Each process has its share of the sequences. Sums over the text are made over all processes, and each process quantizes
a share of the rows of a matrix.
"""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed.nn  # before there is a group, which the defaults of its functions would keep for ever
from torch import distributed

from tritcore.console import error
from tritcore.errors import TritError

_BEAT = 5.0  # seconds between signs of life
_DEAD = 45.0  # seconds without a sign of life after which a process is taken for dead
_LONGEST = timedelta(hours=24)  # that a process waits for a slower one: `_Heartbeat` ends the wait for a dead one

T = TypeVar("T")


class Ranks:
    """This process and the others. Alone, all methods give back what they get.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Name this process; the process group is there."""
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether this process keeps and writes results."""
        return self.rank == 0

    def share_of(self, items: Sequence[T]) -> list[T]:
        """The items that are for this process."""
        return list(items[self.rank :: self.size])

    def rows_of(self, rows: torch.Tensor, rank: int | None = None) -> torch.Tensor:
        """The rows (some,) that are for a process, this one if none is named."""
        return rows.tensor_split(self.size)[self.rank if rank is None else rank]

    def sum(self, *values: torch.Tensor) -> None:
        """Sum tensors over all processes, in place."""
        if self.size > 1:
            for one in values:
                with _talking():
                    distributed.all_reduce(one)

    def total(self, number: int) -> int:
        """The sum of integers over all processes."""
        found = torch.tensor([number], device=_device())
        self.sum(found)
        return int(found.item())

    def from_first(self, value: T) -> T:
        """The value of the first process; the other processes may give anything."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with _talking():
            distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather_rows(self, mine: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes in the order of `rows`.

        Args:
            mine: (rows of this process, m), for `rows_of(rows)`.
            rows: (some,).
        """
        if self.size == 1:
            return mine
        counts = [len(self.rows_of(rows, rank)) for rank in range(self.size)]
        device = _device()
        padded = mine.new_zeros(max(counts), mine.shape[1], device=device)
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in counts]
        with _talking():
            distributed.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)]).to(mine.device)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the context, this process and those that torchrun has started beside it are one group.

    Raises:
        TritError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with _talking():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_LONGEST)
    ranks = Ranks(distributed.get_rank(), size)
    heartbeat = _Heartbeat(ranks)
    try:
        yield ranks
        with _talking():
            distributed.barrier()  # the first process serves the others: it goes last
        heartbeat.stop()
    finally:
        heartbeat.stop()
        distributed.destroy_process_group()


def _device() -> torch.device:
    """Where tensors have to be that the processes send each other."""
    is_nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as problem:  # the library's errors have no class of their own
        raise TritError(_lost()) from problem


def _lost() -> str:
    return (
        "another process of this run has ended or cannot be reached: its own error says why; the same command goes on "
        "at the last finished layer"
    )


class _Heartbeat:
    """Ends this process when another one gives no sign of life: a collective operation would wait for it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._ended = threading.Event()
        default = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore("tritconv-heartbeat", default.clone())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Nobody misses this process from now on."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()

    def _run(self) -> None:
        seen: dict[int, tuple[int, float]] = {}
        try:
            while not self._ended.wait(_BEAT):
                self._store.add(str(self._ranks.rank), 1)
                for rank in range(self._ranks.size):
                    count, now = self._store.add(str(rank), 0), time.monotonic()
                    if rank not in seen or seen[rank][0] != count:
                        seen[rank] = count, now
                    elif now - seen[rank][1] > _DEAD:
                        _give_up()
        except RuntimeError:  # the store was with a process that has ended
            if not self._ended.is_set():
                _give_up()


def _give_up() -> NoReturn:
    error(_lost())
    os._exit(1)
