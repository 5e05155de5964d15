"""The build of the patched llama.cpp: fast tests of its steps.

Only the test of the series itself needs the real source.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import build as build_script
from llamabuild import compile as compiling
from llamabuild import page, source, toolchain, versions, wheels
from llamabuild.shell import BuildError, error_line

REPOSITORY = build_script.HERE.parent.parent

PATCH = """\
Say hello to all

diff --git a/greeting.c b/greeting.c
--- a/greeting.c
+++ b/greeting.c
@@ -1,3 +1,3 @@
 first
-hello world
+hello all
 last
"""

GREETING = source.LLAMA_CPP / "greeting.c"
OTHER = source.LLAMA_CPP / "other.c"
NEW = source.LLAMA_CPP / "src" / "new.c"


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny source distribution that passes for the pinned one."""
    path = tmp_path / "sdist.tar.gz"
    files = {GREETING: "first\nhello world\nlast\n", OTHER: "other\n", Path("README.md"): "readme\n"}
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-{source.VERSION}/{name.as_posix()}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(source, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def patches(tmp_path: Path) -> source.PatchSet:
    """One patch and one whole new file."""
    patch_set = source.PatchSet(tmp_path / "patch")
    write(patch_set.root / "series", "# a comment\n\nllama.cpp/0001-hello.patch\n")
    write(patch_set.root / "patches" / "llama.cpp" / "0001-hello.patch", PATCH)
    write(patch_set.root / "files" / "src" / "new.c", "new\n")
    return patch_set


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Where the patched source goes."""
    return tmp_path / "build" / "src"


@pytest.fixture
def arguments(sdist: Path, patches: source.PatchSet, tree: Path) -> list[str]:
    """The options that make build.py use all of these."""
    places = ["--sdist", str(sdist), "--patch-dir", str(patches.root), "--build-dir", str(tree.parent)]
    return [*places, "--vulkan", "off", "--ui", "off"]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def age(root: Path) -> None:
    """Give every file below a folder a modification time of long ago."""
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (1000, 1000))


def young(root: Path) -> set[Path]:
    """Return the files that changed after ``age``, relative to the folder."""
    return {path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.stat().st_mtime > 1000}


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run build.py, which must fail with status 1 and one line on stderr; return that line."""
    assert build_script.main([str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("build.py: ")
    return line


# The patched source tree.


def test_prepare_patches_and_adds_files(sdist: Path, patches: source.PatchSet, tree: Path) -> None:
    assert set(source.prepare(sdist, patches, tree)) == {GREETING, OTHER, NEW, Path("README.md")}
    assert (tree / GREETING).read_text() == "first\nhello all\nlast\n"
    assert (tree / NEW).read_text() == "new\n"


def test_second_prepare_does_nothing(sdist: Path, patches: source.PatchSet, tree: Path) -> None:
    source.prepare(sdist, patches, tree)
    age(tree)
    assert source.prepare(sdist, patches, tree) == []
    assert young(tree) == set()


def test_only_what_changed_gets_a_new_time(sdist: Path, patches: source.PatchSet, tree: Path) -> None:
    source.prepare(sdist, patches, tree)
    age(tree)
    write(patches.root / "files" / "src" / "new.c", "newer\n")
    assert source.prepare(sdist, patches, tree) == [NEW]
    assert young(tree) == {NEW}


def test_a_dropped_patch_is_undone(sdist: Path, patches: source.PatchSet, tree: Path) -> None:
    source.prepare(sdist, patches, tree)
    age(tree)
    write(patches.root / "series", "")
    (patches.root / "files" / "src" / "new.c").unlink()
    assert source.prepare(sdist, patches, tree) == [GREETING, NEW]
    assert young(tree) == {GREETING}
    assert (tree / GREETING).read_text() == "first\nhello world\nlast\n"
    assert not (tree / NEW).exists()


def test_patches_apply_inside_another_repository(
    sdist: Path, patches: source.PatchSet, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ``git apply`` skips every file and exits with 0; and git's hooks set GIT_DIR."""
    repository = tree.parent.parent
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    source.prepare(sdist, patches, tree)
    assert "hello all" in (tree / GREETING).read_text()


def test_a_skipped_patch_is_an_error(
    sdist: Path, patches: source.PatchSet, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "--quiet", str(tree.parent.parent)], check=True)
    monkeypatch.setattr(source, "outside_git", lambda root: None)
    with pytest.raises(BuildError, match=r"0001-hello\.patch was skipped"):
        source.prepare(sdist, patches, tree)


def test_failed_hunk(
    arguments: list[str],
    sdist: Path,
    patches: source.PatchSet,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source.prepare(sdist, patches, tree)
    write(patches.patch("llama.cpp/0001-hello.patch"), PATCH.replace("hello world", "hello moon"))
    line = failure(capsys, *arguments, "--source-only")
    assert "llama.cpp/0001-hello.patch does not apply" in line
    assert "greeting.c:1" in line
    assert (tree / GREETING).read_text() == "first\nhello all\nlast\n", "the old tree stays whole"
    assert not tree.with_name("src.new").exists()


def test_new_file_that_llama_cpp_has(
    arguments: list[str], patches: source.PatchSet, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(patches.root / "files" / "other.c", "ours\n")
    line = failure(capsys, *arguments, "--source-only")
    assert "files/other.c: llama.cpp already has this file" in line
    assert not tree.exists()


@pytest.mark.parametrize("name", ["llama.cpp/0002-missing.patch", "elsewhere/0001-hello.patch"])
def test_series_names_a_patch_that_is_not_there(patches: source.PatchSet, name: str) -> None:
    write(patches.root / "series", name)
    with pytest.raises(BuildError, match=f"there is no patch {name}"):
        patches.series()


def test_the_series_applies_to_the_pinned_source(tmp_path: Path) -> None:
    sdist = source.fetch(REPOSITORY / "build" / "download", Path(sys.executable))
    source.check(sdist, source.PatchSet(build_script.HERE), tmp_path)
    assert list(tmp_path.iterdir()) == []


# Fetching and verifying.


def test_wrong_hash(sdist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sdist.open("ab") as file:
        file.write(b"x")
    line = failure(capsys, "--sdist", sdist, "--build-dir", tmp_path / "build", "--source-only")
    assert f"{sdist}: wrong SHA-256" in line
    assert not (tmp_path / "build").exists()


def test_wrong_hash_of_a_file_fetched_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cached = tmp_path / "download" / f"llama_cpp_python-{source.VERSION}.tar.gz"
    write(cached, "half a download")
    assert f"{cached}: wrong SHA-256" in failure(capsys, "--build-dir", tmp_path, "--check-patch")


def test_missing_sdist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file" in failure(capsys, "--sdist", tmp_path / "none.tar.gz", "--check-patch")


def test_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    line = failure(capsys, "--build-dir", tmp_path / "build", "--check-patch")
    assert f"cannot download llama-cpp-python=={source.VERSION}" in line
    assert list((tmp_path / "build" / "download").iterdir()) == []


def test_disk_full(
    arguments: list[str], tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "src.new/greeting.c")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    line = failure(capsys, *arguments, "--source-only")
    assert "No space left on device" in line
    assert list(tree.parent.iterdir()) == []


# Tools and instruction sets.


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_missing_compiler(
    arguments: list[str], variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "no-such-compiler")
    line = failure(capsys, *arguments)
    assert f"looked for {variable}=no-such-compiler" in line


def test_no_compiler_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C compiler found"):
        toolchain.find_compilers()


def test_missing_git(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = failure(capsys, *arguments, "--source-only")
    assert "git not found on PATH" in line


def test_missing_cmake(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("git", "cc", "c++"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    line = failure(capsys, *arguments, "--cpu", "all", "--python", tools / "python")
    assert "cmake not found" in line
    assert "pip install cmake ninja" in line


def test_cmake_fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = failure(capsys, *arguments, "--cpu", "all")
    assert "cannot configure llama.cpp: cmake failed" in line
    assert "CMakeLists.txt" in line


CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.14)
project(tiny C)
add_executable(good src/new.c)
add_executable(broken other.c)
"""


def test_compile(arguments: list[str], patches: source.PatchSet, tree: Path) -> None:
    write(patches.root / "files" / "CMakeLists.txt", CMAKE_LISTS)
    write(patches.root / "files" / "src" / "new.c", "int main(void) { return 7; }\n")
    assert build_script.main([*arguments, "--cpu", "all", "--target", "good"]) == 0
    program = tree.parent / "cmake" / "good"
    assert subprocess.run([program]).returncode == 7

    first = program.stat().st_mtime_ns
    assert build_script.main([*arguments, "--cpu", "all", "--target", "good"]) == 0
    assert program.stat().st_mtime_ns == first, "nothing is built twice"

    write(patches.root / "files" / "src" / "new.c", "int main(void) { return 8; }\n")
    assert build_script.main([*arguments, "--cpu", "all", "--target", "good"]) == 0
    assert subprocess.run([program]).returncode == 8


def test_another_configuration_leaves_no_module_behind(
    arguments: list[str], patches: source.PatchSet, tree: Path
) -> None:
    lists = CMAKE_LISTS + "if (GGML_BACKEND_DL)\n  add_library(module MODULE src/new.c)\nendif()\n"
    write(patches.root / "files" / "CMakeLists.txt", lists)
    write(patches.root / "files" / "src" / "new.c", "int main(void) { return 7; }\n")
    assert build_script.main([*arguments, "--cpu", "all", "--target", "good", "--target", "module"]) == 0
    assert (tree.parent / "cmake" / "libmodule.so").exists()
    assert build_script.main([*arguments, "--cpu", "native", "--target", "good"]) == 0
    assert not (tree.parent / "cmake" / "libmodule.so").exists()


def test_compile_fails(
    arguments: list[str], patches: source.PatchSet, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(patches.root / "files" / "CMakeLists.txt", CMAKE_LISTS)
    assert build_script.main([*arguments, "--cpu", "all", "--target", "broken"]) == 1
    *log, line = capsys.readouterr().err.splitlines()
    assert any("other.c:1" in entry for entry in log)
    assert line.startswith("build.py: the build failed: ")
    assert "error" in line
    assert str(tree.parent / "build.log") in line
    assert "other.c:1" in (tree.parent / "build.log").read_text()


@pytest.mark.parametrize(
    ("macros", "program", "flags"),
    [
        ({"__AMX_TILE__"}, "int main(void) { return 0; }", ()),
        ({"__AMX_TILE__"}, "int main(void) { __builtin_trap(); }", toolchain.NO_AMX),
        ({"__AMX_TILE__"}, "int main(void) { return 1; }", toolchain.NO_AMX),
        ({"__AMX_TILE__"}, "this does not compile", toolchain.NO_AMX),
        ({"__AVX2__"}, "int main(void) { __builtin_trap(); }", ()),
    ],
)
def test_amx_is_left_out_where_it_faults(
    macros: set[str], program: str, flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "amx.c", program)
    monkeypatch.setattr(toolchain, "PROBES", tmp_path)
    monkeypatch.setattr(toolchain, "_macros", lambda cc, empty: macros)
    assert toolchain.probe(toolchain.find_compilers().c).extra_flags == flags


def test_this_machine_is_probed() -> None:
    isa = toolchain.probe(toolchain.find_compilers().c)
    assert isa.announced
    assert isa.extra_flags in ((), toolchain.NO_AMX)


PROBE = build_script.HERE / "files" / "ggml" / "src" / "ggml-cpu" / "arch" / "x86" / "amx-probe.h"

FAULTS = f"""\
#include <immintrin.h>
#undef _tile_zero
#define _tile_zero(tile) __builtin_trap()
#include "{PROBE}"

int main(void) {{
    return amx_probe() || signal(SIGILL, SIG_DFL) != SIG_DFL;
}}
"""

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is for x86-64")


def run_c(source: Path, program: Path, *flags: str) -> int:
    """Compile a C program, run it and return its exit status."""
    subprocess.run([*toolchain.find_compilers().c, *flags, "-o", program, source], check=True)
    return subprocess.run([program]).returncode


@x86
def test_a_fault_of_the_amx_probe_stays_in_its_process(tmp_path: Path) -> None:
    write(tmp_path / "faults.c", FAULTS)
    assert run_c(tmp_path / "faults.c", tmp_path / "faults") == 0


@x86
def test_the_amx_probe_finds_the_same_however_it_is_compiled(tmp_path: Path) -> None:
    levels = ("-O0", "-O1", "-O2", "-O3")
    assert len({run_c(toolchain.PROBES / "amx.c", tmp_path / level, level) for level in levels}) == 1


@pytest.mark.parametrize(("all_variants", "native"), [(True, "OFF"), (False, "ON")])
def test_all_variants_exclude_native(all_variants: bool, native: str) -> None:
    options = compiling.options(all_variants=all_variants, cuda=False, commit="c")
    assert f"-DGGML_NATIVE={native}" in options
    assert ("-DGGML_BACKEND_DL=ON" in options) == ("-DGGML_CPU_ALL_VARIANTS=ON" in options) == all_variants


def test_cuda_architectures() -> None:
    name = "-DCMAKE_CUDA_ARCHITECTURES"
    ours = compiling.options(all_variants=True, cuda=True, commit="c", cuda_architectures="80;90")
    assert f"{name}=80;90" in ours
    default = compiling.options(all_variants=True, cuda=True, commit="c")
    assert "-DGGML_CUDA=ON" in default
    assert not any(option.startswith(name) for option in default)


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "Checking patch a.c...\nerror: patch failed: a.c:7\nerror: a.c: patch does not apply\n",
            "error: patch failed: a.c:7",
        ),
        (
            "CMake Error at CMakeLists.txt:3 (message):\n  too old\n\n-- Configuring\n",
            "CMake Error at CMakeLists.txt:3 (message): too old",
        ),
        ("terrors of the deep\nlast words\n", "last words"),
        ("", "no output"),
    ],
)
def test_error_line(output: str, line: str) -> None:
    assert error_line(output) == line


# The wheels.

VERSIONS = versions.Versions("0.1.0", "0.3.36+ours", "0.19.0+ours")
LIBRARIES = ("libggml-cpu-x64.so", "libllama.dylib")  # as on macOS: both are libraries there


@pytest.fixture
def built(tmp_path: Path) -> wheels.Wheels:
    """A source tree and binaries as the compile step leaves them."""
    tree, binaries = tmp_path / "src", tmp_path / "bin"
    packages = (folder / "__init__.py" for folder in wheels.BINDINGS_FOLDERS)
    for path in (*wheels.BINDINGS_FILES, *packages):
        write(tree / path, '__version__ = "0.3.36"\n')
    write(tree / wheels.GGUF_PY / "pyproject.toml", '[project]\nversion = "0.19.0"\n')
    for binary in (*LIBRARIES, *wheels.TOOLS, "test-backend-ops"):
        write(binaries / binary, binary)
    return wheels.Wheels(VERSIONS, tree, binaries, tmp_path / "wheel", Path(sys.executable))


def test_wheel_holds_libraries_tools_and_conversion(built: wheels.Wheels) -> None:
    stage, _ = built.stage("key", built.libraries(), built.tools())
    assert sorted(path.name for path in (stage / "llama_cpp" / "bin").iterdir()) == sorted(wheels.TOOLS)
    assert sorted(path.name for path in (stage / "llama_cpp" / "lib").iterdir()) == [
        "build.commit",
        "build.key",
        *LIBRARIES,
    ]
    assert (stage / wheels.KEY_FILE).read_text() == "key"
    assert (stage / source.LLAMA_CPP / "conversion" / "__init__.py").exists()


def test_key_follows_source_versions_and_binaries(built: wheels.Wheels) -> None:
    binaries = built.tools()
    keys = {built.key("one", binaries), built.key("one", binaries), built.key("two", binaries), built.key("one", [])}
    keys.add(replace(built, versions=replace(VERSIONS, gguf="0.19.0+other")).key("one", binaries))
    write(binaries[0], "another build")
    keys.add(built.key("one", binaries))
    assert len(keys) == 5


def test_a_python_outside_an_environment_is_refused(built: wheels.Wheels, tmp_path: Path) -> None:
    python = tmp_path / "python"
    write(python, "#!/bin/sh\necho False\necho /nowhere\n")
    python.chmod(0o755)
    outside = replace(built, python=python)
    with pytest.raises(BuildError, match="in no virtual environment"):
        outside.install("key")


def test_python_parts_are_installed_where_no_build_of_the_source_is(
    built: wheels.Wheels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed: list[str] = []
    monkeypatch.setattr(wheels.Wheels, "_packages", lambda self: tmp_path)
    monkeypatch.setattr(wheels.Wheels, "_install", lambda self, key, libraries, tools: installed.append(key))
    assert built.install_python("source")
    write(tmp_path / wheels.KEY_FILE, installed[0])
    assert not built.install_python("source")
    write(tmp_path / wheels.KEY_FILE, built.key("source", built.tools()))  # a whole build is as good
    assert not built.install_python("source")
    assert built.install_python("another source")
    assert len(installed) == 2


# The web page.

NPM_FAILED = """\
-- UI: running npm ci
-- UI: npm ci failed (1)
--   stderr: npm error code ENOTFOUND
npm error network request to https://registry.npmjs.org/x failed
"""


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called npm, alone on PATH."""
    program = tmp_path / "npm" / "npm"
    write(program, "#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def test_the_page_is_inside_where_npm_has_made_it(npm: Path, tmp_path: Path) -> None:
    made = page.Page("auto", tmp_path)
    assert made.is_wanted
    write(tmp_path / "tools" / "ui" / "dist" / "index.html", "<html>")
    write(tmp_path / "tools" / "ui" / "ui-src" / "node_modules" / "large.js", "")
    assert made.finish("") == "llama-server's web page: inside"
    assert not (tmp_path / "tools" / "ui" / "ui-src").exists()


def test_a_failed_npm_is_named_in_one_line(npm: Path, tmp_path: Path) -> None:
    line = page.Page("auto", tmp_path).finish(NPM_FAILED)
    assert line == "llama-server's web page: none (npm ci failed (1): npm error code ENOTFOUND)"
    with pytest.raises(BuildError, match="no web page: npm ci failed"):
        page.Page("on", tmp_path).finish(NPM_FAILED)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (None, "npm is not on PATH; install Node.js 20.19 or later"),
        ("echo npm error code ENOTFOUND >&2; exit 1", "npm failed with status 1: npm error code ENOTFOUND; check the"),
    ],
)
def test_without_npm_or_a_network_there_is_no_page(script: str | None, why: str, npm: Path, tmp_path: Path) -> None:
    if script is None:
        npm.unlink()
    else:
        npm.write_text(f"#!/bin/sh\n{script}\n")
    made = page.Page("auto", tmp_path)
    assert not made.is_wanted
    assert made.finish("").startswith(f"llama-server's web page: none ({why}")
    with pytest.raises(BuildError, match=f"cannot have its web page: {why}"):
        page.Page("on", tmp_path)


def test_a_page_that_is_built_needs_no_npm(npm: Path, tmp_path: Path) -> None:
    npm.unlink()
    write(tmp_path / "tools" / "ui" / "dist" / "index.html", "<html>")
    assert page.Page("auto", tmp_path).finish("") == page.Page("on", tmp_path).finish("")


def test_a_page_is_the_same_for_another_machine(npm: Path, tmp_path: Path) -> None:
    npm.unlink()
    write(tmp_path / "here" / "tools" / "ui" / "dist" / "index.html", "<html>")
    assert page.Page("on", tmp_path / "there", tmp_path / "here").finish("") == "llama-server's web page: inside"
    assert (tmp_path / "there" / "tools" / "ui" / "dist" / "index.html").exists()


def test_a_page_that_is_not_wanted_does_not_stay(npm: Path, tmp_path: Path) -> None:
    write(tmp_path / "tools" / "ui" / "dist" / "index.html", "<html>")
    made = page.Page("off", tmp_path)
    assert not made.is_wanted
    assert made.finish("") == "llama-server's web page: none (--ui off)"
    assert not (tmp_path / "tools" / "ui" / "dist").exists()


@pytest.mark.parametrize(("ui", "value"), [(True, "ON"), (False, "OFF")])
def test_npm_is_the_only_way_to_the_page(ui: bool, value: str) -> None:
    options = compiling.options(all_variants=True, cuda=False, commit="c", ui=ui)
    assert {f"-DLLAMA_BUILD_UI={value}", "-DLLAMA_USE_PREBUILT_UI=OFF"} <= set(options)


# The versions.


def test_versions_of_the_project_are_those_of_the_pinned_source() -> None:
    ours = versions.read()
    assert ours.llama_cpp_python.startswith(f"{source.VERSION}+")
    assert "+" in ours.gguf
    assert re.fullmatch(r"[\w.+-]+", ours.label)


def test_wheels_have_the_versions_wanted(built: wheels.Wheels) -> None:
    bindings, gguf = built.stage("key", [], [])
    assert (bindings / "llama_cpp" / "__init__.py").read_text() == '__version__ = "0.3.36+ours"\n'
    assert (gguf / "pyproject.toml").read_text() == '[project]\nversion = "0.19.0+ours"\n'
    assert "ours" not in (built.source / wheels.GGUF_PY / "pyproject.toml").read_text()


def test_a_newer_source_wants_newer_versions(built: wheels.Wheels) -> None:
    newer = replace(built, versions=replace(VERSIONS, llama_cpp_python="0.3.37+ours"))
    with pytest.raises(BuildError, match=r"asks for 0\.3\.37\+ours, but __version__ in .* is 0\.3\.36"):
        newer.stage("key", [], [])


def test_a_project_without_a_version(tmp_path: Path) -> None:
    write(tmp_path / "pyproject.toml", '[project]\nversion = "1"\n')
    with pytest.raises(BuildError, match="no line has"):
        versions.read(tmp_path / "pyproject.toml")


def test_the_commit_of_a_repository(tmp_path: Path) -> None:
    assert versions.commit(tmp_path) == "", "no repository"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    write(tmp_path / "file", "one")
    for words in (["init", "--quiet"], ["add", "file"], ["commit", "--quiet", "-m", "one"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    clean = versions.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{12,}", clean)
    write(tmp_path / "file", "two")
    assert versions.commit(tmp_path) == clean + versions.DIRTY
