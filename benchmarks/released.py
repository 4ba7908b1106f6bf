"""Time of one update, the released code beside ours, including sampling and augmentation of random frames.

    git clone https://github.com/BangYou01/DY2P && git -C DY2P checkout 0ce9f0f
    python -m benchmarks.released DY2P
    python -m benchmarks.released DY2P --batch_sizes 256 --updates 20 --rows="--update_mode sequential"

The released code is not part of this project; this command imports it unchanged from the checkout and replaces its
missing dependencies: `gym` (it needs only the names), kornia's RandomCrop (here too with a random corner per image) and
`np.int`. Each row runs in its own process. The released code has two rows: with the allocator's defaults, which its
users have, and with the allocator's threshold raised, as in this project.
"""

import dataclasses
import itertools
import pathlib
import subprocess
import sys
import types

import numpy as np
import torch
import tyro
from torch import nn

from agent import make_agent
from benchmarks import throughput
from benchmarks.throughput import REPLAY, full_replay, in_own_process, median_seconds, random_frames
from config import parse_flags
from endings import EXPECTED, Refused, end
from machine import keep_freed_memory, limit_threads
from storage.run_folder import git_commit
from utils import seed_everything

COMMIT = "0ce9f0f"
HOW = f"needs git clone https://github.com/BangYou01/DY2P and git -C DY2P checkout {COMMIT}"
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Args:
    """The released code's update beside ours, on CPU."""

    dir: tyro.conf.Positional[str] = ""
    """Checkout of the released code."""
    batch_sizes: str = "128 256"
    """Space-separated batch sizes."""
    rows: str = "--update_mode sequential, --update_mode joint"
    """Our rows: comma-separated lists of train.py flags."""
    updates: int = 10
    """Updates timed per row."""


class RandomCrop(nn.Module):
    """kornia.augmentation.RandomCrop: crops (B, C, H, W) with one random corner per image."""

    def __init__(self, size):
        super().__init__()
        self.height, self.width = size

    def forward(self, x):
        rows = torch.randint(0, x.shape[2] - self.height + 1, (len(x),)).tolist()
        columns = torch.randint(0, x.shape[3] - self.width + 1, (len(x),)).tolist()
        corners = zip(x, rows, columns, strict=True)
        return torch.stack([image[:, i : i + self.height, j : j + self.width] for image, i, j in corners])


def released_update(config, directory):
    """The released agent's update with the settings of `config`, on a full replay of noise."""
    augmentation = types.SimpleNamespace(RandomCrop=RandomCrop)
    sys.modules["kornia"] = types.SimpleNamespace(augmentation=augmentation)
    sys.modules["gym"] = types.SimpleNamespace(Wrapper=object)
    np.int = int
    for name in ("utils", "encoder", "agent", "config"):
        sys.modules.pop(name, None)  # unload our modules of the same names
    sys.path.insert(0, directory)
    import cody_sac

    import utils

    shape = (9, 84, 84)
    agent = cody_sac.CodySacAgent(
        shape, (1,), CPU, action_repeat=config.action_repeat, hidden_dim=config.hidden_dim,
        init_temperature=config.init_temperature, alpha_lr=config.alpha_lr, alpha_beta=config.alpha_beta,
        critic_tau=config.critic_tau, encoder_tau=config.encoder_tau, cody_lr=config.cody_lr,
        omega_cody_loss=config.omega_cody_loss, time_step=2,
    )  # fmt: skip
    replay = utils.ReplayBuffer(shape, (1,), REPLAY, config.batch_size, CPU)
    for offset, array in enumerate((replay.obses, replay.next_obses)):
        array[:] = random_frames(shape)[(np.arange(REPLAY) + offset) % 64]
    replay.actions[:], replay.rewards[:], replay.not_dones[:] = 0.5, 1, 1
    replay.idx, replay.full = 0, True
    silent = types.SimpleNamespace(log=lambda *_: None, log_histogram=lambda *_: None, log_param=lambda *_: None)
    return lambda index: agent.update(replay, silent, index)


def our_update(config):
    """Our update, as train.py runs it."""
    agent, replay = make_agent(config, (9, 84, 84), 1, CPU), full_replay(config, random_frames((9, 84, 84)), 1, CPU)
    return lambda index: agent.update(agent.augment(replay.sample(config.batch_size)), index)


def measure(config, updates, directory, raised):
    """Milliseconds per update of the released code in `directory`, or of ours if `directory` is None."""
    limit_threads()
    if raised:
        keep_freed_memory()
    seed_everything(0)
    update = released_update(config, directory) if directory else our_update(config)
    indices = iter(range(1, 10**6))
    return 1e3 * median_seconds(lambda: update(next(indices)), updates, CPU)


def check(directory):
    """Raise `Refused` unless `directory` is an unchanged checkout of the released code."""
    git = ["git", "-C", directory, "describe", "--always", "--dirty", "--exclude=*", f"--abbrev={len(COMMIT)}"]
    try:
        head = subprocess.run(git, capture_output=True, text=True).stdout
    except OSError:
        raise Refused("git is not installed; it tells which commit DIR is at") from None
    if head.strip() != COMMIT or not (pathlib.Path(directory) / "cody_sac.py").exists():
        raise Refused(f"{directory or 'DIR'}: not the released code at commit {COMMIT}; {HOW}")


def main():
    try:
        args = parse_flags(Args)
        check(args.dir)
        ours = {name: value for name, value in vars(args).items() if name != "dir"}
        rows = throughput.rows_of(throughput.Args(**ours, flags="--device cpu"))
    except EXPECTED as error:
        end(error)
    limit_threads()
    print(f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {git_commit()}")
    print(f"released code at {COMMIT}, replaced in it: gym, kornia.augmentation.RandomCrop, np.int\n")
    print(f"{'':34} {'batch':>5} {'ms':>8} {'x released':>11} {'x raised':>9}", flush=True)
    for batch_size, ours in itertools.groupby(rows, lambda row: row[1].batch_size):
        ours = [(name, config, None, True) for name, config in ours]
        config = ours[0][1]
        released = [("released, allocator's defaults", config, args.dir, False)]
        released += [("released, threshold raised", config, args.dir, True)]
        theirs = []
        for name, config, *rest in released + ours:
            ms = in_own_process(measure, config, args.updates, *rest)
            theirs += [ms] if rest[0] else []
            ratios = "".join(f"{other / ms:{width}.2f}" for other, width in zip(theirs, (12, 10), strict=False))
            print(f"{name:34} {batch_size:5} {ms:8.1f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
