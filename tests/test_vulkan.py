"""The Vulkan backend on this machine's first device, a software one in CI, equals the CPU's."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from checkpoints import SMOLLM2_GGUF, tritconv

from llamabuild.vulkan import MODULE
from programs import BUILD
from tritcore.format import DEPTHS
from tritrun.tools import find_tool, library_folder

pytestmark = pytest.mark.build

DEVICE = "Vulkan0"
ENVIRONMENT = os.environ | {"GGML_VK_VISIBLE_DEVICES": "0"}  # a device that is a CPU is not taken otherwise
VALIDATION = "VK_LAYER_KHRONOS_validation"


@cache
def unavailable() -> str | None:
    """Why nothing can be run here, and what to install; None if it can."""
    if not any(library_folder().glob(f"*{MODULE}*")):
        return "the Vulkan backend is not built: make build VULKAN=on"
    if f"{DEVICE}:" not in run(find_tool("llama-bench"), "--list-devices").stdout:
        return "there is no Vulkan device (Debian: apt install mesa-vulkan-drivers, which has one in software)"
    return None


@pytest.fixture(autouse=True)
def device() -> None:
    """Skip where there is none."""
    if reason := unavailable():
        pytest.skip(reason)


def run(program: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a program does with the device, and with these environment variables."""
    command = [str(program), *map(str, arguments)]
    environment = ENVIRONMENT | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, errors="replace", check=False)


def check_operators(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What upstream's tests of operators say."""
    return run(BUILD / "cmake/bin/test-backend-ops", "test", "-b", DEVICE, *arguments, **variables)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_operators(depth: int, operator: str) -> None:
    # large expert matrices take long, and test nothing else
    cases = f"^(?!.*n_mats=(32|[0-9]{{3,}}),).*type(_a|_src)?=trit{depth},"
    done = check_operators("-o", operator, "-p", cases)
    assert done.returncode == 0, done.stdout[-2000:]
    lines = re.findall(rf"^ *{operator}\((.*)\): (.*)$", re.sub(r"\x1b\[[0-9;]*m", "", done.stdout), re.M)
    for parameters, verdict in lines:
        # a copy into a type needs its search of scales, which the CPU has
        refused = re.search(r"type_dst=(?!f32|trit)|type_src=(?!trit)", parameters)
        assert verdict == "OK" or refused, f"{parameters}: {verdict}"
    assert len(lines) >= 1
