"""Memory, cores and devices available to this process. Functions that need torch import it themselves."""

import ctypes
import importlib.util
import math
import os
import pathlib
import shutil
import statistics
import timeit

import psutil

from endings import Refused


def keep_freed_memory():
    """Ask glibc not to return large freed blocks to the system; no-op without glibc.

    By default glibc maps each large tensor afresh and its pages fault one by one, which on CPU costs more than the
    arithmetic on the tensor.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    # older versions accept 32 MB at most
    if libc.mallopt(m_mmap_threshold, 1 << 30) or libc.mallopt(m_mmap_threshold, 1 << 25):
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def control_groups(controller, root="/"):
    """Folders of the control groups whose `controller`, "memory" or "cpu", limits this process, innermost first.

    In a container or a Slurm step, /proc may give the group's path as seen from outside the namespace. Some of the
    folders then do not exist; those that do still limit the process. `root` is the parent of /proc and /sys.
    """
    root = pathlib.Path(root)
    groups = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        group = pathlib.PurePosixPath(path.strip("/"))
        if not controllers:  # version 2
            groups += [root / "sys/fs/cgroup" / folder for folder in (group, *group.parents)]
        elif controller in controllers.split(","):  # version 1
            groups += [root / "sys/fs/cgroup" / controller / folder for folder in (group, *group.parents)]
    return groups


def _read(path):
    """Text of a file in /proc or /sys, empty without the file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def available_memory(root="/"):
    """Bytes that this process can still allocate: the system's, or its control groups' if less."""
    available = psutil.virtual_memory().available
    for group in control_groups("memory", root):
        limit = _read(group / "memory.max") or _read(group / "memory.limit_in_bytes")
        usage = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        if usage and limit and limit != "max":
            counters = dict(line.split() for line in _read(group / "memory.stat").splitlines())
            # the kernel reclaims file cache
            cache = counters.get("total_inactive_file", counters.get("inactive_file", 0))
            available = min(available, max(0, int(limit) - int(usage) + int(cache)))
    return available


def available_cores(root="/"):
    """Number of cores in this process's affinity mask, at most its control groups' quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in control_groups("cpu", root):
        quota, period = (_read(group / "cpu.max") or "max 0").split()
        if quota == "max":
            quota, period = _read(group / "cpu.cfs_quota_us") or -1, _read(group / "cpu.cfs_period_us")
        if int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def limit_threads():
    """Let torch use at most `available_cores` threads, or fewer if OMP_NUM_THREADS says so."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def bf16_time_ratio():
    """Ratio of bfloat16 to float32 time for one of the default encoder's convolutions, forward and backward, on CPU.

    Below 1 on processors with fast bfloat16, up to 80 on others; draws no random numbers.
    """
    import torch

    def seconds(dtype):
        x = torch.ones(8, 32, 39, 39).to(dtype, memory_format=torch.channels_last).requires_grad_()
        weight = torch.ones(32, 32, 3, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
        taken = timeit.repeat(lambda: torch.conv2d(x, weight).sum().backward(), number=1, repeat=4)
        return statistics.median(taken[1:])  # the first is a warm-up

    return seconds(torch.bfloat16) / seconds(torch.float32)


def choose_device(name):
    """The torch device for `--device`; raises `Refused` for cuda without CUDA."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: this torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_machine(config, device):
    """Raise `Refused` if a flag needs a device, compiler or package that this machine lacks."""
    if config.precision == "tf32" and device.type != "cuda":
        raise Refused(f"--precision tf32: the networks run on {device}, which has no TF32; use fp32 or bf16")
    if config.replay_device == "cuda" and device.type != "cuda":
        raise Refused(f"--replay_device cuda: the networks run on {device}; use auto or cpu")
    variable, compiler = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    if config.compile and not shutil.which(os.environ.get(variable, compiler)):
        raise Refused(f"--compile: needs a compiler and finds none; install {compiler}")
    # a folder named wandb, as its runs leave behind, has no origin
    if config.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise Refused(f"--wandb {config.wandb}: the package is not installed; pip install wandb")
