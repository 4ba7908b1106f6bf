"""Memory, cores and devices available to this process. Functions that need torch import it themselves."""

import ctypes
import importlib.util
import math
import os
import pathlib
import shutil
import statistics
import time

import psutil

from endings import Refused


def keep_freed_memory():
    """Ask glibc not to return large freed blocks to the system; no-op without glibc.

    By default glibc maps each large tensor afresh and its pages fault one by one, which on CPU costs more than the
    arithmetic on the tensor.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    if mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25):  # older versions accept 32 MB at most
        mallopt(m_trim_threshold, (1 << 31) - 1)


def control_groups(controller, root="/"):
    """Folders of the control groups that limit this process, innermost first.

    Args:
        controller: "memory" or "cpu".
        root: parent of /proc and /sys.

    In a container or a Slurm step, /proc may give the group's path as seen from outside the namespace. Some of the
    folders then do not exist; those that do still limit the process.
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
    """Whitespace-separated fields of a control group's file, numbers as int; None without the file."""
    try:
        return [int(word) if word.lstrip("-").isdigit() else word for word in path.read_text().split()]
    except OSError:
        return None


def available_memory(root="/"):
    """Bytes that this process can still allocate: the system's, or its control groups' if less."""
    available = psutil.virtual_memory().available
    for group in control_groups("memory", root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            limit, usage = _numbers(group / limit), _numbers(group / usage)
            if not limit or not usage or limit == ["max"]:
                continue
            statistic = _numbers(group / "memory.stat") or []
            named = dict(zip(statistic[::2], statistic[1::2], strict=False))
            # the kernel reclaims file cache
            cache = named.get("total_inactive_file", named.get("inactive_file", 0))
            available = min(available, max(0, limit[0] - usage[0] + cache))
    return available


def available_cores(root="/"):
    """Number of cores in this process's affinity mask, at most its control groups' quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu", root):
        quota, period = _numbers(group / "cpu.max") or ("max", 0)
        if quota == "max":
            (quota,) = _numbers(group / "cpu.cfs_quota_us") or (-1,)
            (period,) = _numbers(group / "cpu.cfs_period_us") or (0,)
        if quota > 0 and period > 0:
            cores = min(cores, math.ceil(quota / period))
    return cores


def limit_threads():
    """Let torch use at most `available_cores` threads, or fewer if OMP_NUM_THREADS says so."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def bf16_time_ratio(batch=8, repeats=3):
    """Ratio of bfloat16 to float32 time for one of the default encoder's convolutions, forward and backward, on CPU.

    Below 1 on processors with fast bfloat16, up to 80 on others; draws no random numbers.
    """
    import torch

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(batch, 32, 39, 39).to(dtype, memory_format=torch.channels_last).requires_grad_()
        weight = torch.ones(32, 32, 3, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
        taken = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            torch.conv2d(x, weight).sum().backward()
            taken.append(time.perf_counter() - start)
        times[dtype] = statistics.median(taken[1:])  # the first is a warm-up
    return times[torch.bfloat16] / times[torch.float32]


def choose_device(name):
    """The torch device for `--device`; raises `Refused` for cuda without CUDA."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: this torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_machine(config, device):
    """Raise `Refused` if a flag needs a device, compiler or package that this machine lacks."""
    if config.replay_device == "cuda" and device.type != "cuda":
        raise Refused(f"--replay_device cuda: the networks run on {device}; use auto or cpu")
    variable, compiler = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    if config.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise Refused(f"--compile: needs a compiler and finds none; install {compiler}")
    # a folder named wandb, as its runs leave behind, has no origin
    if config.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise Refused(f"--wandb {config.wandb}: the package is not installed; pip install wandb")
