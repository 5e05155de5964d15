"""Whether ggml's Vulkan backend can be built here."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .shell import BuildError, run
from .toolchain import PROBES

CHOICES = ("auto", "on", "off")
MODULE = "ggml-vulkan"
"""In the file name of the module."""

_HINT = "Debian: apt install libvulkan-dev glslc spirv-headers"


def why_not(choice: str, cxx: Sequence[str], *, cuda: bool) -> str:
    """Return why the backend is not to be built; "" if it is.

    Args:
        choice: one of CHOICES; ``auto`` is ``on`` where everything that it needs is there, and no other backend is
            built for the same GPUs.
        cxx: the C++ compiler.
        cuda: whether the CUDA backend is built.

    Raises:
        BuildError: it must be built, and cannot be.
    """
    if choice == "off":
        return "--vulkan off"
    if choice == "auto" and (cuda or platform.system() == "Darwin"):
        return f"{'CUDA' if cuda else 'Metal'} is built instead"
    obstacle = _obstacle(cxx)
    if obstacle and choice == "on":
        raise BuildError(f"the Vulkan backend cannot be built: {obstacle}")
    return obstacle


def _obstacle(cxx: Sequence[str]) -> str:
    sdk = Path(os.environ["VULKAN_SDK"]) if "VULKAN_SDK" in os.environ else None  # where CMake looks first
    path = os.environ.get("PATH", "")
    if shutil.which("glslc", path=f"{sdk / 'bin'}{os.pathsep}{path}" if sdk else path) is None:
        return f"glslc is not on PATH; install it ({_HINT})"
    folders = [f"-I{sdk / 'include'}", f"-L{sdk / 'lib'}"] if sdk else []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run([*cxx, *folders, PROBES / "vulkan.cpp", "-o", Path(scratch) / "probe", "-lvulkan"])
        except BuildError as error:
            return f"{error}; install headers and loader ({_HINT})"
    return ""
