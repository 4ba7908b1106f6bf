"""What this machine lets a process have, in a container less than it has: memory and cores. Needs no torch."""

import ctypes
import math
import os
import pathlib

import psutil


def keep_freed_memory():
    """Ask glibc not to return large freed blocks to the system; does nothing elsewhere.

    By default each large tensor is a fresh mapping whose pages fault one by one, which on CPU costs more than the
    arithmetic on them.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):  # older ones take 32 MB at most
        mallopt(m_trim_threshold, (1 << 31) - 1)


def control_groups(controller, root="/"):
    """Folders of the control groups that limit this process, its own first, then all above it.

    Args:
        controller: "memory" or "cpu".
        root: where /proc and /sys are.

    A process may be told its group's path as seen from outside a namespace (in a container, a Slurm step): then some
    of these folders are not there, and those that are still limit it.
    """
    root = pathlib.Path(root)
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:  # version 2
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):  # version 1
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = top / path.strip("/")
        while group != top:
            groups.append(group)
            group = group.parent
        groups.append(top)
    return groups


def _numbers(path):
    """The words of a control group's file, numbers as int; None if there is no such file."""
    try:
        return [int(word) if word.lstrip("-").isdigit() else word for word in path.read_text().split()]
    except OSError:
        return None


def available_memory(root="/"):
    """Bytes that this process can still take: the system's, or its control groups' if less."""
    available = psutil.virtual_memory().available
    for group in control_groups("memory", root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, usage = _numbers(group / limit), _numbers(group / usage)
            if not limit or not usage or limit == ["max"]:
                continue
            statistic = _numbers(group / "memory.stat") or []
            named = dict(zip(statistic[::2], statistic[1::2], strict=False))
            # file cache is given back
            cache = named.get("total_inactive_file", named.get("inactive_file", 0))
            available = min(available, max(0, limit[0] - usage[0] + cache))
    return available


def available_cores(root="/"):
    """Cores that this process may keep busy: those it may run on, at most its control groups' quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu", root):
        quota, period = _numbers(group / "cpu.max") or ("max", 0)
        if quota == "max":
            (quota,) = _numbers(group / "cpu.cfs_quota_us") or (-1,)
            (period,) = _numbers(group / "cpu.cfs_period_us") or (0,)
        if quota > 0 and period > 0:
            cores = min(cores, math.ceil(quota / period))
    return cores
