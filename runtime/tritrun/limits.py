"""Limits of time and memory for code from a model file."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Stop Python code that runs within the context, in this thread, once it takes too long; TimeoutError.

    A single step in C is not stopped.
    """
    end = time.monotonic() + seconds

    def watch(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes longer than {seconds:g} seconds")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def limited_memory(n_bytes: int) -> Iterator[None]:
    """Within the context, let the process take `n_bytes` more than it has, on Linux; beyond, MemoryError."""
    size = Path("/proc/self/statm")
    if resource is None or not size.exists():
        yield
        return
    now = int(size.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + n_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
