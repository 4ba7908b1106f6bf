"""Small tools of no file in particular: seeds, weight initialisation, soft update, MLPs, memory."""

import ctypes
import pathlib
import random
import subprocess

import numpy as np
import psutil
import torch
from torch import nn


def seed_everything(seed):
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


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


def available_memory(device=None):
    """Bytes that this process can still take on `device`: on CPU the system's, or its control group's if less."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is no limit
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(statistics["inactive_file"]))  # file cache is given back
    except (OSError, ValueError, KeyError):
        pass
    return available


def git_commit():
    """Commit hash of the code, "+" appended if tracked files differ from it; None outside a git checkout."""

    def git(*args):
        here = pathlib.Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", here, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


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


@torch.no_grad()
def soft_update(net, target, tau):
    """EMA step: target <- (1 - tau) * target + tau * net."""
    targets = list(target.parameters())
    if targets:  # the identity encoder has none
        torch._foreach_lerp_(targets, list(net.parameters()), tau)


def grad_norm(parameters):
    """L2 norm of all gradients together, a 0-d tensor; parameters without a gradient are left out."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
