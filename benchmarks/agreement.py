"""How far the other precisions and update modes are from the faithful update: losses from the same weights and batches.

    python benchmarks/agreement.py                 100 updates at batch 64 on real pixels

The first column is --precision fp32 --update_mode sequential; a second run of it must be bit-identical. The others
show their relative difference from it, |a - b| / |b|. Every agent draws the same noise in the same order but for
joint, which draws the actor's after CoDy's.
"""

import copy
import dataclasses
import pathlib
import sys
from typing import Literal

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from variants import filled_replay  # noqa: E402

from agent import make_agent  # noqa: E402
from config import ConfigError, exit_with, parse, parse_flags  # noqa: E402
from dmc2gym import EnvError  # noqa: E402
from evaluate import choose_device  # noqa: E402
from utils import keep_freed_memory, seed_everything  # noqa: E402

LOSSES = ("critic_loss", "cody_loss")
SUBJECTS = {
    "fp32 again": [],
    "bf16": ["--precision", "bf16"],
    "joint fp32": ["--update_mode", "joint"],
    "joint bf16": ["--update_mode", "joint", "--precision", "bf16"],
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Loss differences of bf16 and joint from fp32 sequential."""

    updates: int = 100
    """Updates of each."""
    batch_size: int = 64
    """Pairs per update."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where."""


def losses_of(flags, args, device, replay, shape, actions):
    """{loss: (updates,) tensor} of a fresh agent."""
    config = parse(["--batch_size", str(args.batch_size), *flags])
    replay = copy.deepcopy(replay)  # each samples the same
    seed_everything(0)
    agent = make_agent(config, shape, actions, device)
    history = []
    for index in range(args.updates):
        torch.manual_seed(index)
        metrics = agent.update(agent.augment(replay.sample(config.batch_size)), index)
        history.append(torch.stack([metrics[name] for name in LOSSES]))
    return dict(zip(LOSSES, torch.stack(history, dim=1).cpu().double(), strict=True))


def main():
    keep_freed_memory()
    try:
        args = parse_flags(Args)
        if args.updates < 1:
            raise ConfigError(f"--updates {args.updates}: must be at least 1")
        device = choose_device(args.device)
        filled = filled_replay(parse(["--batch_size", str(args.batch_size)]), 300, device)
    except (ConfigError, EnvError) as error:
        exit_with(error)
    faithful = losses_of([], args, device, *filled)
    others = {name: losses_of(flags, args, device, *filled) for name, flags in SUBJECTS.items()}
    shown = [i for i in (0, 1, 2, 9, 24, 49, 74, 99) if i < args.updates]
    for loss in LOSSES:
        print(f"\n{loss:12} {'fp32':>9}" + "".join(f"{name:>12}" for name in others))
        differences = {
            name: (values[loss] - faithful[loss]).abs() / faithful[loss].abs() for name, values in others.items()
        }
        for i in shown:
            cells = "".join(f"{values[i]:12.2g}" for values in differences.values())
            print(f"update {i + 1:5} {faithful[loss][i]:9.4f}{cells}")
        for name, of in {"median": torch.median, "largest": torch.max}.items():
            print(f"{name:12} {'':9}" + "".join(f"{of(values):12.2g}" for values in differences.values()))
    same = all(torch.equal(others["fp32 again"][loss], faithful[loss]) for loss in LOSSES)
    print(f"\nfp32 sequential, run twice: {'bit-identical' if same else 'NOT the same'}")


if __name__ == "__main__":
    main()
