"""Limits of containers, read from trees that look like theirs."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from machine import available_cores, available_memory, bf16_time_ratio

GB = 10**9


def tree(root, cgroup, files):
    """/proc/self/cgroup with this line, and these files below /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


V1 = {"memory.usage_in_bytes": 3 * 10**8, "memory.stat": "cache 5\ntotal_inactive_file 100000000\ninactive_file 7"}
MEMORY = {
    "v1": ("4:memory:/job", {f"memory/job/{n}": t for n, t in {"memory.limit_in_bytes": GB, **V1}.items()}),
    "v1 in a container": (
        "4:memory:/docker/a",
        {f"memory/{n}": t for n, t in {"memory.limit_in_bytes": GB, **V1}.items()},
    ),
    "v2 in a namespace": ("0::/", {"memory.max": GB, "memory.current": 2 * 10**8}),
    "v2 from outside": (
        "0::/slice/pod",
        {"slice/pod/memory.max": GB, "slice/pod/memory.current": 2 * 10**8, "slice/memory.max": "max"},
    ),
    "Slurm step": (
        "0::/slurm/job_7/step_0/task_0",
        {
            "slurm/job_7/step_0/task_0/memory.max": "max",
            "slurm/job_7/step_0/task_0/memory.current": 5,
            "slurm/job_7/memory.max": GB,
            "slurm/job_7/memory.current": 3 * 10**8,
            "slurm/job_7/memory.stat": "anon 1\ninactive_file 100000000",
        },
    ),
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_of_a_container(tmp_path, kind):
    assert available_memory(root=tree(tmp_path, *MEMORY[kind])) == 8 * 10**8


@pytest.mark.parametrize(
    "cgroup, files",
    [
        ("0::/a", {"a/memory.max": "max", "a/memory.current": 5}),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": 2**63 - 4096, "memory/a/memory.usage_in_bytes": 5}),
    ],
)
def test_no_limit_of_memory(tmp_path, cgroup, files):
    assert available_memory(root=tree(tmp_path, cgroup, files)) == pytest.approx(
        psutil.virtual_memory().available, rel=0.1
    )


@pytest.mark.parametrize(
    "cgroup, files, cores",
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": 320000, "cpu/a/cpu.cfs_period_us": 100000}, 4),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": -1, "cpu/a/cpu.cfs_period_us": 100000}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
    ],
)
def test_quota_of_cores(tmp_path, monkeypatch, cgroup, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert available_cores(root=tree(tmp_path, cgroup, files)) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5})
    assert available_cores(root=tmp_path) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cores(root=tmp_path) == min(3, cores)


def test_threads_are_those_of_the_affinity():
    script = "import os, torch, machine; os.sched_setaffinity(0, {0}); machine.limit_threads()"
    script += "; print(torch.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout == "1\n", result.stderr


def test_bf16_ratio_is_quick_and_draws_nothing():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    start = time.perf_counter()
    assert bf16_time_ratio() > 0
    assert torch.equal(torch.get_rng_state(), before) and time.perf_counter() - start < 10
