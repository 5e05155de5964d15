"""What identifies this checkout and this machine in a report."""

import subprocess
from pathlib import Path

from tritrun.machine import describe

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"

_WITHOUT_AVX512 = ("x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell", "alderlake")


def has_avx512(cpu: str) -> bool:
    """Whether a variant of ggml-cpu uses AVX-512 on this machine."""
    return cpu not in _WITHOUT_AVX512 and "avx512bw" in cpu_flags()


def cpu_flags() -> list[str]:
    """What the CPU announces, by Linux's names; empty on other systems."""
    return _cpuinfo("flags", "Features").split()


def machine() -> dict[str, object]:
    """This machine, as far as it bears on speed."""
    return describe() | {"flags": cpu_flags()}


def commit() -> str:
    """The commit of this checkout, with "-dirty" where files are changed; "unknown" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return next((entries[key] for key in keys if key in entries), "")
