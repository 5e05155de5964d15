"""Several processes share a calibration, as torchrun starts them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, tritconv
from gguf import GGUFReader, quants

from tritconv.calibration.model import fast_precision
from tritcore import gguf_types  # noqa: F401 - gguf then knows the TRIT types

pytestmark = [pytest.mark.build, pytest.mark.slow]

_LONGEST = 240.0  # seconds that a test waits for processes
_DEADLINE = 60.0  # seconds in which the death of one process ends the others


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.topics.values())[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "Qwen2", num_hidden_layers=4)


def options(source: Path, target: Path, text: Path) -> list[str]:
    calibration = ["--calibrate", text, "--calib-tokens", 2048, "--calib-seq", 64]
    return [str(one) for one in ("hf-to-gguf", source, "--depth", 2, *calibration, "-o", target, "--threads", 1)]


def launch(
    arguments: Sequence[str], cache: Path, nodes: Sequence[str], within: Sequence[str] = ()
) -> "subprocess.Popen[str]":
    """tritconv by torchrun with options `nodes`. `within` is a command that runs another."""
    return subprocess.Popen(
        [*within, sys.executable, "-m", "torch.distributed.run", *nodes, "-m", "tritconv", *arguments],
        env=os.environ | {"TRITCONV_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def two_processes(arguments: Sequence[str], cache: Path) -> "subprocess.Popen[str]":
    return launch(arguments, cache, ["--standalone", "--nproc-per-node", "2"])


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def test_two_processes_make_the_file_of_one(tmp_path: Path, source: Path, text: Path) -> None:
    """Up to the rounding of sums; and the same bytes each time."""
    run = tritconv(
        *options(source, tmp_path / "one.gguf", text), env=os.environ | {"TRITCONV_CACHE": str(tmp_path / "1")}
    )
    assert run.returncode == 0, run.stderr
    for number in (1, 2):
        process = two_processes(options(source, tmp_path / f"two-{number}.gguf", text), tmp_path / f"2-{number}")
        printed, _ = process.communicate(timeout=_LONGEST)
        assert process.returncode == 0, printed
        assert printed.count("bits per weight") <= 1, "only the first process reports"
    assert (tmp_path / "two-1.gguf").read_bytes() == (tmp_path / "two-2.gguf").read_bytes()
    exact = tmp_path / "exact.gguf"
    kept = tritconv("hf-to-gguf", source, "--fast", "--depth", 2, "--tensor-depth", ".=f32", "-o", exact)
    assert kept.returncode == 0, kept.stderr
    one, two, right = (weights(tmp_path / name) for name in ("one.gguf", "two-1.gguf", "exact.gguf"))
    is_exact = fast_precision(torch.device("cpu")) is torch.float32
    for name, values in one.items():
        errors = [float(np.linalg.norm(some[name] - right[name])) for some in (one, two)]
        assert errors[1] == pytest.approx(errors[0], rel=0.1), name
        if is_exact:  # sums in bfloat16 differ by more
            # a code on the edge between two goes either way, and others follow it
            assert float((values != two[name]).mean()) < 0.1, name


@pytest.fixture
def two_machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces, the first at 10.213.0.1, with a cable between them."""
    names = f"tritconv-{os.getpid()}-0", f"tritconv-{os.getpid()}-1"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], capture_output=True, check=True)

    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.213.0.{number}/24", "dev", "eth0")
                for device in ("eth0", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield names


def test_two_machines_make_the_file_of_two_processes(
    tmp_path: Path, source: Path, text: Path, two_machines: tuple[str, str]
) -> None:
    processes = []
    for number, name in enumerate(two_machines):
        nodes = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        nodes += ["--master-addr", "10.213.0.1", "--master-port", "29511"]
        within = ["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"]
        arguments = options(source, tmp_path / f"machine-{number}.gguf", text)
        processes.append(launch(arguments, tmp_path / f"cache-{number}", nodes, within))
    for process in processes:
        printed, _ = process.communicate(timeout=_LONGEST)
        assert process.returncode == 0, printed
    assert not (tmp_path / "machine-1.gguf").exists(), "only the first process writes"
    here = two_processes(options(source, tmp_path / "here.gguf", text), tmp_path / "cache")
    printed, _ = here.communicate(timeout=_LONGEST)
    assert here.returncode == 0, printed
    assert (tmp_path / "machine-0.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()


def children(parent: int) -> list[int]:
    """The processes that the launcher has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on(
    tmp_path: Path, source: Path, text: Path, rank: int
) -> None:
    target, cache = tmp_path / "out.gguf", tmp_path / "cache"
    process = two_processes(options(source, target, text), cache)
    end = time.monotonic() + _LONGEST
    while not list(cache.glob("*/layer-0001*")):  # two layers are finished
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    started = time.monotonic()
    printed, _ = process.communicate(timeout=_LONGEST)
    assert time.monotonic() - started < _DEADLINE, printed
    assert process.returncode != 0
    assert not target.exists()

    again = two_processes(options(source, target, text), cache)
    printed, _ = again.communicate(timeout=_LONGEST)
    assert again.returncode == 0, printed
    whole = two_processes(options(source, tmp_path / "whole.gguf", text), tmp_path / "fresh")
    printed, _ = whole.communicate(timeout=_LONGEST)
    assert whole.returncode == 0, printed
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_what_several_processes_cannot_share(tmp_path: Path, source: Path, text: Path) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "TRITCONV_CACHE": str(tmp_path)}
    plain = tritconv("hf-to-gguf", source, "--depth", 2, "-o", tmp_path / "x.gguf", env=environment)
    assert plain.returncode == 2
    assert "several processes can only share gptq: add --method gptq" in plain.stderr
    trained = tritconv(*options(source, tmp_path / "x.gguf", text), "--method", "tune", env=environment)
    assert trained.returncode == 2
    assert "several processes can only share gptq" in trained.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """A thread that is left when the interpreter ends can end the process by a signal."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tritconv.calibration.ranks import joined\n"
        "with joined() as ranks:\n"
        "    import torch._dynamo  # which transformers imports when a model runs\n"
        "    ranks.total(1)\n"
        "for thread in Path('/proc/self/task').iterdir():\n"
        "    print((thread / 'comm').read_text().strip())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST, check=False)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    assert "gloo" not in done.stdout
