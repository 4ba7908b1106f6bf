"""Time of one update, the released code beside ours, including sampling and augmentation.

    git clone https://github.com/BangYou01/DY2P && git -C DY2P checkout 0ce9f0f
    python -m benchmarks.released DY2P
    python -m benchmarks.released DY2P --batch_sizes 256 --updates 20 --rows="--update_mode sequential"

The released code is not part of this project; this command imports it unchanged from the checkout and replaces its
missing dependencies: `gym` (it needs only the names) and kornia's RandomCrop (here too with a random corner per image).
It runs with the allocator's defaults, as its users run it. Each row runs in its own process.
"""

import dataclasses
import itertools
import subprocess
import sys
import types

import torch
import tyro
from torch import nn

from benchmarks import describe_machine, random_episode, throughput
from command_line import parse_flags
from endings import Refused, command
from env_worker import open_env
from machine import limit_threads
from utils import seed_everything

COMMIT = "0ce9f0f"


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
    """kornia.augmentation.RandomCrop: square crops of (B, C, H, H), one random corner per image."""

    def __init__(self, size):
        super().__init__()
        self.size = size[0]

    def forward(self, x):
        corners = torch.randint(0, x.shape[-1] - self.size + 1, (len(x), 2)).tolist()
        windows = (image[:, i : i + self.size, j : j + self.size] for image, (i, j) in zip(x, corners, strict=True))
        return torch.stack(list(windows))


def measure_released(config, updates, directory):
    """Milliseconds per update of the released agent in `directory`, on the config's task and at its sizes."""
    limit_threads()
    seed_everything(0)
    env = open_env(config, 0)
    shapes = env.observation_space.shape, env.action_space.shape
    episode = random_episode(env)
    env.close()
    sys.modules["kornia"] = types.SimpleNamespace(augmentation=types.SimpleNamespace(RandomCrop=RandomCrop))
    sys.modules["gym"] = types.SimpleNamespace(Wrapper=object)
    del sys.modules["utils"], sys.modules["encoder"]  # ours; the released modules have the same names
    sys.path.insert(0, directory)
    import cody_sac

    cpu = torch.device("cpu")
    agent = cody_sac.CodySacAgent(*shapes, cpu, config.action_repeat, config.hidden_dim, time_step=2)
    replay = cody_sac.utils.ReplayBuffer(*shapes, throughput.REPLAY, config.batch_size, cpu)
    while not replay.full:
        for (obs, *_), (next_obs, action, reward, terminated) in itertools.pairwise(episode):
            replay.add(obs, action, reward, next_obs, terminated)
    indices = itertools.cycle((1, 2))  # the second steps actor and targets; the agent logs at neither
    return 1e3 * throughput.median_seconds(lambda: agent.update(replay, None, next(indices)), updates)


@command()
def main():
    args = parse_flags(Args)
    git = ["git", "-C", args.dir, "describe", "--always", "--dirty", "--exclude=*", f"--abbrev={len(COMMIT)}"]
    if subprocess.run(git, capture_output=True, text=True).stdout.strip() != COMMIT:
        how = f"needs git clone https://github.com/BangYou01/DY2P and git -C DY2P checkout {COMMIT}"
        raise Refused(f"{args.dir or 'DIR'}: not the released code at commit {COMMIT}; {how}")
    rows = throughput.rows_of(throughput.Args(args.rows, args.batch_sizes, "--device cpu", args.updates))
    describe_machine("cpu")
    print(f"\n{'':34} {'batch':>5} {'released ms':>12} {'ms':>8} {'x released':>11}", flush=True)
    released = {}
    for name, config in rows:
        size = config.batch_size
        if size not in released:
            released[size] = throughput.in_own_process(measure_released, config, args.updates, args.dir)
        ours = throughput.in_own_process(throughput.measure, config, args.updates, 2)["ms"]
        print(f"{name:34} {size:5} {released[size]:12.1f} {ours:8.1f} {released[size] / ours:11.2f}", flush=True)


if __name__ == "__main__":
    main()
