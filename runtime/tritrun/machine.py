"""The machine, and what this process may use of it: physical cores and memory, cgroup limits included.

`root` in each function stands for `/`; tests point it at a made-up tree.
"""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def describe(root: Path = _ROOT) -> dict[str, str | int]:
    """What a report of speed says of the machine."""
    return {
        "cpu": _cpu_name(root) or platform.processor() or "unknown CPU",
        "cores": physical_cores(root),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def physical_cores(root: Path = _ROOT) -> int:
    """Physical cores this process may run on: hardware threads of one core count once.

    Two threads on one core share its vector units, so llama.cpp is fastest with one thread per core.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_hardware_threads(root, cpu) for cpu in cpus})
    return max(1, min([cores, *_cpu_quotas(root)]))


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes that can be allocated without swapping, or None where the system does not say."""
    limits = [*_free_system_memory(root), *_free_cgroup_memory(root)]
    return max(0, min(limits)) if limits else None


def _cpu_name(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return ""


def _hardware_threads(root: Path, cpu: int) -> str:
    """A name for the core that `cpu` belongs to: the list of its hardware threads."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return _read(topology) or str(cpu)


def _cpu_quotas(root: Path) -> Iterator[int]:
    """Whole CPUs allowed by each cgroup limit that applies."""
    for group in _cgroups(root, "cpu"):
        quota, _, period = (
            _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        ).partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) // int(period)


def _free_system_memory(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _free_cgroup_memory(root: Path) -> Iterator[int]:
    """Limit less use of each memory cgroup that applies; page cache counts as free."""
    for group in _cgroups(root, "memory"):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            stat = dict(line.partition(" ")[::2] for line in _read(group / "memory.stat").splitlines())
            cache = sum(int(stat.get(key, 0)) for key in ("inactive_file", "active_file"))
            yield int(limit) - int(used) + cache


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folders for `controller`, innermost first, for cgroup v2 and v1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = mount / path.lstrip("/")
        yield group
        # In a container the path may name folders of the host that are not mounted; the mount itself is.
        while group != mount:
            group = group.parent
            yield group


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
