"""Small tools of no file in particular: seeds, threads, provenance, weight initialisation, soft update, MLPs."""

import importlib.metadata
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dmc2gym
from machine import available_cores
from signals import kept_from_children


def seed_everything(seed):
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class GlobalRandomness:
    """The generators that `seed_everything` seeds, of GPUs the one in use, as a part of a checkpoint."""

    def state_dict(self):
        kind, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": [kind, keys.tolist(), *rest],
            "torch": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state):
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and state["cuda"]:  # none, if the run has been on the CPU until now
            torch.cuda.set_rng_state(state["cuda"][0])


def git_commit():
    """Commit hash of the code, "+" appended if tracked files differ from it; None outside a git checkout."""

    def git(*args):
        here = pathlib.Path(__file__).resolve().parent
        with kept_from_children():
            done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(device):
    """What this process computes with, for args.json; results are bit for bit the same only where all of it is."""
    packages = ("torch", "mujoco", "dm_control", "gymnasium", "numpy")
    cuda = device.type == "cuda"
    backend = os.environ.get("MUJOCO_GL")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version.split()[0],
        "device_used": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mujoco_gl": backend,
        "renderer": dmc2gym.renderer(backend),
        "git_commit": git_commit(),
    }


def limit_threads():
    """Let torch use at most `available_cores` threads; fewer, where OMP_NUM_THREADS says so."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))


def bf16_time_ratio(batch=8, repeats=3):
    """Time of one of the default encoder's convolutions, forward and backward, in bfloat16 over float32, on CPU.

    Below 1 on processors with fast bfloat16, up to 80 on those without; draws no random numbers.
    """
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(batch, 32, 39, 39).to(dtype, memory_format=torch.channels_last).requires_grad_()
        weight = torch.ones(32, 32, 3, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
        taken = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            F.conv2d(x, weight).sum().backward()
            taken.append(time.perf_counter() - start)
        times[dtype] = statistics.median(taken[1:])  # the first prepares
    return times[torch.bfloat16] / times[torch.float32]


def mlp(input_dim, hidden_dim, output_dim, hidden_layers):
    """Linear layers with a ReLU after each but the last: (B, input_dim) -> (B, output_dim)."""
    layers = []
    for _ in range(hidden_layers):
        layers += [nn.Linear(input_dim, hidden_dim), nn.ReLU()]
        input_dim = hidden_dim
    return nn.Sequential(*layers, nn.Linear(input_dim, output_dim))


def weight_init(module):
    """Orthogonal linears and delta-orthogonal convolutions, zero bias; for `module.apply`.

    Delta-orthogonal: gain sqrt(2) on the centre tap, zero elsewhere (Xiao et al., arXiv 1806.05393).
    """
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.zeros_(module.weight)
        middle = module.weight.shape[-1] // 2
        # through a copy: orthogonal_ reshapes in place, which a strided centre tap does not allow
        centre = nn.init.orthogonal_(torch.empty(module.weight.shape[:2]), gain=nn.init.calculate_gain("relu"))
        with torch.no_grad():
            module.weight[:, :, middle, middle] = centre
        nn.init.zeros_(module.bias)


def orthogonal_convs(module):
    """Convolutions orthogonal over the whole kernel, gain sqrt(2), as DrQ's; for `module.apply`."""
    if isinstance(module, nn.Conv2d):
        weight = torch.empty(module.weight.shape)  # contiguous, which orthogonal_ needs
        with torch.no_grad():
            module.weight.copy_(nn.init.orthogonal_(weight, gain=nn.init.calculate_gain("relu")))


@torch.no_grad()
def soft_update(net, target, tau):
    """EMA step: target <- (1 - tau) * target + tau * net."""
    targets = list(target.parameters())
    if targets:  # the identity encoder has none
        torch._foreach_lerp_(targets, list(net.parameters()), tau)


def grad_norm(parameters):
    """L2 norm of all gradients together, a 0-d tensor; parameters without a gradient are left out."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
