"""The wheels of dist as others get them: installed where nothing can compile, and started on CPUs of other machines."""

import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from checkpoints import SMOLLM2_GGUF
from command_line import tritconv
from tiny_gguf import write_tiny_model

from llamabuild import backend, versions
from llamabuild.vulkan import MODULE

DIST = Path(__file__).parent.parent / "dist"
CPUS = {"Nehalem": "sse42", "SandyBridge": "sandybridge", "Haswell": "haswell"}
ANSWER = ("--prompt", "hi", "--predict", "8", "--temp", "0", "--threads", "1", "--single-turn", "--log-verbosity", "4")

pytestmark = [
    pytest.mark.build,
    pytest.mark.slow,
    pytest.mark.skipif(not DIST.is_dir(), reason="there is no dist: make wheels"),
]


def wheel(architecture: str) -> Path:
    """The wheel of llama-cpp-python for an architecture; the test is skipped where there is none."""
    found = list(DIST.glob(f"llama_cpp_python-*_{architecture}.whl"))
    if not found:
        pytest.skip(f"dist has no wheel for {architecture}")
    (path,) = found
    return path


def unpacked(architecture: str, folder: Path) -> Path:
    """The folder `llama_cpp` of that wheel, unpacked."""
    with zipfile.ZipFile(wheel(architecture)) as archive:
        archive.extractall(folder)
    for program in (folder / "llama_cpp" / "bin").iterdir():
        program.chmod(0o755)  # zipfile forgets that they may be executed
    return folder / "llama_cpp"


class Installed:
    """A virtual environment that has trit-gguf from dist, installed and used with nothing on PATH."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "venv" / "bin"
        empty = folder / "empty"
        empty.mkdir()
        kept = ("HOME", "LANG", "PIP_CONFIG_FILE", "PIP_FIND_LINKS", "PIP_INDEX_URL", "SSL_CERT_FILE", "TMPDIR")
        self._environment = {key: os.environ[key] for key in kept if key in os.environ} | {"PATH": str(empty)}
        venv.create(folder / "venv", with_pip=True)
        start = time.monotonic()
        pip = ("-m", "pip", "--disable-pip-version-check", "install", "--find-links", DIST, "trit-gguf")
        self.log = self.run("python", *pip).stdout
        self.seconds = time.monotonic() - start
        packages = next((folder / "venv").glob("lib/python*/site-packages"))
        self.n_bytes = sum(path.lstat().st_size for path in packages.rglob("*") if path.is_file())

    def run(self, program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """Run a program of the environment to its end, which must be a good one."""
        command = [str(self.bin / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._environment)
        assert done.returncode == 0, done.stderr
        return done

    def start(self, program: str, *arguments: object) -> "subprocess.Popen[str]":
        """Start a program of the environment; its stdout can be read."""
        command = [str(self.bin / program), *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self._environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """See `Installed`."""
    wheel(platform.machine())
    return Installed(tmp_path_factory.mktemp("installed"))


def test_an_install_is_small_and_quick(installed: Installed) -> None:
    print(f"\ninstalled in {installed.seconds:.0f} s, {installed.n_bytes / 1e6:.0f} MB with pip")
    assert "torch" not in installed.log
    assert installed.n_bytes < 400e6


def test_the_vulkan_backend_is_a_wheel_of_its_own(installed: Installed) -> None:
    if not list(DIST.glob(f"{backend.WHEEL}*_{platform.machine()}.whl")):
        pytest.skip("dist has no wheel of the Vulkan backend: make wheels VULKAN=on")
    packages = next(installed.bin.parent.glob("lib/python*/site-packages"))
    module = packages / "llama_cpp" / "lib" / f"lib{MODULE}.so"
    assert not module.exists()
    installed.run("python", "-m", "pip", "--quiet", "install", "--find-links", DIST, "trit-gguf[vulkan]")
    assert module.exists()
    installed.run("python", "-c", f"import ctypes; ctypes.CDLL({str(module)!r})")


def test_programs_say_their_build(installed: Installed) -> None:
    ours = versions.read()
    for name in ("tritconv", "tritrun"):
        said = installed.run(name, "--version").stdout
        made_of = rf"llama-cpp-python {re.escape(ours.llama_cpp_python)}(, commit [0-9a-f]+(-dirty)?)?"
        assert re.fullmatch(rf"{name} {re.escape(ours.trit_gguf)} \({made_of}\)\n", said)


def test_the_demo_model_answers(installed: Installed, tmp_path: Path) -> None:
    model = tmp_path / "demo-TRIT3.gguf"
    installed.run("tritconv", "gguf-to-gguf", SMOLLM2_GGUF, "--depth", "3", "--fast", "-o", model)
    question = ("--prompt", "What is the capital of France?", "--system", "", "--temp", "0")
    assert "Paris" in installed.run("tritrun", "chat", model, *question).stdout


def test_the_server_has_its_page(installed: Installed, tiny_model: Path) -> None:
    server = installed.start("tritrun", "serve", tiny_model, "--ctx", "256", "--port", "0")
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})  # it has no other form
        with urllib.request.urlopen(request, timeout=60) as page:
            assert b"<!doctype html>" in gzip.decompress(page.read())
    finally:
        server.kill()
        server.communicate()


def test_the_source_distribution_makes_the_same_wheel(tmp_path: Path) -> None:
    """From another folder, with hatchling from the index."""
    (sdist,) = DIST.glob("trit_gguf-*.tar.gz")
    (ours,) = DIST.glob("trit_gguf-*.whl")
    with tarfile.open(sdist) as archive:
        assert {name.split("/")[1] for name in archive.getnames()} >= {"Makefile", "vendor", "tests", "docs"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, sdist], check=True)
    assert (tmp_path / ours.name).read_bytes() == ours.read_bytes()


def test_checksums() -> None:
    files = sorted(path for path in DIST.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files]
    assert (DIST / "SHA256SUMS").read_text().splitlines() == sums


def answer(*command: object, **environment: str) -> tuple[str, str]:
    """What llama-cli answers, and the variant of the CPU code that it says it takes."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    variant = re.search(r"loaded CPU backend from .*libggml-cpu-([\w.]+)\.so", done.stdout + done.stderr)
    text = re.search(r"^> hi\n(.*?)\n\n\[ Prompt:", done.stdout, re.MULTILINE | re.DOTALL)
    assert variant is not None
    assert text is not None
    return text[1].strip(), variant[1]


