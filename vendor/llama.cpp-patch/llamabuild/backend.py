"""A wheel with one of ggml's backends, which ggml loads from the libraries of llama-cpp-python where its device is."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from .shell import run
from .source import LLAMA_CPP
from .toolchain import Machine
from .wheels import Wheels

WHEEL = "trit_gguf_vulkan-"

_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "trit-gguf-vulkan"
version = "{version}"
description = "ggml's Vulkan backend with the TRIT types, for trit-gguf"
license = "MIT"
license-files = ["LICENSE"]
requires-python = ">=3.10"
dependencies = ["llama-cpp-python=={version}"]

[tool.hatch.build.targets.wheel.force-include]
"{module}" = "llama_cpp/lib/{module}"

[tool.hatch.build.targets.wheel.hooks.custom]
"""

_HOOK = """\
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Platform(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-{platform}"
"""


def make(module: Path, wheels: Wheels, machine: Machine) -> Path:
    """Make the wheel of a built module, stripped, in ``wheels.folder``, and return it.

    Raises:
        BuildError: strip or hatchling fails.
    """
    folder = wheels.folder / "backend"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy2(module, folder)
    machine.strip([folder / module.name])
    shutil.copy2(wheels.source / LLAMA_CPP / "LICENSE", folder)
    project = _PROJECT.format(version=wheels.versions.llama_cpp_python, module=module.name)
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    (folder / "hatch_build.py").write_text(_HOOK.format(platform=platform), encoding="utf-8")
    run([wheels.python, "-I", "-m", "hatchling", "build", "--target", "wheel", "--directory", "made"], cwd=folder)
    (wheel,) = (folder / "made").glob("*.whl")
    return wheel
