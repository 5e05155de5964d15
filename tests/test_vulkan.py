"""The Vulkan backend on this machine's first device, a software one in CI, equals the CPU's."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from pydoc_data import topics

import pytest

import across_rows
from llamabuild.vulkan import MODULE
from programs import BUILD
from tritcore.format import DEPTHS
from tritrun.tools import find_tool, library_folder

pytestmark = pytest.mark.build

DEVICE = "Vulkan0"
ENVIRONMENT = os.environ | {"GGML_VK_VISIBLE_DEVICES": "0"}  # a device that is a CPU is not taken otherwise
VALIDATION = "VK_LAYER_KHRONOS_validation"

_ATTEMPTS = 5


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
    """What upstream's tests of operators say.

    The lavapipe of Mesa 22.3 corrupts its heap in some runs of MUL_MAT_ID, with upstream's types and without our patch
    too. So a run that a signal ends is tried again; one that computes something wrong is not.
    """
    for _ in range(_ATTEMPTS):
        done = run(BUILD / "cmake/bin/test-backend-ops", "test", "-b", DEVICE, *arguments, **variables)
        if done.returncode >= 0:
            break
    return done


def verdicts(output: str, operator: str) -> dict[str, str]:
    """What upstream's tests say of each case of an operator, by its parameters."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    return dict(re.findall(rf"^ *{operator}\((.*)\): (.*)$", plain, re.M))


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["MUL_MAT", "MUL_MAT_ID", "GET_ROWS", "CPY"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_operators(depth: int, operator: str) -> None:
    # large expert matrices take long, and test nothing else
    cases = f"^(?!.*n_mats=(32|[0-9]{{3,}}),).*type(_a|_src)?=trit{depth},"
    done = check_operators("-o", operator, "-p", cases)
    assert done.returncode == 0, done.stdout[-2000:]
    found = verdicts(done.stdout, operator)
    # copies into a type are the CPU's
    wanted = {case: verdict for case, verdict in found.items() if operator != "CPY" or "type_dst=f32" in case}
    assert wanted
    assert set(wanted.values()) == {"OK"}


@pytest.mark.slow
def test_validation_layers_find_nothing() -> None:
    cases = "type(_a|_src)?=trit3,.*(k=576,|n=576,|type_dst=f32)"
    done = check_operators("-p", cases, VK_INSTANCE_LAYERS=VALIDATION)
    if "VK_ERROR_LAYER_NOT_PRESENT" in done.stdout + done.stderr:
        pytest.skip("the validation layers are missing (Debian: apt install vulkan-validationlayers)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert verdicts(done.stdout, "MUL_MAT")
    assert re.findall(r"^.*(?:VUID|Validation).*$", done.stdout + done.stderr, re.M) == []


@pytest.mark.slow
def test_perplexity_is_that_of_the_weights_in_float16(smollm2_trit3: Path, tmp_path: Path) -> None:
    # The CPU rounds activations to 8 bits where it multiplies by TRIT, a device without integer dot products does not.
    decoded = tmp_path / "decoded.gguf"
    across_rows.write_decoded(smollm2_trit3, decoded, 2)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)))
    found = {}
    for file, device, layers in ((smollm2_trit3, DEVICE, 99), (decoded, "none", 0)):
        options = ("-m", file, "-f", text, "-c", 256, "--chunks", 2, "-dev", device, "-ngl", layers)
        done = run(find_tool("llama-perplexity"), *options)
        estimate = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
        assert estimate, done.stderr[-2000:]
        found[device] = float(estimate[1])
    assert found[DEVICE] == pytest.approx(found["none"], rel=0.002)


@pytest.mark.slow
def test_the_demo_answers(smollm2_trit3: Path) -> None:
    options = ("--prompt", "What is the capital of France?", "--system", "", "--temp", 0)
    done = run(Path(sys.executable), "-m", "tritrun", "chat", smollm2_trit3, "--gpu-layers", "auto", *options)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
