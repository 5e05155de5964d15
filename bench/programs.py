"""What identifies llama.cpp's programs and this machine in a report."""

import hashlib
import platform
import subprocess
from pathlib import Path

from tritrun.machine import physical_cores
from tritrun.tools import library_folder

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"

_WITHOUT_AVX512 = ("x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell", "alderlake")


def fingerprint(pattern: str = "lib*") -> str:
    """SHA-256, in hex, of llama.cpp's libraries whose names match `pattern`."""
    digest = hashlib.sha256()
    for library in sorted(library_folder().glob(pattern)):
        digest.update(library.name.encode() + library.read_bytes())
    return digest.hexdigest()


def has_avx512(cpu: str) -> bool:
    """Whether a variant of ggml-cpu uses AVX-512 on this machine."""
    return cpu not in _WITHOUT_AVX512 and "avx512bw" in cpu_flags()


def cpu_flags() -> list[str]:
    """What the CPU announces, by Linux's names; empty on other systems."""
    return _cpuinfo("flags", "Features").split()


def machine() -> dict[str, object]:
    """This machine, as far as it bears on speed."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor(),
        "cores": physical_cores(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "flags": cpu_flags(),
    }


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
