"""The memory of the machine."""

import ctypes
import os
import sys
from pathlib import Path


def total() -> int:
    """Bytes of memory that the machine has; where it does not say, more than any has."""
    if not hasattr(os, "sysconf"):
        return 1 << 62
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free() -> int:
    """Bytes of memory that programs can still have, about."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass  # not Linux
    return total() // 2 if total() < 1 << 62 else 4 << 30


def give_back() -> None:
    """Let the C library give free memory back to the system: glibc keeps what lies between blocks in use."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries have none
        if trim is not None:
            trim(0)