@pytest.fixture(scope="module")
def x86_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package for x86-64."""
    return unpacked("x86_64", tmp_path_factory.mktemp("x86_64"))


@pytest.fixture(scope="module")
def trit_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in TRIT3."""
    folder = tmp_path_factory.mktemp("trit")
    source, model = write_tiny_model(folder / "tiny.gguf"), folder / "tiny-TRIT3.gguf"
    assert tritconv("gguf-to-gguf", source, "--depth", "3", "--fast", "-o", model).returncode == 0
    return model


@pytest.mark.parametrize("cpu", CPUS)
def test_old_cpus_answer(cpu: str, x86_64: Path, trit_model: Path) -> None:
    """As this machine does with the same CPU code, where it can run that."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("qemu-x86_64 is missing: apt install qemu-user")
    program = (x86_64 / "bin" / "llama-cli", "--model", trit_model, *ANSWER)
    text, variant = answer(qemu, "-cpu", cpu, *program)
    assert variant == CPUS[cpu]
    assert len(text) > 0
    if platform.machine() == "x86_64":
        assert text == answer(*program, GGML_CPU_VARIANT=variant)[0]


@pytest.mark.parametrize(("cpu", "variant"), [("cortex-a53", "armv8.0_1"), ("neoverse-n1", "armv8.2_2"), ("max", "")])
def test_aarch64_answers(cpu: str, variant: str, tmp_path: Path, trit_model: Path) -> None:
    qemu = shutil.which("qemu-aarch64")
    if qemu is None or not Path("/usr/aarch64-linux-gnu").exists():
        pytest.skip("qemu-aarch64 or its libraries are missing: apt install qemu-user libstdc++6-arm64-cross")
    package = unpacked("aarch64", tmp_path)
    program = (package / "bin" / "llama-cli", "--model", trit_model, *ANSWER)
    text, loaded = answer(qemu, "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu, *program)
    assert len(text) > 0
    assert not variant or loaded == variant
