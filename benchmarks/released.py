"""Time of one update of the released code beside ours, in one run, sampling and augmentation of random frames included.

    git clone https://github.com/BangYou01/DY2P && git -C DY2P checkout 0ce9f0f
    python benchmarks/released.py DY2P
    python benchmarks/released.py DY2P --batch_sizes 256 --updates 20 --modes sequential

The released code is read from that checkout and is no part of this project. It runs as it is, but for what is missing
today, which is replaced here: `gym` (only its names are used), kornia's RandomCrop (its own random corner for each
image, as there) and `np.int`. Every row is measured in a process of its own, the released code's twice: with the
allocator's defaults, which is what its user has, and with its threshold raised, as this project raises it.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import torch
import tyro
from throughput import in_own_process, median_seconds, random_replay
from torch import nn

from agent import make_agent
from config import ConfigError, exit_with, parse, parse_flags
from machine import keep_freed_memory, limit_threads
from utils import git_commit, seed_everything

COMMIT = "0ce9f0f"
HOW = f"needs git clone https://github.com/BangYou01/DY2P and git -C DY2P checkout {COMMIT}"
CAPACITY = 2000
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Args:
    """The released code's update beside ours, on CPU."""

    dir: tyro.conf.Positional[str] = ""
    """Checkout of the released code."""
    batch_sizes: str = "128 256"
    """Batch sizes, space between."""
    modes: str = "sequential joint"
    """Our values of --update_mode."""
    precisions: str = "fp32"
    """Our values of --precision."""
    updates: int = 10
    """Updates timed in each row."""
    row: str = ""
    """Measure this one row, a JSON object, and print it as JSON (what the command runs for each row)."""


class RandomCrop(nn.Module):
    """kornia.augmentation.RandomCrop: one random corner for each image of (B, C, H, W)."""

    def __init__(self, size):
        super().__init__()
        self.height, self.width = size

    def forward(self, x):
        rows = torch.randint(0, x.shape[2] - self.height + 1, (len(x),)).tolist()
        columns = torch.randint(0, x.shape[3] - self.width + 1, (len(x),)).tolist()
        corners = zip(x, rows, columns, strict=True)
        return torch.stack([image[:, i : i + self.height, j : j + self.width] for image, i, j in corners])


def released_update(row):
    """The released agent's update, its settings those of our defaults, on a full replay of noise."""
    augmentation = types.SimpleNamespace(RandomCrop=RandomCrop)
    sys.modules["kornia"] = types.SimpleNamespace(augmentation=augmentation)
    sys.modules["gym"] = types.SimpleNamespace(Wrapper=object)
    np.int = int
    for name in ("utils", "encoder", "agent", "config"):
        sys.modules.pop(name, None)  # ours
    sys.path.insert(0, row["dir"])
    import cody_sac

    import utils

    shape, config = (9, 84, 84), parse([])
    agent = cody_sac.CodySacAgent(
        shape, (1,), CPU, action_repeat=config.action_repeat, hidden_dim=config.hidden_dim, init_temperature=0.1,
        alpha_lr=1e-4, alpha_beta=0.5, critic_tau=0.01, encoder_tau=0.05, cody_lr=1e-4, omega_cody_loss=1e-3,
        time_step=2,
    )  # fmt: skip
    replay = utils.ReplayBuffer(shape, (1,), CAPACITY, row["batch_size"], CPU)
    for array in (replay.obses, replay.next_obses):
        array[:] = np.random.randint(0, 256, array.shape, np.uint8)
    replay.actions[:], replay.rewards[:], replay.not_dones[:] = 0.5, 1, 1
    replay.idx, replay.full = 0, True
    silent = types.SimpleNamespace(log=lambda *_: None, log_histogram=lambda *_: None, log_param=lambda *_: None)
    return lambda index: agent.update(replay, silent, index)


def our_update(row):
    """The project's, as train.py runs it."""
    config = parse([f"--{name}={row[name]}" for name in ("batch_size", "update_mode", "precision")])
    agent, replay = make_agent(config, (9, 84, 84), 1, CPU), random_replay(config, CAPACITY, 1, CPU)
    return lambda index: agent.update(agent.augment(replay.sample(config.batch_size)), index)


def measure(row):
    """The row with its `ms` per update."""
    limit_threads()
    if row["raised"]:
        keep_freed_memory()
    seed_everything(0)
    update, indices = (our_update if row["update_mode"] else released_update)(row), iter(range(1, 10**6))
    return {**row, "ms": 1e3 * median_seconds(lambda: update(next(indices)), row["updates"], CPU)}


def check(directory):
    """Raise `ConfigError` unless `directory` is a checkout of the released code."""
    git = ["git", "-C", directory, "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout
    if not head.startswith(COMMIT) or not (pathlib.Path(directory) / "cody_sac.py").exists():
        raise ConfigError(f"{directory or 'DIR'}: not the released code at commit {COMMIT}; {HOW}")


def main():
    try:
        args = parse_flags(Args)
        if args.row:
            return print(json.dumps(measure(json.loads(args.row))))
        check(args.dir)
    except ConfigError as error:
        exit_with(error)
    limit_threads()
    print(
        f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}; released {COMMIT}"
    )
    print(f"released code at {COMMIT}, replaced in it: gym, kornia.augmentation.RandomCrop, np.int\n")
    print(f"{'':34} {'batch':>5} {'ms':>8} {'x released':>11} {'x raised':>9}")
    for batch_size in map(int, args.batch_sizes.split()):
        common = {"dir": args.dir, "batch_size": batch_size, "updates": args.updates}
        rows = [{"name": f"released, {name}", "update_mode": "", "raised": raised, **common}
                for name, raised in (("allocator's defaults", False), ("threshold raised", True))]  # fmt: skip
        rows += [{"name": f"{mode} {precision}", "update_mode": mode, "precision": precision, "raised": True, **common}
                 for precision in args.precisions.split() for mode in args.modes.split()]  # fmt: skip
        theirs = []
        for row in rows:
            ms = in_own_process(__file__, row)["ms"]
            theirs += [ms] if len(theirs) < 2 else []
            ratios = "".join(f"{other / ms:{width}.2f}" for other, width in zip(theirs, (12, 10), strict=False))
            print(f"{row['name']:34} {batch_size:5} {ms:8.1f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
