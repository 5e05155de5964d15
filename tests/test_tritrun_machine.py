"""tritrun counts cores and memory: hardware threads, affinity and cgroup limits."""

import os
from pathlib import Path

import pytest

from tritrun.machine import available_memory, physical_cores

GIB = 2**30


def put(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.fixture
def four_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four cores with two hardware threads each; CPU n and n + 4 share a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return put(tmp_path, {topology.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})


def test_hardware_threads_count_once(four_cores: Path) -> None:
    assert physical_cores(four_cores) == 4


def test_affinity(four_cores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5})
    assert physical_cores(four_cores) == 2


def test_without_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 9}, raising=False)
    assert physical_cores(tmp_path) == 2


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)])
def test_cpu_quota_of_a_parent_cgroup(four_cores: Path, quota: str, cores: int) -> None:
    put(four_cores, {"proc/self/cgroup": "0::/app/job", "sys/fs/cgroup/app/cpu.max": quota})
    assert physical_cores(four_cores) == cores


def test_cpu_quota_v1(four_cores: Path) -> None:
    # As in a container: the host's path is not mounted, the limit is at the mount.
    files = {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}
    put(four_cores, {"proc/self/cgroup": "3:cpu,cpuacct:/docker/1234\n1:name=systemd:/"})
    put(four_cores / "sys/fs/cgroup/cpu", files)
    assert physical_cores(four_cores) == 3


def test_unlimited_memory(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {5 * GIB // 1024} kB"})
    assert available_memory(tmp_path) == 5 * GIB


def test_unknown_memory(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None


def test_memory_limit_counts_page_cache_as_free(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": f"MemAvailable: {5 * GIB // 1024} kB", "proc/self/cgroup": "0::/job"})
    stat = f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB // 4}"
    limits = {"memory.max": str(2 * GIB), "memory.current": str(GIB), "memory.stat": stat}
    put(tmp_path / "sys/fs/cgroup/job", limits)
    assert available_memory(tmp_path) == GIB + GIB // 2 + GIB // 4


def test_memory_limit_v1(tmp_path: Path) -> None:
    put(tmp_path, {"proc/self/cgroup": "4:memory:/job"})
    put(
        tmp_path / "sys/fs/cgroup/memory/job",
        {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "1200"},
    )
    assert available_memory(tmp_path) == 0


def test_this_machine() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
